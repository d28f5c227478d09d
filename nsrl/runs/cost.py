"""What a fine-tuning run will take, said before it starts: a trial of two updates, times as many as there will be.

The trial is the run's own code on environments and a model of its own, which it leaves behind; the opening, which comes
once, is left out of it and of the forecast.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from nsrl.errors import NsrlError
from nsrl.rl import agents
from nsrl.rl.agents.agent import Agent
from nsrl.rl.retention.buffer import RetentionBuffer
from nsrl.runs.collecting import obtain_buffer
from nsrl.runs.config import FinetuneConfig
from nsrl.runs.finetuning import build_model, new_task
from nsrl.runs.memory import observation_bytes
from nsrl.runs.report import duration
from nsrl.runs.tasks import resolve_tasks

#: Updates of a trial; the first one also allocates, and counts for memory only.
TRIED = 2


@dataclass(frozen=True)
class RunCost:
    """What a run needs.

    Attributes:
        updates: that it makes.
        rollout_seconds: of a roll-out: environments and policy.
        update_seconds: of what follows it: update, measurement, restoration.
        constraint_share: of all seconds, what keeping the budget takes.
        parameters: of the policy, those of its critic among them.
        policy_bytes: weights, gradients and both moments of Adam.
        rollout_bytes: of the roll-out buffer.
        retained_bytes: of the observations that are held.
        peak_bytes: most memory that this process has had, behind the trial.
    """

    updates: int
    rollout_seconds: float
    update_seconds: float
    constraint_share: float
    parameters: int
    policy_bytes: int
    rollout_bytes: int
    retained_bytes: int
    peak_bytes: int

    @property
    def seconds(self) -> float:
        """Of the whole run, without its opening and its evaluations."""
        return self.updates * (self.rollout_seconds + self.update_seconds)

    def __str__(self) -> str:
        each = self.rollout_seconds + self.update_seconds
        held = ", ".join(
            f"{size / 2**20:.1f} MiB {what}"
            for what, size in (
                ("policy and optimizer", self.policy_bytes),
                ("roll-out", self.rollout_bytes),
                ("retained states", self.retained_bytes),
            )
        )
        return (
            f"{self.updates:,} updates of {each:.2g} s ({self.rollout_seconds:.2g} s of it playing, "
            f"{100.0 * self.constraint_share:.0f} % for the budget): {duration(self.seconds)} besides opening and "
            f"evaluations; {self.parameters:,} parameters; {held}; {self.peak_bytes / 2**20:.0f} MiB in all"
        )


def forecast_run(config: FinetuneConfig, clock: Callable[[], float] = time.perf_counter) -> RunCost:
    """What a run with this configuration will take, by a trial; nothing is written.

    Args:
        config: of the run; its buffer is collected where it names none, as the run would.
        clock: seconds; the wall's unless told otherwise.

    Raises:
        NsrlError: as the run would.
    """
    if config.agent is None:
        raise NsrlError("no agent: set agent to an SB3 zip or a run folder, as `nsrl pretrain` makes one")
    tasks = resolve_tasks(config)
    agent = agents.load(config.agent, trust=config.trust)
    buffer = obtain_buffer(config, agent, tasks.old)
    model = trial_model(config, agent, buffer)
    stopwatch = _Stopwatch(clock)
    model.learn(TRIED * model.n_steps * model.n_envs, callback=stopwatch)
    rollout, update = stopwatch.last()
    space, count = model.observation_space, model.n_steps * model.n_envs
    parameters = sum(p.numel() for p in model.policy.parameters())
    each = observation_bytes(space)
    model.env.close()
    return RunCost(
        math.ceil(config.total_timesteps / count),
        rollout,
        update,
        model.retention_report().overhead_fraction,
        parameters,
        16 * parameters,
        count * (each + 24),
        len(buffer) * each,
        _peak_bytes(),
    )


def trial_model(config: FinetuneConfig, agent: Agent, buffer: RetentionBuffer) -> Any:
    """The model of a run, on environments of its own, without the opening before its first roll-out."""
    envs = new_task(config, agent, resolve_tasks(config).new)
    return build_model(replace(config, retention=replace(config.retention, opening="off")), agent, buffer, envs)


class _Stopwatch(BaseCallback):
    """When roll-outs begin and end."""

    def __init__(self, clock: Callable[[], float]):
        super().__init__()
        self._clock = clock
        self._begun: list[float] = []
        self._ended: list[float] = []

    def _on_rollout_start(self) -> None:
        self._begun.append(self._clock())

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._ended.append(self._clock())

    def _on_training_end(self) -> None:
        self._begun.append(self._clock())

    def last(self) -> tuple[float, float]:
        """Seconds of the last roll-out, and of the update behind it."""
        begin, following = self._begun[-2:]
        return self._ended[-1] - begin, following - self._ended[-1]


def _peak_bytes() -> int:
    """0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    # Linux counts in KiB, macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
