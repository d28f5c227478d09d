"""The retention constraint: a policy held against the reference outputs of a buffer.

Measures the KL, differentiates it, linearises it. Knows nothing of training loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from nsrl.errors import NsrlError
from nsrl.projection.budget.model import Quadratic
from nsrl.projection.jacobians.blocks import DenseBlock
from nsrl.projection.jacobians.factored import FactoredJacobian, Jacobian, StackedJacobian
from nsrl.projection.jacobians.linearise import jacobian
from nsrl.projection.jacobians.matrix_free import Passes, PolicyJacobian, Products
from nsrl.projection.metrics import Gaussian, OutputMetric
from nsrl.projection.optimizer import FlatParameters
from nsrl.projection.roots import KEPT, largest_rows
from nsrl.rl.policies.actor_critic import (
    Head,
    Observation,
    actor_candidates,
    actor_head,
    policy_outputs,
    reached_at_any,
    select,
)
from nsrl.rl.policies.distributions import (
    distribution_of,
    is_maskable,
    valid_actions,
)
from nsrl.rl.retention.promises import OTHERS, Promises, worst_mean
from nsrl.rl.retention.states import RetainedStates
from nsrl.rl.retention.weights import StateWeights, rows_times, weighted_mean

#: Numbers that the rows of some states may take as they are: N x R x O of them.
LARGEST = 2**27


@dataclass(frozen=True)
class Measurement:
    """What the policy does on the buffer now, against the reference.

    Attributes:
        kl_mean: mean KL(pi_ref || pi) over the whole buffer, nats per state, by the buffer's weights (and, with task
            budgets, 1 / budget): the quantity under the budget.
        kl_max: largest KL of a state, whatever its weight.
        kl_heldout: mean KL over the held-out states, on which nothing is ever differentiated; NaN without any.
        agreement: share of states on which both policies act alike (same likeliest action; Gaussian means within half
            a reference standard deviation).
        agreement_heldout: the same over the held-out states.
        kl_bound: what counts against the budget: `kl_mean`, or what is spent of a promise that binds sooner.
        kl_worst: mean KL over the worst states (one in twenty, or the share that is promised something).
        kl_by_task: mean KL over the states of each task of a merged buffer, the quantities under task budgets; empty
            for a buffer of one source without them.
    """

    kl_mean: float
    kl_max: float
    kl_heldout: float
    agreement: float
    agreement_heldout: float
    kl_bound: float = math.nan
    kl_worst: float = math.nan
    kl_by_task: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """The policy on the whole buffer, at one point.

    Attributes:
        outputs: shape (N, O).
        metric: that they are compared in.
        kl: of every state, shape (N,), float64.
        binding: what counts against the budget.
    """

    outputs: Tensor
    metric: OutputMetric
    kl: Tensor
    binding: float


class RetentionConstraint:
    """Mean KL between a policy and the reference outputs stored in a buffer.

    Args:
        policy: the SB3 policy that is being trained; its actor parameters are the columns of the Jacobian.
        buffer: the retention buffer.
        preserve: "distribution" or "mode" (see `RetentionConfig`).
        tempering: of softmax Hessians.
        task_budgets: budget of each task of the buffer (see `RetentionConfig`); the states of a task then weigh, all
            together, 1 / budget.
        hold_spread: the retained policy has the standard deviation that it has now, whatever `policy.log_std` is for
            the time of an update (see `nsrl.rl.opening.spread`).
        promises: what is promised besides the mean KL; None for nothing.

    Attributes:
        shares: with task budgets, each one's as a multiple of their harmonic mean; else empty.
        names: names of the protected parameters, in `named_parameters()` order.
        parameters: the same as one flat vector.
        valid: valid actions at each state, (N, O) bool; None where all are.
        train, heldout: indices of the states of either kind whose weight is not zero.
    """

    def __init__(
        self,
        policy: ActorCriticPolicy,
        buffer: RetainedStates,
        preserve: str = "distribution",
        tempering: float = 0.01,
        task_budgets: Mapping[str, float] | None = None,
        hold_spread: bool = False,
        promises: Promises | None = None,
    ):
        self.policy = policy
        self.buffer = buffer
        self.preserve = preserve
        self.tempering = tempering
        self.promises = promises or Promises(math.inf)
        self._task_budgets = task_budgets
        self.distribution = distribution_of(policy)
        family = self.distribution.family
        if family != buffer.family:
            raise NsrlError(
                f"the buffer holds {buffer.family} outputs but the policy's action distribution is {family}; "
                "collect the buffer from an agent with the same action space"
            )
        device = policy.device
        self.inputs: Observation = buffer.inputs(device=device)
        self.reference = torch.tensor(buffer.outputs, device=device)
        counts = buffer.weights > 0.0
        self.train = torch.tensor(np.flatnonzero(counts & ~buffer.heldout), device=device)
        self.heldout = torch.tensor(np.flatnonzero(counts & buffer.heldout), device=device)
        self._weights = StateWeights(buffer, task_budgets, device)
        self.shares = self._weights.shares
        self._reference_log_std = None if buffer.log_std is None else torch.tensor(buffer.spreads, device=device)
        self.valid = valid_actions(self.reference) if is_maskable(policy) else None
        self._held_spread = policy.log_std.detach().clone() if hold_spread else None
        self.names = self._protected_names()
        named = dict(policy.named_parameters())
        self.parameters = FlatParameters([named[name] for name in self.names])
        self._log_std = named["log_std"] if self.protects_log_std else None
        self._reached = [p for p in self.parameters.parameters if p is not self._log_std]
        self._sizes = [p.numel() for p in self._reached]
        # Without a state of its own the features extractor gives the same features for good: extract them once.
        extractor = policy.pi_features_extractor
        stateful = any(True for _ in extractor.parameters()) or any(True for _ in extractor.buffers())
        self._still: Head | None = None if stateful else actor_head(policy, self.inputs, self._reached)

    def against(self, buffer: RetainedStates) -> RetentionConstraint:
        """The same policy held in the same way against another buffer.

        Raises:
            NsrlError: the buffer's outputs are not of this policy's kind.
        """
        held = self._held_spread is not None
        return RetentionConstraint(
            self.policy, buffer, self.preserve, self.tempering, self._task_budgets, held, self.promises
        )

    def __getstate__(self) -> dict[str, Any]:
        """All but the actor as a function, which a copy needs of its own policy."""
        return {**vars(self), "_still": self._still is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._still = actor_head(self.policy, self.inputs, self._reached) if state["_still"] else None

    @property
    def skips_calls(self) -> bool:
        """Whether outputs are made of the layers' weights without calling the modules: a chain of linear layers."""
        return self._still is not None and self._still.stages is not None

    @property
    def protects_log_std(self) -> bool:
        """Whether the state-independent standard deviation is part of the constraint, and moves."""
        if not self.distribution.has_spread or self._held_spread is not None or self.preserve != "distribution":
            return False
        return bool(self.policy.log_std.requires_grad)

    @property
    def metric(self) -> OutputMetric:
        """The output metric on the whole buffer, at the current standard deviation."""
        return self._metric_on(None, self._weights.relative())

    def _metric_on(self, indices: Tensor | None, weights: Tensor | None) -> OutputMetric:
        """The output metric on some states (None: all) of these weights."""
        spread, valid = self._reference_log_std, self.valid
        if indices is not None:
            spread = spread[indices] if spread is not None and spread.ndim == 2 else spread
            valid = None if valid is None else valid[indices]
        current = spread
        if spread is not None and self.preserve == "distribution":
            current = self.policy.log_std if self._held_spread is None else self._held_spread
        sizes = tuple(self.buffer.nvec or (self.reference.shape[1],))
        return self.distribution.metric(
            sizes, self.tempering, valid=valid, log_std=current, reference_log_std=spread, weights=weights
        )

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Evaluate the policy on the whole buffer (one forward pass)."""
        outputs, metric = self._outputs(), self.metric
        kl = metric.divergence(self.reference, outputs)
        return Evaluation(outputs, metric, kl, self._count(kl, outputs, metric))

    @torch.no_grad()
    def measure(self, evaluation: Evaluation | None = None) -> Measurement:
        """What the policy does on the whole buffer.

        Args:
            evaluation: of the policy as it is now, where there is one already.
        """
        evaluation = evaluation or self.evaluate()
        outputs, metric, kl = evaluation.outputs, evaluation.metric, evaluation.kl
        held = self.heldout
        return Measurement(
            kl_mean=self._weights.mean(kl),
            kl_max=float(kl.max()),
            kl_heldout=self._weights.mean(kl, held) if len(held) else math.nan,
            agreement=metric.agreement(self.reference, outputs),
            agreement_heldout=(
                self._metric_on(held, None).agreement(self.reference[held], outputs[held]) if len(held) else math.nan
            ),
            kl_bound=evaluation.binding,
            kl_worst=worst_mean(kl, self._weights.relative(), self.promises.worst_share),
            kl_by_task=self._weights.mean_by_task(kl),
        )

    @torch.no_grad()
    def divergence_between(self, before: Tensor, after: Tensor, valid: Tensor | None = None) -> float:
        """Mean KL between two outputs, (M, O), at any states, as the policy's standard deviation is now, nats a state.

        Args:
            before, after: logits or means.
            valid: valid actions, (M, O); None where all are.
        """
        sizes = tuple(self.buffer.nvec or (self.reference.shape[1],))
        spread = None
        if self.distribution.has_spread:
            spread = (self.policy.log_std if self._held_spread is None else self._held_spread).detach()
        metric = self.distribution.metric(sizes, self.tempering, valid=valid, log_std=spread, reference_log_std=spread)
        return float(metric.divergence(before, after).mean())

    @torch.no_grad()
    def state_divergences(self) -> Tensor:
        """KL of every state of the buffer, shape (N,), float64."""
        return self.metric.divergence(self.reference, self._outputs())

    @torch.no_grad()
    def divergences(self, evaluation: Evaluation | None = None) -> tuple[float, float]:
        """The KL that counts against the budget, and the mean KL of the training states; infinity where diverged.

        Args:
            evaluation: of the policy as it is now, where there is one already.
        """
        evaluation = evaluation or self.evaluate()
        training = self._weights.mean(evaluation.kl, self.train)
        return (evaluation.binding, training) if math.isfinite(evaluation.binding) else (math.inf, math.inf)

    @torch.no_grad()
    def divergence(self) -> float:
        """Mean KL over the whole buffer; infinity where the policy has diverged to NaN."""
        kl = self._weights.mean(self.state_divergences())
        return kl if math.isfinite(kl) else math.inf

    @torch.no_grad()
    def binding_divergence(self) -> float:
        """The KL that counts against the budget; infinity where the policy has diverged to NaN.

        It is the mean over the whole buffer. With task budgets it is the mean KL of the task that has spent most of its
        own, divided by that one's share: at most the overall budget if and only if every task is within its own. With
        further promises it is what of them is spent, where that is more (see `Promises`).
        """
        return self.evaluate().binding

    def _count(self, kl: Tensor, outputs: Tensor, metric: OutputMetric) -> float:
        """What counts against the budget, given the KL of every state."""
        mean, promises = self._mean(kl), self.promises
        if not promises.any or not math.isfinite(mean):
            return mean
        worst = 0.0
        if promises.worst_budget is not None:
            worst = promises.worst(worst_mean(kl, self._weights.relative(), promises.worst_share))
        unlike = 0.0 if promises.agreement is None else promises.unlike(metric.agreement(self.reference, outputs))
        return max(mean, worst, unlike)

    def _mean(self, kl: Tensor) -> float:
        whole = self._weights.mean(kl)
        if not math.isfinite(whole):
            return math.inf
        tasks = self._weights.tasks
        return max((self._weights.mean(kl, tasks[task]) / share for task, share in self.shares.items()), default=whole)

    def gradient(self, indices: Tensor) -> tuple[float, Tensor]:
        """Mean KL of some states and its gradient in the protected parameters, shape (P,)."""
        kl, pull = self.probe(indices)
        return kl, torch.cat([piece.flatten() for piece in pull()])

    def probe(self, indices: Tensor) -> tuple[float, Callable[[], list[Tensor]]]:
        """Mean KL of some states, and a function that goes back for its gradients, one a protected parameter."""
        weights = self._weights.relative(indices)
        metric, reference = self._metric_on(indices, weights), self.reference[indices]
        passes = self._passes(indices)
        with torch.no_grad():
            # dKL/dz is known in closed form: the backward pass starts at the outputs, not at the KL.
            kl = weighted_mean(metric.divergence(reference, passes.outputs), weights)
            slope = rows_times(weights, metric.slope(reference, passes.outputs)) / len(indices)

        def pull() -> list[Tensor]:
            pieces = list(passes.pull(slope).split(self._sizes))
            if self._log_std is not None:
                assert isinstance(metric, Gaussian)
                spread = math.sqrt(2.0) * metric.log_std_residual(reference, passes.outputs)
                pieces.insert(self.names.index("log_std"), spread)
            return [piece.view_as(p) for piece, p in zip(pieces, self.parameters.parameters, strict=True)]

        return kl, pull

    def output_errors(self, indices: Tensor) -> list[Tensor]:
        """Gradients of the mean over some states of |z - z_ref|^2 / 2, z the outputs, one a protected parameter."""
        passes = self._passes(indices)
        with torch.no_grad():
            slope = (passes.outputs - self.reference[indices]) / len(indices)
            pieces = list(passes.pull(slope).split(self._sizes))
        if self._log_std is not None:
            pieces.insert(self.names.index("log_std"), torch.zeros_like(self._log_std))
        return [piece.view_as(p) for piece, p in zip(pieces, self.parameters.parameters, strict=True)]

    def _outputs(self) -> Tensor:
        """The policy on the whole buffer, (N, O), without a graph."""
        return policy_outputs(self.policy, self.inputs) if self._still is None else self._still.outputs()

    def _passes(self, indices: Tensor) -> Passes:
        """The policy at some states, with the products of its Jacobian in the protected parameters."""
        if self._still is None:
            return actor_head(self.policy, select(self.inputs, indices), self._reached).passes()
        return self._still.select(indices).passes()

    def linearise(
        self, indices: Tensor, importance: Tensor | None = None, rows: int | None = None, factor: float = 1.0
    ) -> Quadratic[Jacobian]:
        """Factored, whitened Jacobian of the outputs on some states, and the residual rho, at the current policy.

        Rows are multiplied by sqrt(w / N), so that 1/2 |J d|^2 is a weighted mean KL.

        Args:
            indices: the states.
            importance: how many states of the buffer each of them stands for, shape (N,), in any unit; it multiplies
                the buffer's weights. None where the states are a uniform sample.
            rows: rows a state, those of largest norm (the likeliest actions); None for all, up to what memory allows.
            factor: of the whole model: it is then one of this multiple of the weighted mean KL.
        """
        weights = self._weights.relative(indices, importance)
        metric, reference = self._metric_on(indices, weights), self.reference[indices]
        root = None if weights is None else weights.sqrt()
        scale = math.sqrt(factor / len(indices))
        limit = rows or max(1, LARGEST // reference.numel())
        chosen: list[Tensor] = []

        def seeds(outputs: Tensor) -> Tensor:
            if limit >= outputs.shape[1]:
                return rows_times(root, metric.seeds(outputs))
            found, which = largest_rows(metric.root(outputs).times(root), limit)
            chosen[:] = [which]
            return found

        factored = jacobian(
            self.policy,
            select(self.inputs, indices),
            forward=_forward,
            parameters=self.names,
            seed=seeds,
            scale=scale,
        )
        outputs = factored.outputs
        residual = rows_times(root, metric.residual(reference, outputs))
        residual = ((residual.gather(1, chosen[0]) if chosen else residual) * scale).flatten()
        divergence = factor * weighted_mean(metric.divergence(reference, outputs).detach(), weights)
        if not self.protects_log_std:
            return Quadratic(factored, residual, divergence)
        assert isinstance(metric, Gaussian)
        spread = self._log_std_rows(factored, factor)
        residual = torch.cat([residual, math.sqrt(factor) * metric.log_std_residual(reference, outputs)])
        return Quadratic(StackedJacobian([factored, spread]), residual, divergence)

    @property
    def rows_of_a_state(self) -> int:
        """Rows of the whitened Jacobian that a state has, R."""
        return int(self._metric_on(self.train[:1], None).root(self.reference[:1]).shape[1])

    def restoration(self) -> Quadratic[Any]:
        """The model that a restoration is solved on: all training states.

        Where another promise than the mean binds, those states weigh more that break it.
        """
        importance, factor = self._breaking()
        if self.reference.shape[1] <= KEPT:
            return self.linearise(self.train, importance, factor=factor)
        return self.quadratic(self.train, importance, factor)

    def _breaking(self) -> tuple[Tensor | None, float]:
        """Importance of each training state in a restoration, and the factor that brings their KL to its unit."""
        if not self.promises.any:
            return None, 1.0
        now = self.evaluate()
        kl, bound = now.kl, now.binding
        if bound <= self._mean(kl):
            return None, 1.0
        share = self.promises.worst_share
        if self.promises.agreement is not None:
            share = max(share, 1.0 - self.promises.agreement)
        on_training = kl[self.train]
        edge = on_training.quantile(1.0 - min(share, 1.0))
        importance = torch.where(on_training >= edge, 1.0, OTHERS)
        measured = weighted_mean(on_training, self._weights.relative(self.train, importance))
        return importance, bound / max(measured, 1e-30)

    def quadratic(self, indices: Tensor, importance: Tensor | None = None, factor: float = 1.0) -> Quadratic[Products]:
        """The model of `linearise` for products alone, which passes through the network make at a third of the cost."""
        weights = self._weights.relative(indices, importance)
        metric, reference = self._metric_on(indices, weights), self.reference[indices]
        root = None if weights is None else weights.sqrt()
        passes = self._passes(indices)
        with torch.no_grad():
            whitening = metric.root(passes.outputs).times(root).divided(1.0 / math.sqrt(factor))
            scale = math.sqrt(factor / len(indices))
            residual = rows_times(root, metric.residual(reference, passes.outputs)).flatten() * scale
            divergence = factor * weighted_mean(metric.divergence(reference, passes.outputs), weights)
            if not self.protects_log_std:
                return Quadratic(PolicyJacobian(passes, whitening), residual, divergence)
            assert isinstance(metric, Gaussian)
            residual = torch.cat([residual, metric.log_std_residual(reference, passes.outputs)])
        return Quadratic(PolicyJacobian(passes, whitening, self._log_std_columns), residual, divergence)

    @property
    def _log_std_columns(self) -> tuple[int, int]:
        start = sum(self.parameters.sizes[: self.names.index("log_std")])
        return start, start + self.policy.log_std.numel()

    def _log_std_rows(self, factored: FactoredJacobian, factor: float = 1.0) -> FactoredJacobian:
        """One row a dimension, sqrt(2) d log_std: the Fisher information of a standard deviation is 2."""
        size = self.policy.log_std.numel()
        values = math.sqrt(2.0 * factor) * torch.eye(size, device=self.reference.device).unsqueeze(0)
        block = DenseBlock(values, self._log_std_columns)
        return FactoredJacobian([block], (size, factored.shape[1]), size, factored.names, factored.outputs[:1])

    def _protected_names(self) -> tuple[str, ...]:
        """Parameters that the outputs depend on, found by autograd rather than by name.

        Which those are may depend on the state (a mixture of experts) and change as the policy does, so what neither
        the outputs nor the values of any state depend on counts as the actor's too: its columns are zero so far.
        """
        outputs = policy_outputs(self.policy, select(self.inputs, self.train[:2]))
        if outputs.shape[1] != self.reference.shape[1]:
            raise NsrlError(
                f"the buffer holds {self.reference.shape[1]} outputs a state but the policy has "
                f"{outputs.shape[1]}; collect the buffer from an agent with the same action space"
            )
        policy, count, wanted = self.policy, len(self.reference), actor_candidates(self.policy)
        ours = set(
            reached_at_any(policy, lambda rows: policy_outputs(policy, select(self.inputs, rows)), count, wanted)
        )
        if wanted - ours:
            ours |= wanted.difference(
                reached_at_any(
                    policy, lambda rows: policy.predict_values(select(self.inputs, rows)), count, wanted - ours
                )
            )
        return tuple(
            name for name, p in policy.named_parameters() if p in ours or (name == "log_std" and self.protects_log_std)
        )


def _forward(policy: nn.Module, observations: Observation) -> Tensor:
    return policy_outputs(cast(ActorCriticPolicy, policy), observations)
