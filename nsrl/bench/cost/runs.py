"""What fine-tuning takes, forecast by `nsrl cost` and measured: processor time of committed agents on their new tasks.

nsrl bench run_cost
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nsrl.rl import agents
from nsrl.runs.collecting import collect_buffer
from nsrl.runs.config import BufferSettings, FinetuneConfig
from nsrl.runs.cost import forecast_run, trial_model
from nsrl.runs.hyperparameters import PPOOverrides, TRPOOverrides
from nsrl.runs.machine import describe_environment
from nsrl.runs.report import Table
from nsrl.runs.tasks import resolve_tasks

#: A committed agent of each pair.
AGENTS = {"cartpole_swapped": "default_0_x1.zip", "pendulum_reversed": "default_0_x1.zip"}
UPDATES, ENVS, STEPS = 20, 8, 128
#: The factor that a forecast is to be within.
WITHIN = 1.5


def plan_runs(folder: Path, quick: bool = False) -> list[FinetuneConfig]:
    """Every pair with both algorithms.

    Args:
        folder: of the committed agents.
        quick: CartPole's only.
    """
    return [
        FinetuneConfig(
            agent=str(folder / pair / agent),
            pair=pair,
            algorithm=algorithm,  # type: ignore[arg-type]
            states=BufferSettings(n_states=512),
            ppo=PPOOverrides(n_envs=ENVS, n_steps=STEPS) if algorithm == "ppo" else PPOOverrides(),
            trpo=TRPOOverrides(n_envs=ENVS, n_steps=STEPS) if algorithm == "trpo" else TRPOOverrides(),
            total_timesteps=UPDATES * ENVS * STEPS,
        )
        for pair, agent in AGENTS.items()
        for algorithm in ("ppo", "trpo")
        if not quick or pair == "cartpole_swapped"
    ]


def measure_runs(folder: Path, quick: bool = False, told: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Forecast and measured processor seconds of every run.

    Args:
        folder: of the committed agents.
        quick: CartPole's only, and three updates.
        told: how far it is.
    """
    rows = []
    for config in plan_runs(folder, quick):
        config = replace(config, total_timesteps=3 * ENVS * STEPS) if quick else config
        cost = forecast_run(config, time.process_time)
        agent = agents.load(str(config.agent))
        model = trial_model(config, agent, collect_buffer(config, agent, resolve_tasks(config).old))
        start = time.process_time()
        model.learn(config.total_timesteps)
        seconds = time.process_time() - start
        model.env.close()
        rows.append(
            {
                "pair": config.pair,
                "algorithm": config.algorithm,
                "updates": cost.updates,
                "forecast": cost.seconds,
                "measured": seconds,
                "ratio": cost.seconds / seconds,
                "parameters": cost.parameters,
                "peak_bytes": cost.peak_bytes,
            }
        )
        told(f"{config.pair}, {config.algorithm}: {cost.seconds:.1f} s forecast, {seconds:.1f} s measured")
    return {"command": "nsrl bench run_cost", "within": WITHIN, "rows": rows, "machine": describe_environment()}


def run_cost_table(content: dict[str, Any]) -> Table:
    """A line a run."""
    rows = tuple(
        (
            row["pair"],
            row["algorithm"],
            str(row["updates"]),
            f"{row['forecast']:.1f} s",
            f"{row['measured']:.1f} s",
            f"{row['ratio']:.2f}",
        )
        for row in content["rows"]
    )
    head = ("", "algorithm", "updates", "forecast", "measured", "ratio")
    return Table(head, rows, "processor time of fine-tuning without opening")
