"""Whether a KL budget over tasks is kept between its enforcements: the KL of what is retained behind every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nsrl.bench.studies.continual import BENCHMARKS, Cell
from nsrl.continual.budget_options import KLBudgetOptions
from nsrl.continual.config import ContinualConfig, StrategySettings
from nsrl.errors import NsrlError
from nsrl.files import written_atomically
from nsrl.runs.settings import load

SEEDS = (0, 1)
#: What runs: the default, what it was before it had an alarm, and what times are compared with.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "kl_budget": ("kl_budget", {}),
    "kl_budget_enforced_at_ends": ("kl_budget", {"alarm": False, "target": 0.75}),
    "naive": ("naive", {}),
}


def plan_promise(configs: Path, *, only: Sequence[str] = (), quick: bool = False) -> list[Cell]:
    """All runs, seeds outermost; those of a budget are looked at behind every step.

    Args:
        configs: folder whose `continual` holds the configurations; of their presets only the number of retained
            samples is used.
        only: names of benchmarks, variants and seeds ("seed0"); none of a kind means all of it.
        quick: one seed, one epoch.

    Raises:
        NsrlError: an unknown name, an unreadable configuration.
    """
    seeds = {f"seed{seed}": seed for seed in SEEDS}
    known = (*BENCHMARKS, *VARIANTS, *seeds)
    unknown = [name for name in only if name not in known]
    if unknown:
        raise NsrlError(f"there is no benchmark, variant or seed {unknown[0]!r} here; there are {', '.join(known)}")
    wanted = [name for name in BENCHMARKS if name in only] or list(BENCHMARKS)
    variants = [name for name in VARIANTS if name in only] or list(VARIANTS)
    chosen = [seed for name, seed in seeds.items() if name in only] or list(SEEDS)
    cells = []
    for seed in chosen[:1] if quick else chosen:
        for benchmark in wanted:
            base = load(ContinualConfig, configs / "continual" / f"{benchmark}.yaml")
            for variant in variants:
                name, options = VARIANTS[variant]
                kept = {"states_per_task": base.presets.get(name, {}).get("states_per_task", 200)}
                strategy = StrategySettings(name, {**kept, **options} if name == "kl_budget" else {})
                config = replace(base, seed=seed, out=None, presets={}, strategy=strategy)
                if quick:
                    config = replace(config, training=replace(config.training, epochs=1))
                cells.append(Cell(benchmark, config, variant, watched=name == "kl_budget"))
    return cells


def draw_promise(content: dict[str, Any], path: Path) -> Path:
    """The largest KL behind any step of every run next to the budget, a line of points a benchmark; logarithmic."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["benchmark"] for row in content["rows"]))
    figure = Figure(figsize=(7.0, 1.2 + 0.4 * len(names)), layout="constrained")
    axis = figure.subplots()
    every: list[float] = []
    marks = {"kl_budget": ("#D55E00", "o", "with the alarm"), "kl_budget_enforced_at_ends": ("0.45", "s", "without")}
    for variant, (colour, marker, label) in marks.items():
        rows = [row for row in content["rows"] if row["strategy"] == variant]
        times = [row["worst_retained_kl"] / KLBudgetOptions.kl_budget for row in rows]
        every += times
        places = [names.index(row["benchmark"]) for row in rows]
        axis.plot(times, places, marker, color=colour, label=label, markersize=6)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set_xscale("log")
    axis.minorticks_off()
    ticks = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    axis.set_xlim(0.8 * min([0.5, *every]), 1.25 * max([2.0, *every]))
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=8)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel("largest KL of a task on its retained inputs behind any step, in budgets", fontsize=8)
    axis.legend(fontsize=8, frameon=False)
    axis.grid(axis="x", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    with written_atomically(path) as temporary:
        figure.savefig(temporary, dpi=140)
    return path


def kept_lines(content: dict[str, Any]) -> list[str]:
    """The largest KL of a task behind any step of any run next to the budget, a line a variant."""
    lines = []
    for variant, (name, _) in VARIANTS.items():
        worst = [row["worst_retained_kl"] for row in content["rows"] if row["strategy"] == variant]
        if name == "kl_budget" and worst:
            times = max(worst) / KLBudgetOptions.kl_budget
            lines.append(f"{variant}: at most {times:.2f} times the budget behind any step of {len(worst)} runs")
    return lines
