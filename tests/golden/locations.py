"""Where the recorder finds the few names that it needs beyond the pinned ones, newest home first.

The recorder runs in checkouts on both sides of a move, so a name that moves gets its new home in front of the old one;
nothing else of the recorder changes with the layout.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

HOMES: dict[str, tuple[str, ...]] = {
    "evaluate": ("nsrl.rl.playing.evaluation", "nsrl.rl.evaluation"),
    "add_context": ("nsrl.rl.surgery",),
    "add_actions": ("nsrl.rl.surgery",),
    "widen_buffer": ("nsrl.rl.surgery",),
    "RetentionConfig": ("nsrl.rl.budget.config", "nsrl.rl.config"),
    "PretrainConfig": ("nsrl.runs.config", "nsrl.bench.config"),
    "FinetuneConfig": ("nsrl.runs.config", "nsrl.bench.config"),
    "EvaluationSettings": ("nsrl.runs.config", "nsrl.bench.config"),
    "BufferSettings": ("nsrl.runs.config", "nsrl.bench.config"),
    "PPOSettings": ("nsrl.runs.hyperparameters", "nsrl.bench.hyperparameters"),
    "PPOOverrides": ("nsrl.runs.hyperparameters", "nsrl.bench.hyperparameters"),
    "pretrain": ("nsrl.runs.pretraining", "nsrl.bench.pretraining"),
    "finetune": ("nsrl.runs.finetuning", "nsrl.bench.finetuning"),
    "collect_transitions": ("nsrl.analysis", "nsrl.ntk.rl"),
    "forecast": ("nsrl.analysis", "nsrl.ntk.rl"),
}


def locate(name: str) -> Any:
    """The object of this name, from the first of its homes that this checkout has."""
    for home in HOMES[name]:
        try:
            return getattr(import_module(home), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise ImportError(f"{name} is in none of {', '.join(HOMES[name])}; add its new home to tests/golden/locations.py")
