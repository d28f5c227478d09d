"""A CartPole agent that is trained on the spot, its buffer, and what the swapped task would do to it."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from nsrl.ntk.gallery.plate import COLOURS, Plate, label, panels
from nsrl.ntk.rl import (
    ForecastStudy,
    ForgettingAttribution,
    RetainedBehaviour,
    collect_transitions,
    forecast,
    retained_behaviour,
)
from nsrl.rl.buffer import RetentionBuffer
from nsrl.rl.ppo import NullSpacePPO

OLD, NEW = "nsrl_envs:nsrl/CartPole-v0", "nsrl_envs:nsrl/CartPoleSwapped-v0"
#: The new task's settings.
SETTINGS = {"n_steps": 256, "batch_size": 64, "n_epochs": 5, "learning_rate": 1e-3}


@lru_cache(maxsize=1)
def pretrained(steps: int) -> tuple[PPO, RetentionBuffer]:
    """An agent of a minute's training and its buffer."""
    envs = make_vec_env(OLD, 8, seed=0)
    agent = PPO("MlpPolicy", envs, n_steps=64, batch_size=256, n_epochs=10, learning_rate=1e-3, gamma=0.98,
                gae_lambda=0.95, seed=0, device="cpu")  # fmt: skip
    agent.learn(steps)
    return agent, RetentionBuffer.collect(agent, OLD, n_states=512 if steps > 5000 else 64, seed=0)


def _finetuner(quick: bool, method: str = "finetune") -> NullSpacePPO:
    agent, buffer = pretrained(2000 if quick else 40_000)
    return NullSpacePPO.from_pretrained(agent, make_vec_env(NEW, 4, seed=1), retain=buffer, method=method,
                                        kl_budget=1e-3, seed=1, **SETTINGS)  # type: ignore[arg-type]  # fmt: skip


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
        right.semilogx(budgets, [found.effective_dimension(b, 0.3) for b in budgets], color=colour,
                       label=f"{states} states")  # fmt: skip
        numbers[f"{states} states"] = {"rank": found.spectrum.rank, "parameters": found.parameters,
                                       "effective_dimension_0.01": found.effective_dimension(0.01, 0.3)}  # fmt: skip
    label(left, "index", "eigenvalue of J Jᵀ", f"{found.parameters} actor parameters", legend=True)
    label(right, "KL budget, nats a state", "effective dimension", "steps of norm 0.3", legend=True)
    return Plate(figure, numbers)


def spectrum_plate(found: RetainedBehaviour) -> Plate:
    """The spectrum of one behaviour."""
    figure, (axis,) = panels(1, 5.0)
    values = found.spectrum.values[: found.spectrum.rank]
    axis.loglog(range(1, len(values) + 1), values, ".-", color=COLOURS[0], label=f"{found.states} states")
    label(axis, "index", "eigenvalue of J Jᵀ", f"rank {found.spectrum.rank} of {found.parameters} parameters", True)
    return Plate(figure)


def study_plate(study: ForecastStudy) -> Plate:
    """Forecast against outcome, by task."""
    figure, (axis,) = panels(1, 5.5, 4.4)
    for task, colour in zip(dict.fromkeys(row["task"] for row in study.rows), COLOURS, strict=False):
        rows = [row for row in study.rows if row["task"] == task]
        said, measured = ([row[key] for row in rows] for key in ("forecast_kl", "measured_kl"))
        axis.loglog(said, measured, "o", color=colour, markersize=5, label=task)
    ends = [min(*axis.get_xlim(), *axis.get_ylim()), max(*axis.get_xlim(), *axis.get_ylim())]
    axis.loglog(ends, ends, ":", color="0.5", label="equal")
    label(axis, "forecast KL on the buffer, nats a state", "measured KL after fine-tuning",
          f"{len(study.rows)} runs, rank correlation {study.spearman:.2f}", legend=True)  # fmt: skip
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
        watch = ForgettingAttribution(buffer, states=8 if quick else 24, memory=1 if quick else 8)
        model.learn(256 * 4, callback=watch)
        (update,) = watch.updates
        order = update.kl.argsort(descending=True)
        given = update.contributions.double().sum(1)[order]
        axis.bar(range(len(order)), given, color=COLOURS[0], label="transitions")
        axis.bar(range(len(order)), update.rest[order], color=COLOURS[1], alpha=0.7, width=0.5, label="rest")
        axis.plot(update.kl[order], "k.", label="measured change")
        label(axis, "retained state, by change", "change of KL, nats", name, legend=True)
        numbers[name] = {"kl": float(update.kl.mean()), "by_transitions": float(given.mean()),
                         "rest": float(update.rest.mean()),
                         "certificate": float(update.path.certificate.max())}  # fmt: skip
        if method == "finetune":
            effect = update.contributions[order[0]]
            ranked = effect.abs().sort(descending=True).values
            axes[2].plot(np.arange(1, len(ranked) + 1) / len(ranked), ranked.cumsum(0) / ranked.sum(), color=COLOURS[2],
                         label="most moved state")  # fmt: skip
            axes[2].plot([0, 1], [0, 1], ":", color="0.5", label="all alike")
            half = int(torch.searchsorted(ranked.cumsum(0), ranked.sum() / 2)) + 1
            numbers["share_of_transitions_behind_half"] = half / len(ranked)
    label(axes[2], "share of the new task's transitions", "share of the effect", "plain PPO", legend=True)
    low = min(axis.get_ylim()[0] for axis in itertools.islice(axes, 2))
    axes[0].set_ylim(bottom=low)
    return Plate(figure, numbers)
