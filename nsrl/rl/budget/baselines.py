"""The honest rivals, through the same loop, buffer and callbacks: plain fine-tuning and the KL penalty."""

from __future__ import annotations

from time import perf_counter

from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from nsrl.errors import NsrlError
from nsrl.rl.budget.config import RetentionConfig
from nsrl.rl.budget.engine import Retention
from nsrl.rl.retention.constraint import RetentionConstraint

METHODS = ("null_space", "kl_penalty", "finetune")


class Monitor(Retention):
    """Plain fine-tuning, watched: measures the KL after every update and changes nothing."""

    @property
    def enforces(self) -> bool:
        """False: the budget is a line in the chart, not a promise."""
        return False

    def _before_step(self) -> None:
        if self._frozen:
            super()._before_step()

    def _after_step(self) -> None:
        self._steps += 1

    def _linearise(self) -> None:
        pass

    def _enforce(self) -> tuple[int, int]:
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
        if not coefficient >= 0.0:
            raise NsrlError(f"penalty must be a coefficient >= 0, not {coefficient}")
        self.coefficient = coefficient

    def _before_step(self) -> None:
        if self._frozen:
            super()._before_step()
            return
        start = perf_counter()
        _, pull = self.constraint.probe(self.minibatches.draw(self.config.batch_states))
        self.constraint.parameters.add_gradients(pull(), self.coefficient)
        self._coefficients.append(self.coefficient)
        self.seconds["lagrangian"] += perf_counter() - start


def build_engine(
    model: OnPolicyAlgorithm,
    constraint: RetentionConstraint,
    config: RetentionConfig,
    method: str = "null_space",
    penalty: float = 1.0,
) -> Retention:
    """The engine of a method by name: "null_space", "kl_penalty" or "finetune".

    Raises:
        NsrlError: there is no such method.
    """
    if method not in METHODS:
        raise NsrlError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if method == "kl_penalty":
        return KLPenalty(model, constraint, config, penalty)
    return (Retention if method == "null_space" else Monitor)(model, constraint, config)
