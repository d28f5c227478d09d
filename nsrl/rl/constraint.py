"""The retention constraint: a policy held against the reference outputs of a buffer.

Measures the KL, differentiates it, linearises it. Knows nothing of training loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from nsrl.errors import NsrlError
from nsrl.projection.blocks import DenseBlock
from nsrl.projection.jacobian import FactoredJacobian, Jacobian, StackedJacobian, jacobian
from nsrl.projection.metrics import Bernoulli, Categorical, Gaussian, OutputMetric
from nsrl.projection.optimizer import FlatParameters
from nsrl.rl.policies import Observation, action_family, policy_outputs

if TYPE_CHECKING:
    from nsrl.rl.buffer import RetentionBuffer


@dataclass(frozen=True)
class Measurement:
    """What the policy does on the buffer now, against the reference.

    Attributes:
        kl_mean: mean KL(pi_ref || pi) over the whole buffer, nats per state: the quantity under the budget.
        kl_max: largest KL of a state.
        kl_heldout: mean KL over the held-out states, on which nothing is ever differentiated; NaN without any.
        agreement: share of states on which both policies act alike (same likeliest action; Gaussian means within half
            a reference standard deviation).
        agreement_heldout: the same over the held-out states.
    """

    kl_mean: float
    kl_max: float
    kl_heldout: float
    agreement: float
    agreement_heldout: float


@dataclass(frozen=True)
class Linearisation:
    """The second-order model of the mean KL on some states: KL(0) - 1/2 |rho|^2 + 1/2 |rho + J d|^2."""

    jacobian: Jacobian
    residual: Tensor
    divergence: float


class RetentionConstraint:
    """Mean KL between a policy and the reference outputs stored in a buffer.

    Args:
        policy: the SB3 policy that is being trained; its actor parameters are the columns of the Jacobian.
        buffer: the retention buffer.
        preserve: "distribution" or "mode" (see `RetentionConfig`).
        tempering: of softmax Hessians.

    Attributes:
        names: names of the protected parameters, in `named_parameters()` order.
        parameters: the same as one flat vector.
    """

    def __init__(self, policy: ActorCriticPolicy, buffer: RetentionBuffer, preserve: str = "distribution",
                 tempering: float = 0.01):  # fmt: skip
        self.policy = policy
        self.buffer = buffer
        self.preserve = preserve
        self.tempering = tempering
        self.family = action_family(policy)
        if self.family != buffer.family:
            raise NsrlError(
                f"the buffer holds {buffer.family} outputs but the policy's action distribution is {self.family}; "
                "collect the buffer from an agent with the same action space"
            )
        device = policy.device
        self.inputs: Observation = _to(buffer.inputs(), device)
        self.reference = torch.tensor(buffer.outputs, device=device)
        self.train = torch.tensor(buffer.train_indices, device=device)
        self.heldout = torch.tensor(buffer.heldout_indices, device=device)
        self._reference_log_std = None if buffer.log_std is None else torch.tensor(buffer.log_std, device=device)
        self.names = self._protected_names()
        named = dict(policy.named_parameters())
        self.parameters = FlatParameters([named[name] for name in self.names])
        self._log_std = named["log_std"] if self.protects_log_std else None
        self._dense: tuple[str, ...] | None = None  # not known before the first, checked linearisation

    @property
    def protects_log_std(self) -> bool:
        """Whether the state-independent standard deviation is part of the constraint."""
        return self.family == "gaussian" and self.preserve == "distribution"

    @property
    def metric(self) -> OutputMetric:
        """The output metric at the current standard deviation."""
        if self.family == "gaussian":
            assert self._reference_log_std is not None
            current = self.policy.log_std if self.protects_log_std else self._reference_log_std
            return Gaussian(current, self._reference_log_std)
        if self.family == "bernoulli":
            return Bernoulli(self.tempering)
        if self.family == "multi_categorical":
            return Categorical(tuple(self.buffer.nvec or ()), self.tempering)
        return Categorical((self.reference.shape[1],), self.tempering)

    @torch.no_grad()
    def measure(self) -> Measurement:
        """Evaluate the policy on the whole buffer (one forward pass)."""
        outputs = policy_outputs(self.policy, self.inputs)
        metric = self.metric
        kl = metric.divergence(self.reference, outputs)
        held = self.heldout
        return Measurement(
            kl_mean=float(kl.mean()),
            kl_max=float(kl.max()),
            kl_heldout=float(kl[held].mean()) if len(held) else math.nan,
            agreement=metric.agreement(self.reference, outputs),
            agreement_heldout=metric.agreement(self.reference[held], outputs[held]) if len(held) else math.nan,
        )

    @torch.no_grad()
    def divergences(self) -> tuple[float, float]:
        """Mean KL over the whole buffer and over its training states; infinity where the policy has diverged."""
        kl = self.metric.divergence(self.reference, policy_outputs(self.policy, self.inputs))
        whole, training = float(kl.mean()), float(kl[self.train].mean())
        return (whole, training) if math.isfinite(whole) else (math.inf, math.inf)

    @torch.no_grad()
    def divergence(self) -> float:
        """Mean KL over the whole buffer; infinity where the policy has diverged to NaN."""
        kl = float(self.metric.divergence(self.reference, policy_outputs(self.policy, self.inputs)).mean())
        return kl if math.isfinite(kl) else math.inf

    def gradient(self, indices: Tensor) -> tuple[float, Tensor]:
        """Mean KL of some states and its gradient in the protected parameters, shape (P,)."""
        kl, pull = self.probe(indices)
        return kl, torch.cat([piece.flatten() for piece in pull()])

    def probe(self, indices: Tensor) -> tuple[float, Callable[[], list[Tensor]]]:
        """Mean KL of some states, and a function that goes back for its gradients, one a protected parameter."""
        metric, reference = self.metric, self.reference[indices]
        with torch.enable_grad():
            outputs = policy_outputs(self.policy, _select(self.inputs, indices))
        with torch.no_grad():
            # dKL/dz is known in closed form: the backward pass starts at the outputs, not at the KL.
            kl = float(metric.divergence(reference, outputs).mean())
            slope = metric.slope(reference, outputs) / len(indices)

        def pull() -> list[Tensor]:
            reached = [p for p in self.parameters.parameters if p is not self._log_std]
            pieces = list(torch.autograd.grad(outputs, reached, slope))
            if self._log_std is not None:
                assert isinstance(metric, Gaussian)
                spread = math.sqrt(2.0) * metric.log_std_residual(reference, outputs.detach())
                pieces.insert(self.names.index("log_std"), spread)
            return pieces

        return kl, pull

    def linearise(self, indices: Tensor) -> Linearisation:
        """Factored, whitened Jacobian of the outputs on some states, and the residual rho, at the current policy.

        Rows are divided by sqrt(N), so that 1/2 |J d|^2 is a mean KL. The first call checks the factors against
        autograd.
        """
        metric, reference = self.metric, self.reference[indices]
        scale = 1.0 / math.sqrt(len(indices))
        factored = jacobian(
            self.policy, _select(self.inputs, indices), forward=_forward, parameters=self.names,
            seed=metric.seeds, scale=scale, check=self._dense is None, dense=self._dense or (),
        )  # fmt: skip
        self._dense = factored.recomputed
        outputs = factored.outputs
        residual = (metric.residual(reference, outputs) * scale).flatten()
        divergence = float(metric.divergence(reference, outputs).detach().mean())
        if not self.protects_log_std:
            return Linearisation(factored, residual, divergence)
        assert isinstance(metric, Gaussian)
        rows = self._log_std_rows(factored)
        residual = torch.cat([residual, metric.log_std_residual(reference, outputs)])
        return Linearisation(StackedJacobian([factored, rows]), residual, divergence)

    def _log_std_rows(self, factored: FactoredJacobian) -> FactoredJacobian:
        """One row a dimension, sqrt(2) d log_std: the Fisher information of a standard deviation is 2."""
        size = self.policy.log_std.numel()
        start = sum(self.parameters.sizes[: self.names.index("log_std")])
        values = math.sqrt(2.0) * torch.eye(size, device=self.reference.device).unsqueeze(0)
        block = DenseBlock(values, (start, start + size))
        return FactoredJacobian([block], (size, factored.shape[1]), size, factored.names, factored.outputs[:1])

    def _protected_names(self) -> tuple[str, ...]:
        """Parameters that the outputs depend on, found by autograd rather than by name."""
        named = [(name, p) for name, p in self.policy.named_parameters() if p.requires_grad]
        with torch.enable_grad():
            outputs = policy_outputs(self.policy, _select(self.inputs, self.train[:2]))
            grads = torch.autograd.grad(outputs.sum(), [p for _, p in named], allow_unused=True)
        names = [
            name
            for (name, _), grad in zip(named, grads, strict=True)
            if grad is not None or (name == "log_std" and self.protects_log_std)
        ]
        return tuple(names)


def _forward(policy: nn.Module, observations: Observation) -> Tensor:
    return policy_outputs(cast(ActorCriticPolicy, policy), observations)


def _select(inputs: Observation, indices: Tensor) -> Observation:
    if isinstance(inputs, Mapping):
        return {key: value[indices] for key, value in inputs.items()}
    return inputs[indices]


def _to(inputs: Observation, device: torch.device) -> Observation:
    if isinstance(inputs, Mapping):
        return {key: value.to(device) for key, value in inputs.items()}
    return inputs.to(device)
