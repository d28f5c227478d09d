"""Action distributions: which family a policy has, how actions are drawn, which are valid, and how KL is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib.common.maskable.distributions import (
    MaskableBernoulliDistribution,
    MaskableCategoricalDistribution,
    MaskableDistribution,
    MaskableMultiCategoricalDistribution,
)
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
    SquashedDiagGaussianDistribution,
    StateDependentNoiseDistribution,
)
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from torch import Tensor

from nsrl.errors import NsrlError
from nsrl.projection.metrics import Categorical, Gaussian


@dataclass(frozen=True)
class StatewiseGaussian(Gaussian):
    """`Gaussian` with one reference standard deviation a state, and weights in the mean over states.

    Attributes:
        log_std: current log standard deviations, shape (A,) or (N, A).
        reference_log_std: those of the reference policy, shape (A,) or (N, A).
        weights: weight of each state, mean 1, shape (N,); None for ones.
    """

    weights: Tensor | None = None

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """KL(N(reference, s_ref) || N(outputs, s)), summed over dimensions, shape (N,)."""
        log_std, ref = self.log_std.double(), self.reference_log_std.double()
        shift = (reference.double() - outputs.double()) * torch.exp(-log_std)
        constant = (log_std - ref + 0.5 * torch.exp(2 * (ref - log_std)) - 0.5).sum(-1)
        return 0.5 * shift.square().sum(-1) + constant

    def seeds(self, outputs: Tensor) -> Tensor:
        """diag(1 / s) of each state, shape (N, A, A)."""
        return torch.diag_embed(torch.exp(-self.log_std.detach()).to(outputs).expand_as(outputs))

    def log_std_residual(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """D weighted-mean-KL / d log_std divided by sqrt(2), shape (A,)."""
        log_std, ref = self.log_std.detach().double(), self.reference_log_std.double()
        spread = torch.exp(2 * ref) + (reference.double() - outputs.double()).square()
        if self.weights is not None:
            spread = spread * self.weights.to(spread).unsqueeze(-1)
        return ((1.0 - spread.mean(0) * torch.exp(-2 * log_std)) / math.sqrt(2.0)).to(outputs.dtype)


def distribution(model: OnPolicyAlgorithm) -> dict[str, Any]:
    """What makes a distribution of a model's outputs: the fields `family`, `log_std` and `nvec` of a buffer."""
    policy, space = model.policy, model.action_space
    family = action_family(policy)
    return {
        "family": family,
        "log_std": policy.log_std.detach().cpu().numpy().astype(np.float32) if family == "gaussian" else None,
        "nvec": tuple(int(n) for n in space.nvec) if isinstance(space, spaces.MultiDiscrete) else None,
    }


#: Logit of an invalid action, as in `sb3_contrib.common.maskable.distributions`.
INVALID = -1e8


def is_maskable(policy: Any) -> bool:
    """Whether a policy takes action masks."""
    return isinstance(getattr(policy, "action_dist", None), MaskableDistribution)


def with_masks(logits: Tensor, valid: Tensor) -> Tensor:
    """Logits (N, O) in which those of invalid actions are -1e8; `valid` is (N, O) bool."""
    return torch.where(valid, logits, torch.full_like(logits, INVALID))


def valid_actions(reference: Tensor) -> Tensor | None:
    """Which actions a buffer's reference logits (N, O) call valid, (N, O) bool; None if all are."""
    valid = reference > 0.5 * INVALID
    return None if bool(valid.all()) else valid


@dataclass(frozen=True)
class MaskedCategorical(Categorical):
    """`Categorical` over the valid actions only: outputs are masked before they are compared, and so are their rows.

    Attributes:
        valid: valid actions of each state, (N, O) bool.
    """

    valid: Tensor | None = None

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """KL between the masked distributions, shape (N,)."""
        return super().divergence(reference, self._masked(outputs))

    def slope(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """P - p_ref per head, zero for invalid actions, shape (N, O)."""
        return super().slope(reference, self._masked(outputs))

    def seeds(self, outputs: Tensor) -> Tensor:
        """As `Categorical.seeds`; the columns of invalid actions are zero."""
        assert self.valid is not None
        return super().seeds(self._masked(outputs)) * self.valid.unsqueeze(1)

    def residual(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """As `Categorical.residual`."""
        return super().residual(reference, self._masked(outputs))

    def agreement(self, reference: Tensor, outputs: Tensor) -> float:
        """Share of states on which every head has the same most likely valid action."""
        return super().agreement(reference, self._masked(outputs))

    def _masked(self, outputs: Tensor) -> Tensor:
        assert self.valid is not None
        return with_masks(outputs, self.valid)


FAMILIES: dict[type, str] = {
    CategoricalDistribution: "categorical",
    MultiCategoricalDistribution: "multi_categorical",
    BernoulliDistribution: "bernoulli",
    DiagGaussianDistribution: "gaussian",
    MaskableCategoricalDistribution: "categorical",
    MaskableMultiCategoricalDistribution: "multi_categorical",
}

#: Why a distribution of SB3 is refused, and what to do instead.
REFUSED: dict[type, str] = {
    StateDependentNoiseDistribution: (
        "the noise of gSDE depends on the state through learnt features, so its spread is no parameter that could be "
        "held; train the agent with use_sde=False"
    ),
    SquashedDiagGaussianDistribution: (
        "a tanh lies between its mean and the action, which nsrl does not model; train the agent with "
        "squash_output=False, as PPO and A2C do by default"
    ),
    MaskableBernoulliDistribution: (
        "masked MultiBinary actions have two logits each, not one; declare them as MultiDiscrete([2, 2, ...]), which "
        "is the same to MaskablePPO"
    ),
}


def action_family(policy: BasePolicy) -> str:
    """Name of the action distribution: "categorical", "multi_categorical", "bernoulli" or "gaussian".

    Raises:
        NsrlError: for a policy with memory, or a distribution whose outputs are not plain logits or a mean (gSDE,
            squashed Gaussian).
    """
    if hasattr(policy, "lstm_actor"):
        raise NsrlError(
            f"{type(policy).__name__} acts on its memory as well as on the observation, so the states of a buffer do "
            "not say what it does; only PPO, A2C, TRPO and MaskablePPO can be protected (stacked frames can stand in "
            "for memory)"
        )
    kind = type(getattr(policy, "action_dist", None))
    family = FAMILIES.get(kind)
    if family is None:
        why = REFUSED.get(kind, "it is none of the distributions that SB3's on-policy algorithms make")
        raise NsrlError(f"policies with {kind.__name__} cannot be protected: {why}")
    return family


def sample_actions(policy: ActorCriticPolicy, family: str, outputs: Tensor, generator: torch.Generator) -> np.ndarray:
    """Draw one action a row from the policy's distribution, in the form that SB3 hands to `env.step`."""
    space = policy.action_space
    outputs = outputs.float().cpu()
    if family == "gaussian":
        assert isinstance(space, spaces.Box)
        noise = torch.randn(outputs.shape, generator=generator)
        actions = (outputs + policy.log_std.detach().cpu().exp() * noise).numpy()  # type: ignore[operator]
        return np.clip(actions.reshape(-1, *space.shape), space.low, space.high)
    if family == "bernoulli":
        return torch.bernoulli(outputs.sigmoid(), generator=generator).numpy().astype(space.dtype)
    nvec = list(space.nvec) if isinstance(space, spaces.MultiDiscrete) else [outputs.shape[1]]
    draws = [torch.multinomial(part.softmax(1), 1, generator=generator) for part in outputs.split(nvec, 1)]
    actions = torch.cat(draws, 1).numpy()
    return actions if isinstance(space, spaces.MultiDiscrete) else actions[:, 0]


SPACE_FAMILIES: dict[type[spaces.Space], str] = {
    spaces.Discrete: "categorical",
    spaces.MultiDiscrete: "multi_categorical",
    spaces.MultiBinary: "bernoulli",
    spaces.Box: "gaussian",
}


def outputs_of(space: spaces.Space) -> int:
    """How many logits or means actions of a space take."""
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return int(space.nvec.sum())
    return int(np.prod(space.shape or ()))
