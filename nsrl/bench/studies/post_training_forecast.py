"""The forecast for language models held against what happens: fine-tunings of the tiny model, and the calibration."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from nsrl.bench.studies.post_training import EPOCHS, begin
from nsrl.bench.studies.post_training_tasks import TASKS, Task, World
from nsrl.editing.post_training.forecast import Calibration, forecast_cost
from nsrl.editing.post_training.preserved import Preserved
from nsrl.runs.machine import describe_environment

RATES, STEPS, SEEDS = (2e-4, 1e-3), (4, 16), (0, 1)
#: Batches of the new data that a forecast is made of.
BATCHES = 6


def measure_forecast(quick: bool = False, told: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Three tasks, two rates, two lengths, two seeds: 24 fine-tunings, with what was forecast of them.

    Args:
        quick: a model that knows little, whose numbers mean nothing.
        told: how far it is.
    """
    start = begin(0, 2 if quick else EPOCHS)
    preserved = [part[:, :-1] for part in start.preserved]
    rows: list[dict[str, Any]] = []
    for name, task in TASKS.items():
        for rate in RATES:
            for steps in STEPS:
                forecast = forecast_cost(
                    start.model,
                    preserved[:3],
                    range(BATCHES),
                    _loss(task, start.world),
                    learning_rate=rate,
                    steps=steps,
                )
                for seed in SEEDS:
                    kl = _finetuned(start.model, task, start.world, preserved[:3], rate, steps, seed)
                    rows.append(
                        {"task": name, "rate": rate, "steps": steps, "seed": seed, "kl": kl, **_columns(forecast)}
                    )
                    told(f"{name}, rate {rate:g}, {steps} steps: forecast {forecast.kl:.3g}, measured {kl:.3g} nats")
    fit = Calibration.fit([row["forecast"] for row in rows], [row["kl"] for row in rows])
    return {
        "command": "nsrl bench post_training_forecast",
        "runs": rows,
        "calibration": asdict(fit),
        "machine": describe_environment(),
    }


def _columns(forecast: Any) -> dict[str, float]:
    """A forecast as columns of a row."""
    return {
        "forecast": forecast.kl,
        "drift": forecast.kl_drift,
        "noise": forecast.kl_noise,
        "alignment": forecast.alignment,
    }


def _loss(task: Task, world: World) -> Callable[[Any, int], torch.Tensor]:
    # Batches that no fine-tuning sees: the forecast knows the data, not the order.
    return lambda model, batch: task.loss(model, world, torch.Generator().manual_seed(1000 + batch))


def _finetuned(
    model: Any, task: Task, world: World, preserved: list[torch.Tensor], rate: float, steps: int, seed: int
) -> float:
    trained = copy.deepcopy(model)
    reference = Preserved(trained, preserved)
    optimizer = torch.optim.Adam(trained.parameters(), rate)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss(trained, world, generator).backward()
        optimizer.step()
    return reference.measure().kl_mean
