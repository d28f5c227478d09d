"""The retention budget as the second trust region of a natural-gradient step, and the KL penalty in the same place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from time import perf_counter
from typing import Any

from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor, nn

from nsrl.errors import NsrlError
from nsrl.projection.budget.natural_gradient import LocalModel, Step
from nsrl.projection.budget.two_regions import Multipliers, retained_step
from nsrl.projection.jacobians.matrix_free import Embedding
from nsrl.reading.values import finite, mapping
from nsrl.rl.budget.baselines import Monitor, build_engine
from nsrl.rl.budget.config import RetentionConfig
from nsrl.rl.budget.engine import LEAST_STRIDE, Retention
from nsrl.rl.retention.constraint import RetentionConstraint

#: Settings that shape the many small steps of a first-order optimizer.
FIRST_ORDER = ("gradient", "projection", "project_every", "batch_states", "rate", "damping")


class RetentionRegion(Retention):
    """Keeps a natural-gradient algorithm's policy inside the budget.

    The budget shapes the one step of an update: its model on all training states is the step's second trust region, and
    the line search takes no point whose KL, measured on the whole buffer, is over it. Points that are over are restored
    first, since a step along a curved boundary always ends a little outside.

    Args:
        model, constraint, config: as for `Retention`.

    Raises:
        NsrlError: a setting that only a first-order optimizer has a use for.
    """

    def __init__(self, model: OnPolicyAlgorithm, constraint: RetentionConstraint, config: RetentionConfig):
        defaults = {field.name: field.default for field in fields(RetentionConfig)}
        odd = [name for name in FIRST_ORDER if getattr(config, name) != defaults[name]]
        if odd:
            raise NsrlError(
                f"{odd[0]} shapes the minibatch steps of a first-order optimizer, and NullSpaceTRPO makes one "
                "natural-gradient step an update; leave it out"
            )
        super().__init__(model, constraint, config)
        self._step: Step | None = None
        self._restorations = 0
        self._guess: Multipliers | None = None

    def state_dict(self) -> dict[str, Any]:
        """As the base class's, and the multipliers of the last step."""
        return {**super().state_dict(), "guess": None if self._guess is None else asdict(self._guess)}

    def check_state(self, state: Any) -> None:
        """As the base class's."""
        super().check_state(state)
        if state.get("guess") is not None:
            for key, value in mapping(state["guess"], "guess", ["scale", "multiplier"], ()).items():
                finite(value, key, 0.0)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As the base class's."""
        super().load_state_dict(state)
        guess = state.get("guess")  # checkpoints of older versions have none
        self._guess = None if guess is None else Multipliers(**guess)

    def begin(self) -> None:
        """Prepare one policy update."""
        super().begin()
        self._step, self._restorations = None, 0

    def length(self) -> float:
        """1: the step itself is made shorter."""
        return 1.0

    def step(self, local: LocalModel, moved: Sequence[nn.Parameter]) -> Step:
        """The step inside both trust regions; in the null space of a subset of the states for budget 0.

        Args:
            local: the rollout.
            moved: the parameters of its columns.
        """
        start = perf_counter()
        local = replace(local, radius=max(super().length(), LEAST_STRIDE) ** 2 * local.radius)
        embedding = Embedding.of(self.constraint.parameters.parameters, moved)
        if self._confinement is not None:
            self._step = replace(local, free=self._confinement.free(moved)).step()
        elif self._projector is not None:
            self._step = local.null_step(embedding.projector(self._projector.null))
        else:
            model = self.constraint.quadratic(self.constraint.train)
            quadratic = replace(model, jacobian=embedding.jacobian(model.jacobian))
            self._step = retained_step(local, quadratic, self.multiplier.target, guess=self._guess)
            self._guess = Multipliers(self._step.scale, self._step.multiplier)
            self._coefficients.append(self._step.multiplier)
        self.seconds["project"] += perf_counter() - start
        return self._step

    def excess(self) -> float:
        """Measured KL over the budget's, after restoration where there is need of it; above 1 it did not help."""
        start = perf_counter()
        if self._confinement is not None:
            self._confinement.settle()
        kl, restored = self._restore_inside(self.constraint.binding_divergence())
        self._restorations += restored
        self.seconds["restore"] += perf_counter() - start
        return kl / self.config.tolerance

    @property
    def _damping(self) -> float:
        """Damping of the budget's projection where the rollout says nothing and cg_damping alone is the metric."""
        if self._projector is not None:
            return 0.0
        multiplier = self._coefficients[-1] if self._coefficients else 0.0
        return float(self.model.cg_damping) / multiplier if multiplier > 0.0 else math.inf  # type: ignore[attr-defined]

    def _make_displacement(self, share: float) -> Tensor:
        """The step was confined when it was made, and what keeps the old task was part of what was measured."""
        return self.constraint.parameters.read() - self._feasible

    def _before_step(self) -> None:
        """The optimizer steps the critic only."""

    def _after_step(self) -> None:
        """As above."""

    def _scalars(self, kept: float, restored: int) -> dict[str, float]:
        scalars = super()._scalars(kept, restored + self._restorations)
        if self._step is not None:
            scalars["nullspace/update_kept"] = kept * self._step.kept
            if math.isfinite(self._step.retained):
                scalars["nullspace/kl_predicted"] = self._step.retained
        return scalars


class PenalisedRegion(Monitor):
    """The rival through the same loop: coefficient * KL(pi_ref || pi) on all training states joins the loss.

    Its gradient joins the gradient that the natural step is taken on, itself the loss that the line search compares.
    """

    def __init__(
        self, model: OnPolicyAlgorithm, constraint: RetentionConstraint, config: RetentionConfig, coefficient: float
    ):
        super().__init__(model, constraint, config)
        if not coefficient >= 0.0:
            raise NsrlError(f"penalty must be a coefficient >= 0, not {coefficient}")
        self.coefficient = coefficient

    def step(self, local: LocalModel, moved: Sequence[nn.Parameter]) -> Step:
        """The natural-gradient step of the penalised loss."""
        start = perf_counter()
        embedding = Embedding.of(self.constraint.parameters.parameters, moved)
        _, pull = self.constraint.gradient(self.constraint.train)
        gradient = local.gradient.clone()
        gradient[embedding.columns] += self.coefficient * pull
        self.seconds["lagrangian"] += perf_counter() - start
        return replace(local, gradient=gradient).step()

    def cost(self) -> float:
        """The penalty now."""
        return self.coefficient * self.constraint.divergences()[1]


def build_region(
    model: OnPolicyAlgorithm,
    constraint: RetentionConstraint,
    config: RetentionConfig,
    method: str = "null_space",
    penalty: float = 1.0,
) -> Retention:
    """The engine of a method by name, for a natural-gradient algorithm: as `nsrl.rl.budget.baselines.build_engine`.

    Raises:
        NsrlError: there is no such method, or it is one of minibatch steps.
    """
    if method == "null_space":
        return RetentionRegion(model, constraint, config)
    if method == "kl_penalty":
        return PenalisedRegion(model, constraint, config, penalty)
    if method in ("l2", "ewc", "der", "frozen", "agem", "gradient_only"):
        raise NsrlError(
            f"method {method!r} shapes the minibatch steps of a first-order optimizer, and NullSpaceTRPO makes one "
            "natural-gradient step an update; fine-tune with NullSpacePPO"
        )
    return build_engine(model, constraint, config, method)
