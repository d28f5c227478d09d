"""Watching old and new tasks during fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from time import perf_counter
from typing import Any

import gymnasium as gym
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from nsrl.errors import NsrlError
from nsrl.files import finite_json
from nsrl.projection.budget.model import Quadratic
from nsrl.projection.jacobians.factored import Jacobian
from nsrl.rl.agents.normalization import ObservationNormalizer
from nsrl.rl.algorithms.mixin import ProtectedMixin
from nsrl.rl.budget.engine import Retention
from nsrl.rl.playing.environments import Environments, check_apart, open_copies
from nsrl.rl.playing.evaluation import Returns, evaluate
from nsrl.rl.training.tensorboard import is_pending, lay_out, write_points

#: An environment (id, VecEnv, ...) and the frozen statistics through which the policy sees it.
Task = tuple[Environments, ObservationNormalizer | None]

#: Columns of SB3's printed table; longer keys are cut off, and two that are then equal raise an error.
TABLE_WIDTH = 36 - len("   ")
#: Buffer states on which the second-order prediction of an update is made.
PREDICTION_STATES = 64


class TaskEvaluation(BaseCallback):
    """Evaluates the new task and every old one at the start, every so many timesteps, and at the end.

    It acts between a policy update and the next rollout, so that its rows show parameters inside the budget,
    and hands TensorBoard what the update recorded at the step of that update. Learning is bit for bit the
    same with and without it. Put it before `Checkpoint` in the list of callbacks.

    Writes `eval/mean_reward` and `eval/mean_ep_length` (new task), `retain/<task>/return_mean`,
    `retain/kl_budget`, `nullspace/overhead_fraction`; and where the engine has not, `retain/kl_mean` and its
    kin, `nullspace/rank`, `rank_fraction`, `effective_dim` and `kl_predicted`.

    Args:
        new: the new task; None evaluates the old ones only.
        old: the old tasks by name.
        every: timesteps between evaluations; each happens at the first rollout boundary at or after its time.
        episodes, seed, n_envs, deterministic: as in `evaluate`; every evaluation plays the same episodes.
        history: rows of the run so far, when it is resumed.
        skip_end: asked at the end of training; true leaves the last evaluation out (after Ctrl-C).

    Attributes:
        history: one dict a row, plain JSON: `timesteps`, `old_returns` (by task), `new_return`, `kl_mean`,
            `kl_heldout`, `agreement` (None where nothing is protected or held out) and `seconds`, the wall
            time of the run without evaluations.
        latest: the `Returns` of the last evaluation, by task; the new task under None.
    """

    def __init__(
        self,
        new: Task | None,
        old: Mapping[str, Task] | None = None,
        *,
        every: int = 10_000,
        episodes: int = 20,
        seed: int = 10_000,
        n_envs: int = 20,
        deterministic: bool = True,
        history: Iterable[Mapping[str, Any]] = (),
        skip_end: Callable[[], bool] = lambda: False,
    ):
        super().__init__()
        if every < 1:
            raise NsrlError(f"every must be a number of timesteps >= 1, not {every}")
        self.tasks: dict[str | None, Task] = {}
        self.tasks.update(old or {})
        if new is not None:
            self.tasks[None] = new
        self.every = every
        self.settings = {"episodes": episodes, "seed": seed, "deterministic": deterministic}
        self.copies = min(n_envs, episodes)
        self.history: list[dict[str, Any]] = [dict(row) for row in history]
        self.latest: dict[str | None, Returns] = {}
        self.skip_end = skip_end
        self._opened: dict[str | None, list[gym.Env]] = {}
        self._forecast: tuple[Tensor, Quadratic[Jacobian]] | None = None

    @property
    def retention(self) -> Retention | None:
        """The engine of the model, None while nothing is protected."""
        return getattr(self.model, "retention", None)

    def _on_training_start(self) -> None:
        for name, (env, _) in self.tasks.items():
            check_apart(env, self.model, f"the environment that {name or 'the new task'} is evaluated in")
        self._started, self._evaluating = perf_counter(), 0.0
        self._seconds_before = self.history[-1]["seconds"] if self.history else 0.0
        self._opened = {
            name: open_copies(env, self.copies) for name, (env, _) in self.tasks.items() if isinstance(env, str)
        }
        lay_out(self.logger)
        # what a run wrote after the checkpoint that it is resumed from has not happened
        self.history = [row for row in self.history if row["timesteps"] <= self.model.num_timesteps]
        if not self.history:
            self._evaluate()
        write_points(self.logger, self.model.num_timesteps)

    def _on_rollout_start(self) -> None:
        if self._is_due():
            self._evaluate()
        write_points(self.logger, self.model.num_timesteps)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        # num_timesteps is already that of the boundary behind the coming update
        last = self.model.num_timesteps >= self.model._total_timesteps
        if self.retention is not None and (last or self._is_due()):
            constraint = self.retention.constraint
            model = constraint.linearise(constraint.train[:PREDICTION_STATES])
            self._forecast = (constraint.parameters.read(), model)

    def _on_training_end(self) -> None:
        if self.history[-1]["timesteps"] < self.model.num_timesteps and not self.skip_end():
            self._evaluate(final=True)
        write_points(self.logger, self.model.num_timesteps)
        for copies in self._opened.values():
            for env in copies:
                env.close()
        self._opened = {}
        if self.retention is None and self.logger.name_to_value:
            self.logger.dump(self.model.num_timesteps)  # a ProtectedMixin with a constraint dumps by itself

    def _is_due(self) -> bool:
        # on the grid of `every`, not `every` after the last row: rollout lengths would add up to a drift
        last = self.history[-1]["timesteps"]
        return self.model.num_timesteps >= (last // self.every + 1) * self.every

    def _evaluate(self, final: bool = False) -> None:
        start = perf_counter()
        for name, (env, normalizer) in self.tasks.items():
            played = self._opened.get(name, env)
            self.latest[name] = evaluate(self.model, played, normalizer=normalizer, **self.settings)  # type: ignore[arg-type]
        self._record_returns()
        if self.retention is not None:
            self._record_retention(self.retention)
            if not final:  # learn() of a ProtectedMixin records it itself when its clock has stopped
                self._record_overhead(self.retention, start - self._started)
        self.history.append(self._row(start - self._started - self._evaluating + self._seconds_before))
        spent = perf_counter() - start
        self._evaluating += spent
        if isinstance(self.model, ProtectedMixin):
            # learn() adds all of its wall time to this; evaluations are no part of learning
            self.model._learning_seconds -= spent

    def _row(self, seconds: float) -> dict[str, Any]:
        last = None if self.retention is None else self.retention.last
        new = self.latest.get(None)
        return {
            "timesteps": int(self.model.num_timesteps),
            "old_returns": {name: self.latest[name].mean for name in self.tasks if name is not None},
            "new_return": None if new is None else new.mean,
            "kl_mean": None if last is None else finite_json(last.kl_mean),
            "kl_heldout": None if last is None else finite_json(last.kl_heldout),
            "agreement": None if last is None else finite_json(last.agreement),
            "seconds": seconds,
        }

    def _record_returns(self) -> None:
        for name in self.tasks:
            if name is None:
                new = self.latest[None]
                self.logger.record("eval/mean_reward", new.mean)
                self.logger.record("eval/mean_ep_length", sum(new.lengths) / len(new.lengths))
            else:
                tag = f"{name}/return_mean"
                exclude = ("stdout", "log") if len(tag) > TABLE_WIDTH else None
                self.logger.record(f"retain/{tag}", self.latest[name].mean, exclude)

    def _record_retention(self, retention: Retention) -> None:
        size = sum(retention.constraint.parameters.sizes)
        values = {f"retain/{key}": getattr(retention.last, key) for key in ("kl_mean", "kl_max", "agreement")}
        if not math.isnan(retention.last.kl_heldout):
            values["retain/kl_heldout"] = retention.last.kl_heldout
        if not is_pending(self.logger, "nullspace/rank"):
            rank, dimension = retention.diagnose()
            values |= {"nullspace/rank": rank, "nullspace/rank_fraction": rank / size}
            values |= {"nullspace/effective_dim": dimension}
        if self._forecast is not None:
            before, model = self._forecast
            self._forecast = None
            displacement = retention.constraint.parameters.read() - before
            values["nullspace/kl_predicted"] = model.predict(displacement)
        for tag, value in values.items():
            if not is_pending(self.logger, tag):
                self.logger.record(tag, value)
        self.logger.record("retain/kl_budget", retention.config.kl_budget)

    def _record_overhead(self, retention: Retention, session: float) -> None:
        """`session`: seconds since learning began, with evaluations, whose time `_learning_seconds` is short of."""
        learning = self.model._learning_seconds + session  # type: ignore[attr-defined]
        if retention.updates and learning > 0.0:
            self.logger.record("nullspace/overhead_fraction", sum(retention.seconds.values()) / learning)
