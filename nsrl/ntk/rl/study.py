"""Does the forecast come true? Many short fine-tuning runs, and the rank correlation between said and measured KL."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from nsrl.errors import NsrlError
from nsrl.ntk.rl.forecast import forecast
from nsrl.ntk.rl.transitions import collect_transitions
from nsrl.rl.archive import written_atomically
from nsrl.rl.buffer import RetentionBuffer
from nsrl.rl.ppo import NullSpacePPO

OLD_TASK = "nsrl_envs:nsrl/CartPole-v0"
#: New tasks: an environment id, and physical constants of the cart and pole that are changed in it.
CARTPOLES: dict[str, tuple[str, dict[str, float]]] = {
    "swapped": ("nsrl_envs:nsrl/CartPoleSwapped-v0", {}),
    "long_pole": (OLD_TASK, {"length": 2.0}),
    "weak_motor": (OLD_TASK, {"force_mag": 3.0}),
    "heavy_swapped": ("nsrl_envs:nsrl/CartPoleSwapped-v0", {"masspole": 1.0, "force_mag": 20.0}),
}


@dataclass(frozen=True)
class ForecastStudy:
    """Forecast against outcome.

    Attributes:
        rows: one a run: task, learning_rate, timesteps, seed, forecast_kl (and its parts), measured_kl, surviving.
        spearman: rank correlation over all runs.
        p_value: of no correlation.
        within: rank correlations among the runs of equal learning rate and length, where task and seed alone differ.
        learning_rate_only: rank correlation of the learning rate times the length with the measured KL, the rival
            forecast that needs no kernel.
    """

    rows: tuple[dict[str, Any], ...]
    spearman: float
    p_value: float
    within: dict[str, float]
    learning_rate_only: float


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


def forecast_study(
    agent: Any, buffer: RetentionBuffer, out: str | Path, *, tasks: Sequence[str] = tuple(CARTPOLES),
    learning_rates: Sequence[float] = (1e-4, 3e-4, 1e-3), timesteps: Sequence[int] = (2048, 6144),
    seeds: Sequence[int] = (0,), n_envs: int = 4, n_steps: int = 128, batch_size: int = 64, n_epochs: int = 5,
    on_run: Callable[[int, int], Any] | None = None,
) -> ForecastStudy:  # fmt: skip
    """Forecast, then fine-tune plainly (no constraint), for every combination; writes `out` as JSON after every run.

    The forecast sees one rollout of another seed than the run's. A file of the same settings is taken up where it
    ends.

    Args:
        agent: the pretrained CartPole agent, as `NullSpacePPO.from_pretrained` takes it.
        buffer: its retention buffer.
        out: the JSON file.
        tasks: names of `CARTPOLES`.
        learning_rates, timesteps, seeds: of the runs.
        n_envs, n_steps, batch_size, n_epochs: PPO's.
        on_run: called with (runs done, runs altogether).

    Raises:
        NsrlError: fewer than three runs, unknown tasks, an unreadable agent.
    """
    out = Path(out)
    plan = list(itertools.product(tasks, learning_rates, timesteps, seeds))
    if len(plan) < 3:
        raise NsrlError(f"a rank correlation needs three or more runs, not {len(plan)}")
    ppo: dict[str, Any] = {"n_steps": n_steps, "batch_size": batch_size, "n_epochs": n_epochs}
    settings = {**ppo, "n_envs": n_envs, "buffer": buffer.digest()}
    rows = _finished(out, settings)
    known = {_key(row) for row in rows}
    for task, rate, steps, seed in plan:
        if (task, rate, steps, seed) not in known:
            rows.append(_run(agent, buffer, task, rate, steps, seed, n_envs, ppo))
            _write(out, {"settings": settings, "rows": rows})
        if on_run is not None:
            on_run(len(rows), len(plan))
    wanted = set(plan)
    study = _summarise([row for row in rows if _key(row) in wanted])
    _write(out, {"settings": settings, **asdict(study)})
    return study


def _run(agent: Any, buffer: RetentionBuffer, task: str, rate: float, steps: int, seed: int, n_envs: int,
         ppo: dict[str, Any]) -> dict[str, Any]:  # fmt: skip
    def build(run_seed: int) -> NullSpacePPO:
        env = cartpole_variant(task, n_envs, run_seed)
        return NullSpacePPO.from_pretrained(agent, env, retain=buffer, method="finetune", learning_rate=rate,
                                            seed=run_seed, clip_range=0.2, **ppo)  # fmt: skip

    scout = build(1000 + seed)
    assert scout.retention is not None
    rollouts = -(-steps // (ppo["n_steps"] * n_envs))
    updates = rollouts * ppo["n_epochs"] * (ppo["n_steps"] * n_envs // ppo["batch_size"])
    said = forecast(scout.retention.constraint, collect_transitions(scout), learning_rate=rate, updates=updates,
                    batch_size=ppo["batch_size"])  # fmt: skip
    model = build(seed)
    model.learn(steps)
    assert model.retention is not None
    measured = model.retention.constraint.measure()
    return {"task": task, "learning_rate": rate, "timesteps": steps, "seed": seed, "updates": updates,
            "forecast_kl": said.kl, "forecast_drift": said.kl_drift, "forecast_noise": said.kl_noise,
            "alignment": said.alignment, "surviving": said.surviving, "measured_kl": measured.kl_mean,
            "agreement": measured.agreement}  # fmt: skip


def _summarise(rows: list[dict[str, Any]]) -> ForecastStudy:
    from scipy.stats import spearmanr

    measured = [row["measured_kl"] for row in rows]
    overall = spearmanr([row["forecast_kl"] for row in rows], measured)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(f"{row['learning_rate']:g}, {row['timesteps']} steps", []).append(row)
    within = {
        name: float(spearmanr([row["forecast_kl"] for row in group], [row["measured_kl"] for row in group]).statistic)
        for name, group in groups.items()
        if len(group) > 2
    }
    rival = spearmanr([row["learning_rate"] * row["updates"] for row in rows], measured)
    return ForecastStudy(tuple(rows), float(overall.statistic), float(overall.pvalue), within, float(rival.statistic))


def _key(row: dict[str, Any]) -> tuple[str, float, int, int]:
    return row["task"], row["learning_rate"], row["timesteps"], row["seed"]


def _finished(out: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an interrupted study of the same settings."""
    if not out.is_file():
        return []
    try:
        content = json.loads(out.read_text(encoding="utf-8"))
    except ValueError as error:
        raise NsrlError(f"{out} is not JSON ({error}); remove it or choose another file") from error
    return list(content["rows"]) if content.get("settings") == settings else []


def _write(path: Path, content: dict[str, Any]) -> None:
    with written_atomically(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
