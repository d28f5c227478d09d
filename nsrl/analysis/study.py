"""Does the forecast come true? Many short fine-tuning runs, and the rank correlation between said and measured KL."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import gymnasium as gym
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from nsrl.analysis.forecast import Forecast, forecast
from nsrl.analysis.ranking import RankAgreement, rank_agreement
from nsrl.analysis.transitions import collect_transitions, transitions_of
from nsrl.errors import NsrlError
from nsrl.files import written_atomically
from nsrl.reading.documents import read_results
from nsrl.rl.algorithms.ppo import NullSpacePPO
from nsrl.rl.playing.environments import make_envs
from nsrl.rl.retention.buffer import RetentionBuffer
from nsrl.rl.retention.constraint import RetentionConstraint

OLD_TASK = "nsrl/CartPole-v0"
SWAPPED = "nsrl/CartPoleSwapped-v0"
#: New tasks: an environment id, and physical constants of the cart and pole that are changed in it. "same" is the old
#: task itself: there is nothing new to learn, and whatever moves is noise.
CARTPOLES: dict[str, tuple[str, dict[str, float]]] = {
    "same": (OLD_TASK, {}),
    "long_pole": (OLD_TASK, {"length": 2.0}),
    "heavy_pole": (OLD_TASK, {"masspole": 1.0}),
    "weak_motor": (OLD_TASK, {"force_mag": 3.0}),
    "strong_motor": (OLD_TASK, {"force_mag": 30.0}),
    "swapped": (SWAPPED, {}),
    "short_swapped": (SWAPPED, {"length": 0.25}),
    "heavy_swapped": (SWAPPED, {"masspole": 1.0, "force_mag": 20.0}),
}
#: Rollouts that the scout plays before a run.
SCOUTED = 4


@dataclass(frozen=True)
class Comparison:
    """A forecast and its rivals against the measured KL, at one horizon.

    Attributes:
        forecast: how well the cross-kernel ranks it.
        rivals: how well forecasts without a kernel do: the learning rate times the number of steps, and the length of
            the way in parameter space.
        within: rank correlations of the cross-kernel among the runs of equal learning rate and length, where task and
            seed alone differ.
    """

    forecast: RankAgreement
    rivals: dict[str, RankAgreement]
    within: dict[str, float | None]


@dataclass(frozen=True)
class ForecastStudy:
    """Forecast against outcome.

    Attributes:
        first_update: KL after the first policy update, forecast from the rollout that it learns from.
        whole_run: KL after the last, forecast from rollouts that another seed played before the run.
        rows: one a run: its settings, what was forecast and what was measured at both horizons.
    """

    first_update: Comparison
    whole_run: Comparison
    rows: tuple[dict[str, Any], ...]


def pretrained_cartpole(steps: int = 40_000, seed: int = 0) -> PPO:
    """An agent that knows `OLD_TASK`: a quarter of a minute's training at 40,000 steps."""
    envs = make_envs(OLD_TASK, 8, seed)
    return PPO(
        "MlpPolicy",
        envs,
        n_steps=64,
        batch_size=256,
        n_epochs=10,
        learning_rate=1e-3,
        gamma=0.98,
        gae_lambda=0.95,
        seed=seed,
        device="cpu",
    ).learn(steps)


def cartpole_variant(name: str, n_envs: int, seed: int) -> VecEnv:
    """Copies of one of `CARTPOLES`.

    Raises:
        NsrlError: unknown name.
    """
    if name not in CARTPOLES:
        raise NsrlError(f"there is no CartPole variant {name!r}; known: {', '.join(CARTPOLES)}")
    task, constants = CARTPOLES[name]

    def make() -> gym.Env:
        env = gym.make(task)
        physics: Any = env.unwrapped
        for key, value in constants.items():
            setattr(physics, key, value)
        physics.total_mass = physics.masspole + physics.masscart
        physics.polemass_length = physics.masspole * physics.length
        return env

    return make_vec_env(make, n_envs, seed=seed)


Run = tuple[str, float, int, int]


def planned_runs(
    tasks: Sequence[str], learning_rates: Sequence[float], timesteps: Sequence[int], seeds: Sequence[int]
) -> list[Run]:
    """Every combination, once.

    Raises:
        NsrlError: fewer than three runs, unknown tasks, bad numbers.
    """
    unknown = [task for task in tasks if task not in CARTPOLES]
    if unknown:
        raise NsrlError(f"there is no CartPole variant {', '.join(unknown)}; known: {', '.join(CARTPOLES)}")
    if min((*learning_rates, *timesteps), default=1) <= 0 or min(seeds, default=0) < 0:
        raise NsrlError("learning rates and timesteps must be positive, and seeds 0 or more")
    plan = list(dict.fromkeys(itertools.product(tasks, learning_rates, timesteps, seeds)))
    if len(plan) < 3:
        raise NsrlError(f"a rank correlation needs three or more runs, not {len(plan)}")
    return plan


def forecast_study(
    agent: Any,
    buffer: RetentionBuffer,
    out: str | Path,
    *,
    tasks: Sequence[str] = tuple(CARTPOLES),
    learning_rates: Sequence[float] = (1e-4, 3e-4, 1e-3),
    timesteps: Sequence[int] = (4096,),
    seeds: Sequence[int] = (2, 3),
    n_envs: int = 4,
    n_steps: int = 128,
    batch_size: int = 64,
    n_epochs: int = 5,
    again: bool = False,
    on_run: Callable[[int, int], Any] | None = None,
) -> ForecastStudy:
    """Forecast, then fine-tune plainly (no constraint), for every combination; writes `out` as JSON after every run.

    Both forecasts are made before what they are of: that of the first update behind its rollout, that of the run before
    its first step. A file of the same settings is taken up where it ends; rows that this call did not ask for stay in
    it, outside the correlations.

    Args:
        agent: the pretrained CartPole agent, as `NullSpacePPO.from_pretrained` takes it.
        buffer: its retention buffer.
        out: the JSON file.
        tasks: names of `CARTPOLES`.
        learning_rates, timesteps, seeds: of the runs.
        n_envs, n_steps, batch_size, n_epochs: PPO's.
        again: begin anew, whatever `out` holds.
        on_run: called with (runs done, runs altogether).

    Raises:
        NsrlError: fewer than three runs, unknown tasks, bad numbers, an unreadable agent or one of other spaces, or a
            file of other settings.
    """
    out = Path(out)
    plan = planned_runs(tasks, learning_rates, timesteps, seeds)
    ppo: dict[str, Any] = {"n_steps": n_steps, "batch_size": batch_size, "n_epochs": n_epochs}
    settings = {**ppo, "n_envs": n_envs, "buffer": buffer.digest()}
    rows = [] if again else _finished(out, settings)
    known = {_key(row) for row in rows}
    for done, (task, rate, steps, seed) in enumerate(plan, 1):
        if (task, rate, steps, seed) not in known:
            rows.append(_run(agent, buffer, task, rate, steps, seed, n_envs, ppo))
            _write(out, {"settings": settings, "rows": rows})
        if on_run is not None:
            on_run(done, len(plan))
    wanted = set(plan)
    study = _summarise([row for row in rows if _key(row) in wanted])
    others = [row for row in rows if _key(row) not in wanted]
    _write(
        out,
        {
            "settings": settings,
            **asdict(study),
            "rows": [*study.rows, *others],
            "seconds": round(sum(row["seconds"] for row in study.rows), 1),
        },
    )
    return study


class _FirstUpdate(BaseCallback):
    """Forecasts the first policy update behind its rollout, and measures the KL after it."""

    def __init__(self, **settings: Any):
        super().__init__()
        self._settings = settings
        self.said: Forecast | None = None
        self.measured = math.nan

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        if self.said is None:
            self.said = forecast(self._constraint, transitions_of(self.model), **self._settings)  # type: ignore[arg-type]

    def _on_rollout_start(self) -> None:
        if self.said is not None and math.isnan(self.measured):
            self.measured = self._constraint.measure().kl_mean

    def _on_training_end(self) -> None:
        self._on_rollout_start()  # a run of one rollout

    @property
    def _constraint(self) -> RetentionConstraint:
        return self.model.retention.constraint  # type: ignore[attr-defined]


def _run(
    agent: Any, buffer: RetentionBuffer, task: str, rate: float, steps: int, seed: int, n_envs: int, ppo: dict[str, Any]
) -> dict[str, Any]:
    def build(run_seed: int) -> NullSpacePPO:
        env = cartpole_variant(task, n_envs, run_seed)
        return NullSpacePPO.from_pretrained(
            agent, env, retain=buffer, method="finetune", learning_rate=rate, seed=run_seed, clip_range=0.2, **ppo
        )

    start = perf_counter()
    rollouts = -(-steps // (ppo["n_steps"] * n_envs))
    updates = ppo["n_epochs"] * (ppo["n_steps"] * n_envs // ppo["batch_size"])
    settings: dict[str, Any] = {"learning_rate": rate, "updates": updates, "batch_size": ppo["batch_size"]}
    scout, first = build(1000 + seed), _FirstUpdate(**settings)
    assert scout.retention is not None
    played = [collect_transitions(scout) for _ in range(SCOUTED)]
    said = forecast(scout.retention.constraint, played, rollouts=rollouts, **settings)
    model = build(seed)  # seeds what is drawn from now on: the run is what it would be without the forecasts
    model.learn(steps, callback=first)
    assert model.retention is not None and first.said is not None
    measured = model.retention.constraint.measure()
    return {
        "task": task,
        "learning_rate": rate,
        "timesteps": steps,
        "seed": seed,
        "updates": updates,
        "rollouts": rollouts,
        "first_update": {
            "forecast_kl": first.said.kl,
            "displacement": first.said.displacement,
            "alignment": first.said.alignment,
            "measured_kl": first.measured,
        },
        "whole_run": {
            "forecast_kl": said.kl,
            "forecast_drift": said.kl_drift,
            "displacement": said.displacement,
            "alignment": said.alignment,
            "surviving": said.surviving,
            "measured_kl": measured.kl_mean,
            "agreement": measured.agreement,
        },
        "seconds": round(perf_counter() - start, 2),
    }


def _summarise(rows: list[dict[str, Any]]) -> ForecastStudy:
    return ForecastStudy(_compare(rows, "first_update"), _compare(rows, "whole_run"), tuple(rows))


def _compare(rows: list[dict[str, Any]], horizon: str) -> Comparison:
    said, ways, measured = (
        [row[horizon][key] for row in rows] for key in ("forecast_kl", "displacement", "measured_kl")
    )
    groups = [f"learning rate {row['learning_rate']:g}, {row['timesteps']} steps" for row in rows]
    tasks = [row["task"] for row in rows]
    steps = [row["updates"] * (row["rollouts"] if horizon == "whole_run" else 1) for row in rows]
    rivals = {
        "learning rate x steps": [row["learning_rate"] * count for row, count in zip(rows, steps, strict=True)],
        "way in parameter space": ways,
    }
    within: dict[str, float | None] = {}
    for name in dict.fromkeys(groups):
        members = [index for index, group in enumerate(groups) if group == name]
        if len(members) > 2:
            pair = [said[i] for i in members], [measured[i] for i in members]
            within[name] = rank_agreement(*pair, groups=[name] * len(members), clusters=[name] * len(members)).spearman
    return Comparison(
        rank_agreement(said, measured, groups, tasks),
        {name: rank_agreement(rival, measured, groups, tasks) for name, rival in rivals.items()},
        within,
    )


def _key(row: dict[str, Any]) -> Run:
    return row["task"], row["learning_rate"], row["timesteps"], row["seed"]


def _finished(out: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an interrupted study of the same settings."""
    if not out.exists():
        return []
    try:
        content = read_results(out)
    except (OSError, ValueError) as error:
        raise NsrlError(f"{out} is not a study ({error}); remove it or choose another file") from error
    if content.get("settings") != settings:
        raise NsrlError(f"{out} holds a study of other settings or another agent; begin anew, or choose another file")
    return list(content["rows"])


def _write(path: Path, content: dict[str, Any]) -> None:
    with written_atomically(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
