"""The curves of a sequence of tasks: the return on each from beginning to end, and the share of KL budgets spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nsrl.rl.agents.archive import written_atomically
from nsrl.runs.figures import COLOURS

#: Shares of a budget below this are drawn there: a logarithmic axis has no zero.
LEAST_SHARE = 1e-3


def draw_sequence(about: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw one panel a task and one for the KL, all over the steps of the whole sequence.

    A method's line is the mean over its runs, its band goes from the smallest to the largest. A panel is shaded while
    its own task is learnt.

    Args:
        about: what holds for all runs: `name` and `tasks`, as in the metrics of a sequence.
        runs: each with its `curve`, and its `method`, by which lines are named and coloured.
        path: the PNG.

    Returns:
        The path.
    """
    # The object interface: pyplot would keep every figure and choose a backend that may want a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    tasks = about["tasks"]
    figure = Figure(figsize=(3.9 * (len(tasks) + 1), 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(tasks) + 1, squeeze=False, sharex=True)[0]
    methods = list(dict.fromkeys(run["method"] for run in runs))
    for method, colour in zip(methods, COLOURS, strict=False):
        curves = [run["curve"] for run in runs if run["method"] == method]
        for axis, task in zip(axes, tasks, strict=False):
            _draw(axis, [(curve["timesteps"], curve["returns"][task["name"]]) for curve in curves], colour, method)
        shares = [(curve["timesteps"], np.maximum(curve["share"], LEAST_SHARE)) for curve in curves]
        _draw(axes[-1], shares, colour, method)
    for axis, task in zip(axes, tasks, strict=False):
        if task["end"] > task["start"]:
            axis.axvspan(task["start"], task["end"], color="0.92", zorder=0)
        when = "learnt before" if task["end"] == task["start"] else "learnt where shaded"
        axis.set_title(f"{task['name']}: {when}", fontsize=10)
        axis.set_ylabel("mean return")
        if task["low"] is not None:  # own scales would make ripples look like drops
            margin = 0.05 * (task["high"] - task["low"])
            bottom, top = axis.get_ylim()
            axis.set_ylim(min(bottom, task["low"] - margin), max(top, task["high"] + margin))
    axes[-1].axhline(1.0, color="black", linestyle=(0, (1, 1)), linewidth=1.4)
    axes[-1].set_yscale("log")
    axes[-1].set_title("KL / budget, of the task nearest to its own", fontsize=10)
    axes[-1].set_ylabel("share of the budget")
    for axis in axes:
        axis.set_xlabel("environment steps")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(about["name"].replace("_", " "), fontsize=12)
    with written_atomically(path) as temporary:
        figure.savefig(temporary, dpi=140)
    return path


def _draw(axis: Any, series: Sequence[tuple[Sequence[int], Any]], colour: str, label: str) -> None:
    """Mean and range of some runs, at the times of the first."""
    steps = series[0][0]
    values = np.stack([np.interp(steps, times, run) for times, run in series])
    axis.plot(steps, values.mean(axis=0), color=colour, marker="o", markersize=3, label=label)
    if len(values) > 1:
        axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)
