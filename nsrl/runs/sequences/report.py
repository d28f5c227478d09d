"""What a sequence of tasks says of itself at its end: task x time matrix and metrics, in a table and in a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nsrl.files import STAMP, write_text, written_atomically
from nsrl.runs.figures import COLOURS
from nsrl.runs.folder import RunFolder
from nsrl.runs.report import Table, describe_method, duration, number, scientific

DEFINITIONS = """\
Row t is measured after task t, column i on task i, with {episodes} episodes each. Performance is {scale}. Forgetting is
the performance right after a task minus that at the end; forward transfer (AUC - AUC_ref) / (1 - AUC_ref), with AUC the
mean performance on a task while it is learnt and AUC_ref the same for the task alone, from scratch (Continual World,
arXiv 2105.10919). The KL is the mean over a task's states, from the policy that had just learnt it."""


def sequence_table(metrics: dict[str, Any]) -> Table:
    """The matrix of mean returns, and under it what it comes to for each task and in the mean."""
    names = [task["name"] for task in metrics["tasks"]]
    rows = [
        (f"after {name}", *(number(value) for value in row), number(sum(row) / len(row)))
        for name, row in zip(names, metrics["matrix"], strict=True)
    ]
    scaled = metrics["unit"] == "performance"
    digits = 3 if scaled else 1
    if scaled:
        rows.append(
            _row(
                "performance at the end", names, metrics["performance_by_task"], metrics["average_performance"], digits
            )
        )
    rows.append(_row("forgetting", names, metrics["forgetting_by_task"], metrics["forgetting"], digits))
    if metrics["forward_transfer"] is not None:
        transfers = metrics["forward_transfer_by_task"]
        rows.append(_row("forward transfer", names, transfers, metrics["forward_transfer"], digits))
    rows.append(("KL at the end", *(scientific(metrics["kl_by_task"].get(name)) for name in names), ""))
    rows.append(("KL budget", *(f"{task['kl_budget']:g}" for task in metrics["tasks"][:-1]), "-", ""))
    title = f"{metrics['name']}: {describe_method(metrics)}, {len(names)} tasks, {metrics['timesteps']:,} steps"
    return Table(("mean return", *names, "mean"), tuple(rows), title)


def write_sequence_report(folder: RunFolder, metrics: dict[str, Any]) -> None:
    """report.md of a sequence."""
    table = sequence_table(metrics)
    scale = "the return itself"
    if metrics["unit"] == "performance":
        ranges = "; ".join(f"{task['name']} {task['low']:g} to {task['high']:g}" for task in metrics["tasks"])
        scale = f"linear in the return, from 0 to 1 ({ranges})"
    episodes = metrics["returns"][0][metrics["tasks"][0]["name"]]["episodes"]
    environments = ", ".join(f"{task['name']} (`{task['env']}`)" for task in metrics["tasks"])
    parts = [
        f"# {table.title}",
        f"Tasks: {environments}; seed {metrics['seed']}.",
        table.markdown(),
        " ".join(DEFINITIONS.format(episodes=episodes, scale=scale).split()),
        f"![returns and KL over the sequence]({folder.figure.name})",
        f"Largest share of a task's KL budget after any update {metrics['largest_share']:.3f}; "
        f"{metrics['buffer']['states']} states in the buffer, {metrics['buffer']['heldout']} of them held out. "
        f"Wall time {duration(metrics['wall_seconds'])}.",
        _files(folder),
    ]
    write_text(folder.report, "\n\n".join(parts) + "\n")


def _row(title: str, names: list[str], values: dict[str, float | None], mean: float, digits: int) -> tuple[str, ...]:
    return (title, *(number(values.get(name), digits) for name in names), number(mean, digits))


def _files(folder: RunFolder) -> str:
    known = {
        folder.agent: "the agent after the last task, a stock Stable-Baselines3 zip",
        folder.agent.with_name("vecnormalize.pkl"): "its observation statistics",
        folder.path / "tasks": "the agent and the states of each task",
        folder.path / "references": "the tasks learnt alone",
        folder.buffer: "the states of all tasks, to go on with",
        folder.history: "measurements during training",
        folder.config: "the complete configuration",
        folder.path / STAMP: "which nsrl made the folder, and in which format",
        folder.tensorboard: "TensorBoard events",
    }
    lines = [f"* `{path.name}`: {text}" for path, text in known.items() if path.exists()]
    # metrics.json is written last, after this report
    return "\n".join([*lines, f"* `{folder.metrics.name}`: all results"])


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
