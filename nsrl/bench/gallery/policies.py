"""A CartPole agent that is trained on the spot, its buffer, and what the swapped task would do to it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO

from nsrl.analysis import (
    BehaviourSpectrum,
    ForecastStudy,
    ForgettingAttribution,
    collect_transitions,
    forecast,
    retained_behaviour,
)
from nsrl.analysis.study import OLD_TASK, SWAPPED, pretrained_cartpole
from nsrl.bench.gallery.figure import COLOURS, Plate, label, panels
from nsrl.rl.algorithms.ppo import NullSpacePPO
from nsrl.rl.playing.environments import make_envs
from nsrl.rl.retention.buffer import RetentionBuffer

MARKERS = "os^vDPX*"
#: The new task's settings.
SETTINGS = {"n_steps": 256, "batch_size": 64, "n_epochs": 5, "learning_rate": 1e-3}


@lru_cache(maxsize=1)
def pretrained(steps: int) -> tuple[PPO, RetentionBuffer]:
    """An agent and its buffer."""
    agent = pretrained_cartpole(steps)
    return agent, RetentionBuffer.collect(agent, OLD_TASK, n_states=512 if steps > 5000 else 64, seed=0)


def _finetuner(quick: bool, method: str = "finetune") -> NullSpacePPO:
    agent, buffer = pretrained(2000 if quick else 40_000)
    return NullSpacePPO.from_pretrained(
        agent,
        make_envs(SWAPPED, 4, seed=1),
        retain=buffer,
        method=method,
        kl_budget=1e-3,
        seed=1,
        **SETTINGS,  # type: ignore[arg-type]
    )


def policy_spectrum(quick: bool) -> Plate:
    """Spectrum and effective dimension."""
    agent, buffer = pretrained(2000 if quick else 40_000)
    figure, (left, right) = panels(2, 5.0)
    numbers: dict[str, Any] = {}
    budgets = np.logspace(-5, 0, 30)
    for states, colour in zip((8, 64) if quick else (16, 64, 256), COLOURS, strict=False):
        found = retained_behaviour(agent, buffer, states=states)
        values = found.spectrum.values[: found.spectrum.rank]
        left.loglog(range(1, len(values) + 1), values, ".-", color=colour, markersize=3, label=f"{states} states")
        right.semilogx(
            budgets, [found.effective_dimension(b, 0.3) for b in budgets], color=colour, label=f"{states} states"
        )
        numbers[f"{states} states"] = {
            "rank": found.spectrum.rank,
            "parameters": found.parameters,
            "effective_dimension_0.01": found.effective_dimension(0.01, 0.3),
        }
    label(left, "index", "eigenvalue of J Jᵀ", f"{found.parameters} actor parameters", legend=True)
    label(right, "KL budget, nats a state", "effective dimension", "steps of norm 0.3", legend=True)
    return Plate(figure, numbers)


def spectrum_plate(found: BehaviourSpectrum) -> Plate:
    """The spectrum of one behaviour."""
    figure, (axis,) = panels(1, 5.0)
    values = found.spectrum.values[: found.spectrum.rank]
    axis.loglog(range(1, len(values) + 1), values, ".-", color=COLOURS[0], label=f"{found.states} states")
    label(axis, "index", "eigenvalue of J Jᵀ", f"rank {found.spectrum.rank} of {found.parameters} parameters", True)
    return Plate(figure)


def study_plate(study: ForecastStudy) -> Plate:
    """Forecast against outcome after one update and after all; colours are learning rates, markers tasks."""
    figure, axes = panels(2, 5.4, 4.6)
    horizons = {"first_update": study.first_update, "whole_run": study.whole_run}
    rates, tasks = (list(dict.fromkeys(row[key] for row in study.rows)) for key in ("learning_rate", "task"))
    for axis, (name, found) in zip(axes, horizons.items(), strict=True):
        for row in study.rows:
            axis.loglog(
                row[name]["forecast_kl"],
                row[name]["measured_kl"],
                MARKERS[tasks.index(row["task"])],
                color=COLOURS[rates.index(row["learning_rate"]) % len(COLOURS)],
                markersize=5,
            )
        ends = [min(axis.get_xlim()[0], axis.get_ylim()[0]), max(axis.get_xlim()[1], axis.get_ylim()[1])]
        axis.loglog(ends, ends, ":", color="0.5", label="equal")
        ranks = [
            f"{name} {value:.2f}"
            for name, value in (
                ("rank correlation", found.forecast.spearman),
                ("at equal settings", found.forecast.partial),
            )
            if value is not None
        ]
        title = f"{name.replace('_', ' ')}, {len(study.rows)} runs" + ("\n" + ", ".join(ranks) if ranks else "")
        label(axis, "forecast KL on the buffer, nats a state", "measured KL, nats a state", title)
    for rate, colour in zip(rates, COLOURS, strict=False):
        axes[0].plot([], [], "o", color=colour, label=f"learning rate {rate:g}")
    for task, marker in zip(tasks, MARKERS, strict=False):
        axes[1].plot([], [], marker, color="0.4", label=task)
    axes[0].legend(fontsize=8, frameon=False, loc="upper left")
    axes[1].legend(fontsize=7, frameon=False, loc="upper left")
    return Plate(figure)


def plasticity(quick: bool) -> Plate:
    """Surviving share against retained states and against the budget."""
    model = _finetuner(quick)
    assert model.retention is not None
    constraint, transitions = model.retention.constraint, collect_transitions(model)
    options = {"learning_rate": 1e-3, "updates": 80}
    counts = [1, 4, 16] if quick else [1, 2, 4, 8, 16, 32, 64, 128, 256]
    shares = [forecast(constraint, transitions, states=n, **options).surviving for n in counts]  # type: ignore[arg-type]
    budgets = [1e-4, 1e-2] if quick else np.logspace(-5, 0, 11).tolist()
    kept = [forecast(constraint, transitions, kl_budget=b, **options).surviving_budget for b in budgets]  # type: ignore[arg-type]
    figure, (left, right) = panels(2, 5.0)
    left.semilogx(counts, shares, "o-", color=COLOURS[0], label="policy gradient")
    label(left, "retained states linearised", "share left by the hard null space", legend=True)
    right.semilogx(budgets, [k or 0.0 for k in kept], "o-", color=COLOURS[1], label="80 Adam updates, forecast")
    label(right, "KL budget, nats a state", "share of the displacement kept", legend=True)
    for axis in (left, right):
        axis.set_ylim(0, 1.05)
    return Plate(figure, {"states": counts, "surviving": shares, "budgets": budgets, "kept": kept})


def forgetting(quick: bool) -> Plate:
    """Attribution of one update, without and with a budget."""
    figure, axes = panels(3, 4.8)
    numbers: dict[str, Any] = {}
    _, buffer = pretrained(2000 if quick else 40_000)
    for axis, (method, name) in zip(axes, (("finetune", "plain PPO"), ("null_space", "NullSpacePPO")), strict=False):
        model = _finetuner(quick, method)
        watch = ForgettingAttribution(buffer, states=8 if quick else 16, memory=1 if quick else 32)
        model.learn(256 * 4, callback=watch)
        (update,) = watch.updates
        order = update.kl.argsort(descending=True)
        given = update.contributions.double().sum(1)[order]
        axis.bar(range(len(order)), given, color=COLOURS[0], label="transitions")
        axis.bar(range(len(order)), update.rest[order], color=COLOURS[1], alpha=0.7, width=0.5, label="rest")
        axis.plot(update.kl[order], "k.", label="measured change")
        label(axis, "retained state, by change", "change of KL, nats", name)
        numbers[name] = {
            "kl": float(update.kl.mean()),
            "by_transitions": float(given.mean()),
            "rest": float(update.rest.mean()),
            "certificate": float(update.path.certificate.max()),
        }
        if method == "finetune":
            effect = update.contributions[order[0]]
            ranked = effect.abs().sort(descending=True).values
            axes[2].plot(
                np.arange(1, len(ranked) + 1) / len(ranked),
                ranked.cumsum(0) / ranked.sum(),
                color=COLOURS[2],
                label="most moved state",
            )
            axes[2].plot([0, 1], [0, 1], ":", color="0.5", label="all alike")
            half = int(torch.searchsorted(ranked.cumsum(0), ranked.sum() / 2)) + 1
            numbers["share_of_transitions_behind_half"] = half / len(ranked)
    label(axes[2], "share of the new task's transitions", "share of the effect", "plain PPO", legend=True)
    low, high = (pick(axis.get_ylim()[end] for axis in axes[:2]) for end, pick in ((0, min), (1, max)))
    for axis in axes[:2]:
        axis.set_ylim(low, high + 0.35 * (high - low))  # room for the legend above the bars
    axes[0].legend(fontsize=8, frameon=False, loc="upper right")
    return Plate(figure, numbers)
