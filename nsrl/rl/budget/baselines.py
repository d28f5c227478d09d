"""The honest rivals, through the same loop, buffer and callbacks: plain fine-tuning and the KL penalty."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor

from nsrl.errors import NsrlError, check_kind, check_number
from nsrl.rl.budget.config import RetentionConfig
from nsrl.rl.budget.engine import Retention
from nsrl.rl.retention.constraint import RetentionConstraint

METHODS = ("null_space", "kl_penalty", "finetune", "l2", "ewc", "der", "frozen", "agem", "gradient_only")
#: Those that take a coefficient.
PENALISED = ("kl_penalty", "l2", "ewc", "der")

#: Training states that the Fisher information of EWC is a mean over, at most: its diagonal changes little beyond.
FISHER_STATES = 512


class Monitor(Retention):
    """Plain fine-tuning, watched: measures the KL after every update and changes nothing."""

    @property
    def enforces(self) -> bool:
        """False: the budget is a line in the chart, not a promise."""
        return False

    def _before_step(self) -> None:
        if self._frozen:
            super()._before_step()
        else:
            self._shape_gradient()

    def _shape_gradient(self) -> None:
        """What a rival does to the gradient of a minibatch."""

    def _after_step(self) -> None:
        self._steps += 1

    def _linearise(self) -> None:
        pass

    def _enforce(self) -> tuple[int, int]:
        self._measure()
        return 0, 0


class KLPenalty(Monitor):
    """Adds coefficient * grad KL(pi_ref || pi) of a fresh buffer minibatch to every gradient.

    The same minibatches, and the same place behind PPO's gradient clipping, as the Lagrangian of `Retention`: the only
    differences are that the coefficient is fixed and that nothing is promised.
    """

    def __init__(
        self, model: OnPolicyAlgorithm, constraint: RetentionConstraint, config: RetentionConfig, coefficient: float
    ):
        super().__init__(model, constraint, config)
        self.coefficient = _checked(coefficient)

    def _shape_gradient(self) -> None:
        start = perf_counter()
        self.constraint.parameters.add_gradients(self._pull(), self.coefficient)
        self._coefficients.append(self.coefficient)
        self.seconds["lagrangian"] += perf_counter() - start

    def _pull(self) -> list[Tensor]:
        _, pull = self.constraint.probe(self.minibatches.draw(self.config.batch_states))
        return pull()


class OutputReplay(KLPenalty):
    """Adds coefficient * grad |z - z_ref|^2 / 2 of stored outputs z_ref: dark experience replay (Buzzega et al. 2020).

    What the paper does with a classifier's logits, on a fresh buffer minibatch a step.
    """

    def _pull(self) -> list[Tensor]:
        return self.constraint.output_errors(self.minibatches.draw(self.config.batch_states))


class Anchor(Monitor):
    """Adds coefficient * importance * (parameters - reference) to every gradient: L2 and EWC.

    Args:
        model, constraint, config: as for `Retention`.
        coefficient: of the quadratic penalty.
        importance: of each parameter: ones (L2), or the diagonal of the Fisher information of the buffer (EWC,
            Kirkpatrick et al. 2017); shape (P,).

    Raises:
        NsrlError: a negative coefficient.
    """

    def __init__(
        self,
        model: OnPolicyAlgorithm,
        constraint: RetentionConstraint,
        config: RetentionConfig,
        coefficient: float,
        importance: Tensor,
    ):
        super().__init__(model, constraint, config)
        self.coefficient = _checked(coefficient)
        self._importance = importance
        self._anchor = constraint.parameters.read()

    def _shape_gradient(self) -> None:
        start = perf_counter()
        flat = self.constraint.parameters
        pull = self._importance.to(self._anchor) * (flat.read() - self._anchor)
        pieces = [piece.view_as(p) for piece, p in zip(pull.split(flat.sizes), flat.parameters, strict=True)]
        flat.add_gradients(pieces, self.coefficient)
        self._coefficients.append(self.coefficient)
        self.seconds["lagrangian"] += perf_counter() - start


class AveragedGradient(Monitor):
    """Takes from every gradient the part that would raise the KL of a fresh buffer minibatch: A-GEM.

    Chaudhry et al. 2019, "Efficient lifelong learning with A-GEM": g - (g.r / r.r) r where g.r < 0, r the gradient of
    what is retained. At the reference itself r vanishes, and so does what it guards.
    """

    def _shape_gradient(self) -> None:
        start = perf_counter()
        flat = self.constraint.parameters
        _, retained = self.constraint.gradient(self.minibatches.draw(self.config.batch_states))
        gradient = flat.gradient()
        along, size = float(gradient @ retained), float(retained @ retained)
        if along < 0.0 < size:
            flat.set_gradient(gradient - along / size * retained)
        self.seconds["project"] += perf_counter() - start


class GradientProjection(Monitor):
    """Projects gradients, and nothing else, onto the null space of some linearised states: the trap.

    The optimizer's own step leaves the null space again: Adam divides what is left by its own root mean square.
    """

    def __init__(self, model: OnPolicyAlgorithm, constraint: RetentionConstraint, config: RetentionConfig):
        super().__init__(model, constraint, replace(config, gradient="projected", projection="none"))

    def _linearise(self) -> None:
        Retention._linearise(self)

    def _shape_gradient(self) -> None:
        Retention._before_step(self)


class FrozenTrunk(Monitor):
    """Only the actor's last layer learns, and its spread."""

    def _shape_gradient(self) -> None:
        top: Any = self.model.policy.action_net
        kept = {*top.parameters(), getattr(self.model.policy, "log_std", None)}
        for parameter in self.constraint.parameters.parameters:
            if parameter not in kept:
                parameter.grad = None


def fisher_diagonal(constraint: RetentionConstraint) -> Tensor:
    """Diagonal of the Fisher information of the policy on training states of the buffer, shape (P,)."""
    return constraint.linearise(constraint.train[:FISHER_STATES]).jacobian.column_squares()  # type: ignore[attr-defined]


def _checked(coefficient: float) -> float:
    check_number("penalty", coefficient)
    if not coefficient >= 0.0:
        raise NsrlError(f"penalty must be a coefficient >= 0, not {coefficient}")
    return coefficient


def build_engine(
    model: OnPolicyAlgorithm,
    constraint: RetentionConstraint,
    config: RetentionConfig,
    method: str = "null_space",
    penalty: float = 1.0,
) -> Retention:
    """The engine of a method by name, one of `METHODS`; `penalty` is the coefficient of those that have one.

    Raises:
        NsrlError: there is no such method.
    """
    _checked(penalty)
    check_kind("method", method, str, f"one of {', '.join(METHODS)}")
    if method not in METHODS:
        raise NsrlError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if method == "kl_penalty":
        return KLPenalty(model, constraint, config, penalty)
    if method == "der":
        return OutputReplay(model, constraint, config, penalty)
    if method in ("l2", "ewc"):
        importance = fisher_diagonal(constraint) if method == "ewc" else torch.ones_like(constraint.parameters.read())
        return Anchor(model, constraint, config, penalty, importance)
    kinds = {"frozen": FrozenTrunk, "agem": AveragedGradient, "gradient_only": GradientProjection}
    if method in kinds:
        return kinds[method](model, constraint, config)
    return (Retention if method == "null_space" else Monitor)(model, constraint, config)
