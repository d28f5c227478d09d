"""A suite's results as one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from nsrl.bench.suites.jobs import Job
from nsrl.bench.suites.statistics import bootstrap
from nsrl.errors import NsrlError
from nsrl.files import read_lines, written_atomically
from nsrl.runs.report import Table, number, scientific


def suite_table(content: dict[str, Any]) -> Table:
    """Mean and 95 % bootstrap interval over seeds of every method.

    `kept`: old-task return as a share of the agent's before; `learnt`: new-task return as a share of plain PPO's.
    """
    first = content["summary"][0]
    rows = [
        (
            "before fine-tuning",
            _interval(first["before/old_return"]),
            _interval(first["before/new_return"]),
            "100 %",
            "-",
            "-",
            "-",
        )
    ]
    for entry in content["summary"]:
        rows.append(
            (
                entry["method"],
                _interval(entry["after/old_return"]),
                _interval(entry["after/new_return"]),
                _share(entry["old_return_kept"]),
                _share(entry.get("new_return_of_plain")),
                scientific(entry["after/kl_mean"]["mean"]),
                scientific(entry["after/kl_heldout"]["mean"]),
            )
        )
    seeds = first["seeds"]
    head = ("method", "old task", "new task", "kept", "learnt", "KL", "held out")
    return Table(head, tuple(rows), f"{content['suite']}, {seeds} seeds, mean [95 % interval]")


def _share(value: dict[str, float] | None) -> str:
    """Mean over seeds of a paired ratio."""
    return "-" if value is None else f"{100 * value['mean']:.0f} %"


def _interval(value: dict[str, float]) -> str:
    return f"{value['mean']:.0f} [{value['low']:.0f}, {value['high']:.0f}]"


#: Evaluations after the start that have a column of their own: a misleading critic shows early or never.
EARLY = 4


def learning_curves(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Returns at every evaluation, one row a run: method, seed, and the lists timesteps, new and old.

    Args:
        jobs: finished fine-tuning runs, named "METHOD seed N".

    Raises:
        NsrlError: a run that has not been evaluated.
    """
    rows = []
    for job in jobs:
        measured = [line for line in read_lines(job.run.history) if line.get("return/new") is not None]
        if not measured:
            raise NsrlError(f"{job.folder} holds no evaluations; run its suite first, by nsrl bench")
        rows.append(
            {
                "method": job.name.rpartition(" seed ")[0],
                "seed": job.config.seed,
                "timesteps": [line["timesteps"] for line in measured],
                "new": [line["return/new"] for line in measured],
                "old": [line["return/old"] for line in measured],
            }
        )
    return rows


def learning_table(rows: list[dict[str, Any]], title: str = "") -> Table:
    """New-task return at the first evaluations and over the whole run, and the old task's lowest, of every method.

    Means over seeds, the one over the run with a 95 % bootstrap interval; "whole run" is the mean of a run's
    evaluations after its start. Runs are evaluated between rollouts, whose lengths can differ: the columns are the
    evaluations of the first run, and of the others those nearest to them.
    """
    steps = rows[0]["timesteps"][1 : 1 + EARLY]
    head = ("method", *(f"{step / 1000:.0f}k" for step in steps), "whole run", "old, lowest")
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        runs = [row for row in rows if row["method"] == method]
        early = [number(fmean(_return_near(run, step) for run in runs), 0) for step in steps]
        whole = bootstrap([fmean(run["new"][1:]) for run in runs])
        lines.append(
            (
                method,
                *early,
                f"{whole.estimate:.0f} [{whole.low:.0f}, {whole.high:.0f}]",
                number(min(min(run["old"]) for run in runs), 0),
            )
        )
    return Table(head, tuple(lines), title)


def _return_near(run: dict[str, Any], step: int) -> float:
    nearest = min(range(len(run["timesteps"])), key=lambda index: abs(run["timesteps"][index] - step))
    return run["new"][nearest]


#: Colours of the methods that keep a budget.
OURS = ("tab:red", "tab:orange", "tab:purple", "tab:green", "tab:brown", "tab:pink")

#: Height of the figure as a share of the old task's return, so that a difference of one step does not fill it.
LEAST_SPAN = 0.2


def draw_tradeoff(content: dict[str, Any], path: Path) -> Path:
    """Draw a suite's runs as a scatter: up is better on the old task, right is better on the new one.

    Penalties are joined by a line through their means, in the order of their coefficients: the frontier to beat.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    methods = list(content["methods"])
    penalties: list[tuple[float, tuple[float, float]]] = []
    other = 0
    for method in methods:
        rows = [row for row in content["rows"] if row["method"] == method]
        kind, trpo = content["methods"][method]["method"], content["methods"][method].get("algorithm") == "trpo"
        x, y = [row["after/new_return"] for row in rows], [row["after/old_return"] for row in rows]
        mean = (sum(x) / len(x), sum(y) / len(y))
        colour: Any
        if kind == "kl_penalty":
            colour, marker = colormaps["Blues"](0.45 + 0.15 * len(penalties)), "s"
            penalties.append((content["methods"][method]["penalty"], mean))
        elif kind == "finetune":
            colour, marker = ("0.2", "P") if trpo else ("0.45", "X")
        else:
            colour, marker = OURS[other % len(OURS)], "D" if trpo else "o"
            other += 1
        axes.scatter(x, y, s=18, color=colour, alpha=0.45, linewidths=0)
        axes.scatter(
            *mean, s=80, color=colour, marker=marker, edgecolors="black", linewidths=0.8, label=method, zorder=3
        )
    if len(penalties) > 1:
        points = [mean for _, mean in sorted(penalties)]
        axes.plot(*zip(*points, strict=True), color="tab:blue", linewidth=1, alpha=0.6, zorder=1)
    before = [row["before/old_return"] for row in content["rows"]]
    level = sum(before) / len(before)
    axes.axhline(level, color="black", linewidth=0.8, linestyle=":", label="old task before")
    low, high = axes.get_ylim()
    missing = max(LEAST_SPAN * abs(level) - (high - low), 0.0)
    axes.set_ylim(low - missing / 2, high + missing / 2)
    axes.set_xlabel("return on the new task after fine-tuning")
    axes.set_ylabel("return on the old task after fine-tuning")
    axes.set_title(content["suite"].replace("_", " "))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    with written_atomically(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path
