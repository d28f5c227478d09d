"""Action distributions: which family a policy has, how actions are drawn, which are valid, and how KL is measured."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

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
from nsrl.projection.metrics import Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian, OutputMetric
from nsrl.projection.roots import KEPT, DenseRoot, Root, SoftmaxRoot
from nsrl.rl.policies.likelihood import BernoulliLikelihood, CategoricalLikelihood, GaussianLikelihood, Likelihood


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
        """As `Categorical.seeds`, (N, O - heads, O); the columns of invalid actions are zero."""
        assert self.valid is not None
        return super().seeds(self._masked(outputs)) * self.valid.unsqueeze(1)

    def root(self, outputs: Tensor) -> Root:
        """As `seeds`."""
        if outputs.shape[1] <= KEPT:
            return DenseRoot(self.seeds(outputs))
        whole = super().root(self._masked(outputs))
        assert isinstance(whole, SoftmaxRoot)
        return replace(whole, valid=self.valid)

    def residual(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """As `Categorical.residual`, (N, O)."""
        return super().residual(reference, self._masked(outputs))

    def agreement(self, reference: Tensor, outputs: Tensor) -> float:
        """Share of states on which every head has the same most likely valid action."""
        return super().agreement(reference, self._masked(outputs))

    def _masked(self, outputs: Tensor) -> Tensor:
        assert self.valid is not None
        return with_masks(outputs, self.valid)


class ActionDistribution(ABC):
    """One kind of action distribution: what a policy's outputs are to it, how it draws, and in which metric it is held.

    A new one is a class here and an entry in `DISTRIBUTIONS`.

    Attributes:
        family: its name, in buffers too.
        kinds: the distributions of SB3 and sb3-contrib that are this.
        space: the action space that it is for.
        has_spread: whether a state-independent log standard deviation belongs to it.
        takes_masks: whether actions can be invalid.
    """

    family: ClassVar[str]
    kinds: ClassVar[tuple[type, ...]]
    space: ClassVar[type[spaces.Space]]
    has_spread: ClassVar[bool] = False
    takes_masks: ClassVar[bool] = False

    @abstractmethod
    def sizes(self, space: Any) -> tuple[int, ...]:
        """Outputs of each independent part of an action of this space."""

    @abstractmethod
    def sample(self, policy: ActorCriticPolicy, outputs: Tensor, generator: torch.Generator) -> np.ndarray:
        """Draw one action a row of outputs (N, O), in the form that SB3 hands to `env.step`."""

    def log_prob(self, policy: ActorCriticPolicy, outputs: Tensor, actions: Tensor) -> Tensor:
        """Log-probability of an action a row, shape (N,), by the policy's own distribution."""
        distribution: Any = policy.action_dist
        return distribution.proba_distribution(action_logits=outputs).log_prob(actions)

    def likelihood(self, policy: ActorCriticPolicy, outputs: Tensor, actions: Tensor) -> Likelihood | None:
        """Log-probabilities of actions, and entropies, with their derivatives; None where these are not written down.

        Args:
            policy: whose distribution it is, without masks.
            outputs: shape (N, O).
            actions: as a roll-out buffer of SB3 gives them, a row a state.
        """
        return None

    @abstractmethod
    def metric(
        self,
        sizes: tuple[int, ...],
        tempering: float,
        *,
        valid: Tensor | None = None,
        log_std: Tensor | None = None,
        reference_log_std: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> OutputMetric:
        """The metric of KL(reference || policy) in the outputs.

        Args:
            sizes: as of `sizes`.
            tempering: share of the uniform distribution mixed into the Hessian of softmax policies.
            valid: valid actions of each state, (N, O) bool; None where all are.
            log_std, reference_log_std: current and reference log standard deviations, (O,) or (N, O).
            weights: weight of each state in a mean, with mean 1, (N,); None for ones.
        """


class Categories(ActionDistribution):
    """One choice: Discrete actions."""

    family = "categorical"
    kinds: ClassVar[tuple[type, ...]] = (CategoricalDistribution, MaskableCategoricalDistribution)
    space: ClassVar[type[spaces.Space]] = spaces.Discrete
    takes_masks = True

    def sizes(self, space: Any) -> tuple[int, ...]:
        """One part."""
        return (int(space.n),)

    def sample(self, policy: ActorCriticPolicy, outputs: Tensor, generator: torch.Generator) -> np.ndarray:
        """Actions, (N,); see `ActionDistribution`."""
        return self._draw(policy, outputs, generator)[:, 0]

    def likelihood(self, policy: ActorCriticPolicy, outputs: Tensor, actions: Tensor) -> Likelihood:
        """See `ActionDistribution`; actions are (N, choices)."""
        sizes = self.sizes(policy.action_space)
        return CategoricalLikelihood(outputs, actions.view(len(outputs), len(sizes)).long(), sizes)

    def metric(
        self,
        sizes: tuple[int, ...],
        tempering: float,
        *,
        valid: Tensor | None = None,
        log_std: Tensor | None = None,
        reference_log_std: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> OutputMetric:
        """See `ActionDistribution`."""
        return Categorical(sizes, tempering) if valid is None else MaskedCategorical(sizes, tempering, valid)

    def _draw(self, policy: ActorCriticPolicy, outputs: Tensor, generator: torch.Generator) -> np.ndarray:
        parts = outputs.float().cpu().split(list(self.sizes(policy.action_space)), 1)
        return torch.cat([torch.multinomial(part.softmax(1), 1, generator=generator) for part in parts], 1).numpy()


class SeveralCategories(Categories):
    """Several choices at once: MultiDiscrete actions."""

    family = "multi_categorical"
    kinds: ClassVar[tuple[type, ...]] = (MultiCategoricalDistribution, MaskableMultiCategoricalDistribution)
    space: ClassVar[type[spaces.Space]] = spaces.MultiDiscrete

    def sizes(self, space: Any) -> tuple[int, ...]:
        """A part for each choice."""
        return tuple(int(n) for n in space.nvec.flatten())

    def sample(self, policy: ActorCriticPolicy, outputs: Tensor, generator: torch.Generator) -> np.ndarray:
        """Actions, (N, A); see `ActionDistribution`."""
        return self._draw(policy, outputs, generator)


class Bits(ActionDistribution):
    """Independent bits: MultiBinary actions."""

    family = "bernoulli"
    kinds: ClassVar[tuple[type, ...]] = (BernoulliDistribution,)
    space: ClassVar[type[spaces.Space]] = spaces.MultiBinary

    def sizes(self, space: Any) -> tuple[int, ...]:
        """A logit for each bit."""
        return (1,) * int(np.prod(space.shape or ()))

    def sample(self, policy: ActorCriticPolicy, outputs: Tensor, generator: torch.Generator) -> np.ndarray:
        """Actions, (N, O); see `ActionDistribution`."""
        drawn = torch.bernoulli(outputs.float().cpu().sigmoid(), generator=generator).numpy()
        return drawn.astype(policy.action_space.dtype)

    def likelihood(self, policy: ActorCriticPolicy, outputs: Tensor, actions: Tensor) -> Likelihood:
        """See `ActionDistribution`; actions are (N, O)."""
        return BernoulliLikelihood(outputs, actions)

    def metric(
        self,
        sizes: tuple[int, ...],
        tempering: float,
        *,
        valid: Tensor | None = None,
        log_std: Tensor | None = None,
        reference_log_std: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> OutputMetric:
        """See `ActionDistribution`."""
        return Bernoulli(tempering)


class DiagonalGaussian(ActionDistribution):
    """A Gaussian with a state-independent standard deviation an entry: Box actions."""

    family = "gaussian"
    kinds: ClassVar[tuple[type, ...]] = (DiagGaussianDistribution,)
    space: ClassVar[type[spaces.Space]] = spaces.Box
    has_spread = True

    def sizes(self, space: Any) -> tuple[int, ...]:
        """A mean for each entry."""
        return (1,) * int(np.prod(space.shape or ()))

    def sample(self, policy: ActorCriticPolicy, outputs: Tensor, generator: torch.Generator) -> np.ndarray:
        """Actions, (N, ...) as the space has them, within its bounds; see `ActionDistribution`."""
        space: Any = policy.action_space
        outputs = outputs.float().cpu()
        noise = torch.randn(outputs.shape, generator=generator)
        actions = (outputs + policy.log_std.detach().cpu().exp() * noise).numpy()  # type: ignore[operator]
        return np.clip(actions.reshape(-1, *space.shape), space.low, space.high)

    def log_prob(self, policy: ActorCriticPolicy, outputs: Tensor, actions: Tensor) -> Tensor:
        """Log density, (N,); see `ActionDistribution`."""
        distribution: Any = policy.action_dist
        return distribution.proba_distribution(outputs, policy.log_std).log_prob(actions)

    def likelihood(self, policy: ActorCriticPolicy, outputs: Tensor, actions: Tensor) -> Likelihood:
        """See `ActionDistribution`; actions are (N, O)."""
        return GaussianLikelihood(outputs, actions, policy.log_std.detach())  # type: ignore[operator]

    def metric(
        self,
        sizes: tuple[int, ...],
        tempering: float,
        *,
        valid: Tensor | None = None,
        log_std: Tensor | None = None,
        reference_log_std: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> OutputMetric:
        """See `ActionDistribution`."""
        assert log_std is not None and reference_log_std is not None
        if reference_log_std.ndim == 1 and weights is None:
            return Gaussian(log_std, reference_log_std)
        return StatewiseGaussian(log_std, reference_log_std, weights)


class StateDependentGaussian(ActionDistribution):
    """A Gaussian whose standard deviation depends on the state: Box actions under gSDE.

    The noise of gSDE is a random linear map of the last hidden layer (Raffin et al. 2021, Smooth Exploration for
    Robotic Reinforcement Learning). At a state that is a Gaussian of known standard deviation, an output like the mean:
    its KL is exact, and what it owes to the hidden layer is differentiated as well, though SB3 updates it otherwise.
    """

    family = "state_dependent"
    kinds: ClassVar[tuple[type, ...]] = (StateDependentNoiseDistribution,)
    space: ClassVar[type[spaces.Space]] = spaces.Box

    def sizes(self, space: Any) -> tuple[int, ...]:
        """A mean and a log standard deviation for each entry."""
        return (1,) * (2 * int(np.prod(space.shape or ())))

    def sample(self, policy: ActorCriticPolicy, outputs: Tensor, generator: torch.Generator) -> np.ndarray:
        """See `ActionDistribution`, shape (N, ...); the noise of each step is drawn by itself."""
        space: Any = policy.action_space
        mean, log_std = outputs.float().cpu().chunk(2, 1)
        actions = (mean + log_std.exp() * torch.randn(mean.shape, generator=generator)).numpy()
        return np.clip(actions.reshape(-1, *space.shape), space.low, space.high)

    def log_prob(self, policy: ActorCriticPolicy, outputs: Tensor, actions: Tensor) -> Tensor:
        """See `ActionDistribution`: shape (N,)."""
        mean, log_std = outputs.chunk(2, 1)
        return torch.distributions.Normal(mean, log_std.exp()).log_prob(actions).sum(1)

    def metric(
        self,
        sizes: tuple[int, ...],
        tempering: float,
        *,
        valid: Tensor | None = None,
        log_std: Tensor | None = None,
        reference_log_std: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> OutputMetric:
        """See `ActionDistribution`."""
        return HeteroscedasticGaussian()


#: The action distributions that can be protected, by family.
DISTRIBUTIONS: dict[str, ActionDistribution] = {
    kind.family: kind() for kind in (Categories, SeveralCategories, Bits, DiagonalGaussian, StateDependentGaussian)
}

#: Why a distribution of SB3 is refused, and what to do instead.
REFUSED: dict[type, str] = {
    SquashedDiagGaussianDistribution: (
        "a tanh lies between its mean and the action, which nsrl does not model; train the agent with "
        "squash_output=False, as PPO and A2C do by default"
    ),
    MaskableBernoulliDistribution: (
        "masked MultiBinary actions have two logits each, not one; declare them as MultiDiscrete([2, 2, ...]), which "
        "is the same to MaskablePPO"
    ),
}


def distribution_of(policy: BasePolicy) -> ActionDistribution:
    """The action distribution of a policy.

    Raises:
        NsrlError: for a policy with memory, or a distribution that is none of `DISTRIBUTIONS` (a squashed Gaussian).
    """
    if hasattr(policy, "lstm_actor"):
        raise NsrlError(
            f"{type(policy).__name__} acts on its memory as well as on the observation, so the states of a buffer do "
            "not say what it does; only PPO, A2C, TRPO and MaskablePPO can be protected (stacked frames can stand in "
            "for memory)"
        )
    kind = type(getattr(policy, "action_dist", None))
    if getattr(getattr(policy, "action_dist", None), "bijector", None) is not None:
        kind = SquashedDiagGaussianDistribution  # gSDE can be squashed too
    for distribution in DISTRIBUTIONS.values():
        if kind in distribution.kinds:
            return distribution
    why = REFUSED.get(kind, "it is none of the distributions that SB3's on-policy algorithms make")
    raise NsrlError(f"policies with {kind.__name__} cannot be protected: {why}")


def distribution_for(space: spaces.Space | None) -> ActionDistribution | None:
    """The action distribution that SB3 takes for an action space; None for a space without one."""
    return next((found for found in DISTRIBUTIONS.values() if type(space) is found.space), None)


def described_distribution(model: OnPolicyAlgorithm) -> dict[str, Any]:
    """What makes a distribution of a model's outputs: the fields `family`, `log_std` and `nvec` of a buffer."""
    policy, distribution = model.policy, distribution_of(model.policy)
    spread = policy.log_std.detach().cpu().numpy().astype(np.float32) if distribution.has_spread else None
    return {"family": distribution.family, "log_std": spread, "nvec": choices_of(model.action_space)}


def choices_of(space: spaces.Space) -> tuple[int, ...] | None:
    """How many choices each of several actions has; None where there are not several."""
    return tuple(int(n) for n in space.nvec) if isinstance(space, spaces.MultiDiscrete) else None
