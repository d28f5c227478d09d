"""NullSpaceTRPO: natural-gradient steps inside two trust regions, the rollout's and the retention budget's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sb3_contrib import TRPO
from stable_baselines3 import A2C
from stable_baselines3.common.utils import explained_variance
from torch import nn

from nsrl.errors import NsrlError
from nsrl.projection.budget.natural_gradient import LocalModel, Step
from nsrl.rl.agents.agent import Agent
from nsrl.rl.agents.stock_models import hyperparameters
from nsrl.rl.algorithms.mixin import ProtectedMixin
from nsrl.rl.algorithms.options import without_optimizer
from nsrl.rl.algorithms.surrogate import Surrogate
from nsrl.rl.algorithms.value_fit import fit_values
from nsrl.rl.budget.config import RetentionConfig
from nsrl.rl.budget.engine import Retention
from nsrl.rl.budget.trust_region import PenalisedRegion, RetentionRegion, build_region
from nsrl.rl.policies.actor_critic import Observation, reached_at_any, select
from nsrl.rl.policies.distributions import distribution_of
from nsrl.rl.retention.constraint import RetentionConstraint

#: A step that measures too long is shortened to this share of the length that a quadratic KL would allow,
FITTING = 0.98
#: but at once to no less than this share of itself.
SHORTEST = 0.1


@dataclass(frozen=True)
class Update:
    """What one policy update did.

    Attributes:
        step: the step that was proposed.
        objective: the surrogate where the policy is now.
        kl: measured KL(pi_old || pi) on the rollout, nats a state; 0 when no step was made.
        length: share of the proposed step that was made; 0 for none.
    """

    step: Step
    objective: float
    kl: float
    length: float


class NaturalTRPO(TRPO):
    """Trust-region policy optimisation (Schulman et al. 2015), as `sb3_contrib.TRPO` with the following put right.

    * Products with the Fisher information go through the policy's outputs, with the analytic Fisher information of the
      action distribution: exactly positive semi-definite, and two passes through the network each. Upstream
      differentiates a KL divergence twice, with two backward passes for every parameter tensor first.
    * The KL divergence is KL(pi_old || pi) of the joint action, summed over the dimensions of Box actions. Upstream
      averages over them: its `target_kl` and `cg_damping`, times their number, are ours for the same step.
    * Conjugate gradients start at zero, stop at a relative residual, which is logged (`train/cg_residual`), and at
      curvature that is not positive. Upstream starts at random, which leaves any subspace and draws on the global
      generator, and stops at an absolute residual that gradients of another scale never, or always, meet.
    * They are preconditioned by Kronecker factors of the Fisher information (Martens & Grosse 2015) where the moved
      part of the network is a chain of linear layers, and then need a fraction of the iterations; `train/cg_residual`
      is relative in the preconditioner's norm. A direction that `cg_max_steps` cuts short is therefore another, nearer
      to the exact one, than upstream's.
    * The step reaches the edge of the trust region as the undamped Fisher information has it, and where that measures
      too long, it is shortened to fit. Upstream has the damped one, and leaves a fifth of the region unused.
    * The actor's parameters are those that its distribution depends on, by autograd. Upstream takes all without "value"
      in their name.
    * `sub_sampling_factor` thins out the states of the Fisher information alone (Schulman 2016, p. 40), not those of
      the gradient and of the line search.
    * Networks are evaluated as they act: batch normalisation and dropout in eval mode.

    Constructor, hyper-parameters, critic phase, logged tags and zips are upstream's.
    """

    def _setup_model(self) -> None:
        super()._setup_model()
        distribution_of(self.policy)
        self._check_ranges()

    def _check_ranges(self) -> None:
        for name in ("cg_max_steps", "n_critic_updates", "sub_sampling_factor"):
            if not getattr(self, name) >= 1:
                raise NsrlError(f"{name} must be a number >= 1, not {getattr(self, name)}")
        if not 0.0 < self.target_kl < math.inf:
            raise NsrlError(f"target_kl must be a finite number of nats > 0, not {self.target_kl}")
        if not 0.0 <= self.cg_damping < math.inf:
            raise NsrlError(f"cg_damping must be a finite number >= 0, not {self.cg_damping}")

    def train(self) -> None:
        """Update the policy by one natural-gradient step, then fit the value function."""
        self.policy.set_training_mode(False)
        self._update_learning_rate(self.policy.optimizer)
        samples: Any = next(iter(self.rollout_buffer.get(batch_size=None)))
        surrogate = Surrogate(self.policy, samples, self.normalize_advantage, self._held())
        self._record(self._improve(surrogate))
        actor = set(surrogate.parameters.parameters)
        others = {parameter for parameter in self.policy.parameters() if parameter.requires_grad} - actor
        reached = reached_at_any(
            self.policy,
            lambda rows: self.policy.predict_values(select(samples.observations, rows)),
            len(samples.returns),
            others,
        )
        loss = fit_values(
            self.policy,
            samples.observations,
            samples.returns,
            [p for p in reached if p not in actor],
            epochs=self.n_critic_updates,
            batch_size=self.batch_size,
        )
        self._n_updates += 1
        values, returns = self.rollout_buffer.values.flatten(), self.rollout_buffer.returns.flatten()
        self.logger.record("train/value_loss", loss)
        self.logger.record("train/explained_variance", explained_variance(values, returns))
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", self.policy.log_std.exp().mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _improve(self, surrogate: Surrogate) -> Update | None:
        """Take the longest step that improves the surrogate inside both trust regions, by backtracking."""
        before, gradient = surrogate.gradient()
        cost = self._cost()
        fisher = surrogate.fisher(self.sub_sampling_factor, self._broadening())
        local = LocalModel(fisher, gradient, self.target_kl, self.cg_damping, self.cg_max_steps)
        step = self._step(local, surrogate)
        start, length = surrogate.parameters.read(), 1.0
        for _ in range(self.line_search_max_iter):
            surrogate.parameters.write(start + length * step.displacement)
            outside = self._excess()
            objective, kl = surrogate.measure()
            if outside <= 1.0 and kl <= self.target_kl and objective - self._cost() > before - cost:
                return Update(step, objective, kl, length)
            length *= self._shrinkage(kl / self.target_kl, outside)
        surrogate.parameters.write(start)
        return Update(step, before, 0.0, 0.0)

    def _held(self) -> Sequence[nn.Parameter]:
        """Parameters that the policy's step has to move, whatever the rollout depends on."""
        return ()

    def _broadening(self) -> Observation | None:
        """States that belong to the trust region beside those of the rollout."""
        return None

    def _step(self, local: LocalModel, surrogate: Surrogate) -> Step:
        return local.step()

    def _shrinkage(self, rollout: float, other: float) -> float:
        """What the length of a step is multiplied by, given measured over allowed KL on the rollout and elsewhere."""
        factors = [self.line_search_shrinking_factor] if other > 1.0 or rollout <= 1.0 else []
        factors += [FITTING / math.sqrt(excess) for excess in (rollout, other) if excess > 1.0]
        return max(min(factors, default=0.0), SHORTEST)  # none where a KL is NaN

    def _excess(self) -> float:
        """Measured over allowed KL, apart from the rollout's."""
        return 0.0

    def _cost(self) -> float:
        """What the surrogate has to make up for."""
        return 0.0

    def _record(self, update: Update | None) -> None:
        if update is None:
            return
        self.logger.record("train/policy_objective", update.objective)
        self.logger.record("train/kl_divergence_loss", update.kl)
        self.logger.record("train/is_line_search_success", float(update.length > 0.0))
        self.logger.record("train/step_length", update.length)
        self.logger.record("train/cg_residual", update.step.residual)
        self.logger.record("train/cg_iterations", update.step.iterations)


class NullSpaceTRPO(ProtectedMixin, NaturalTRPO):
    """Trust-region policy optimisation under a retention constraint.

    Every update minimises the linearised surrogate inside two trust regions, KL(pi_old || pi) <= target_kl on the
    rollout and the retention budget's second-order model on the buffer (`nsrl.projection.budget.two_regions`), then
    backtracks: a point is taken only if the surrogate improves, the measured KL on the rollout and that on the whole
    buffer are within their bounds. With `kl_budget=0` the step lies in the null space of the buffer's Jacobian. Without
    a buffer it is `NaturalTRPO`: stock TRPO, corrected and several times faster an update.

        model = NullSpaceTRPO.from_pretrained("expert.zip", env=new_env, retain=buffer, kl_budget=0.01)
        model.learn(600_000, progress_bar=True)
        print(model.retention_report())
        model.export("finetuned.zip")          # a stock zip: sb3_contrib.TRPO.load just works

    `from_pretrained` takes a TRPO agent's hyper-parameters; of a PPO or A2C agent the discounts and, of PPO, the length
    of a rollout: learning rate and minibatches there are those of the policy's loss, here the critic's. The gradient
    that method="kl_penalty" adds is exact, on all training states.

    Saved zips are stock TRPO zips too, and `NullSpaceTRPO.load` reads stock ones; `NullSpacePPO` tells of those that
    were saved under a budget.
    """

    updates_in_eval_mode = True

    @classmethod
    def _inherited(cls, source: Agent, options: dict[str, Any]) -> dict[str, Any]:
        model = source.model
        inherited = {"policy_kwargs": model.policy_kwargs, **hyperparameters(model, cls)}
        if isinstance(model, A2C):
            inherited["policy_kwargs"] = without_optimizer(model.policy_kwargs)
        return {**inherited, **options}

    def _build_engine(
        self, constraint: RetentionConstraint, config: RetentionConfig, method: str, penalty: float
    ) -> Retention:
        return build_region(self, constraint, config, method, penalty)

    def _improve(self, surrogate: Surrogate) -> Update | None:
        engine = self.retention
        if engine is not None and engine.updates < engine.warmup:
            return None
        return super()._improve(surrogate)

    def _held(self) -> Sequence[nn.Parameter]:
        return () if self.retention is None else self.retention.constraint.parameters.parameters

    def _broadening(self) -> Observation | None:
        if self.retention is None:
            return None
        fade = self.retention.config.opening_fade
        left = 1.0 - (1.0 - self._current_progress_remaining) / fade if fade > 0.0 else 0.0
        return self.retention.opening.share_of_states(left)

    def _step(self, local: LocalModel, surrogate: Surrogate) -> Step:
        if isinstance(self.retention, RetentionRegion | PenalisedRegion):
            return self.retention.step(local, surrogate.parameters.parameters)
        return local.step()

    def _excess(self) -> float:
        return self.retention.excess() if isinstance(self.retention, RetentionRegion) else 0.0

    def _cost(self) -> float:
        return self.retention.cost() if isinstance(self.retention, PenalisedRegion) else 0.0
