"""What the runs of post-training come to: a table a task, a figure, and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from nsrl.bench.studies.lines import read_runs
from nsrl.bench.studies.post_training import METHODS
from nsrl.bench.studies.post_training_tasks import TASKS
from nsrl.errors import NsrlError
from nsrl.files import write_json, written_atomically
from nsrl.runs.report import Table, number, percent, scientific

#: How much less than plain fine-tuning a method may have learnt and still count as having learnt the task.
LEARNT = 0.02
HEAD = ("", "coefficient", "runs", "new", "old kept", "worst", "KL on all old", "KL on preserved", "processor")


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Means over the seeds of every task, method and coefficient.

    `chosen` marks, for each method, the coefficient with the most kept among those that have learnt within `LEARNT` of
    plain fine-tuning, or the one that has learnt most where none has: picked with hindsight, in favour of the rivals.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for task in TASKS:
        lines = []
        for method, kind in METHODS.items():
            for coefficient in kind.grid:
                runs = [
                    row
                    for row in rows
                    if (row["task"], row["method"], row["coefficient"]) == (task, method, coefficient)
                ]
                if runs:
                    lines.append(_line(method, coefficient, runs))
        plain = next((line["new"] for line in lines if line["method"] == "plain"), None)
        for method in METHODS:
            mine = [line for line in lines if line["method"] == method]
            learnt = [line for line in mine if plain is not None and line["new"] >= plain - LEARNT]
            if mine:
                best = max(learnt or mine, key=lambda line: line["old"] if learnt else line["new"])
                best["chosen"], best["learnt"] = True, bool(learnt)
        if lines:
            found[task] = lines
    return found


def _line(method: str, coefficient: float, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    preserved = [run["kl_preserved"] for run in runs if run["kl_preserved"] is not None]
    return {
        "method": method,
        "coefficient": coefficient,
        "runs": len(runs),
        "new": fmean(run["new"] for run in runs),
        "old": fmean(run["old"] for run in runs),
        "old_worst": min(run["old"] for run in runs),
        "kl_all": fmean(run["kl_all"] for run in runs),
        "kl_preserved_most": max(preserved, default=None),
        "budget": runs[0]["budget"],
        "processor_seconds": fmean(run["processor_seconds"] for run in runs),
        "chosen": False,
        "learnt": False,
    }


def task_table(task: str, lines: Sequence[dict[str, Any]]) -> Table:
    """One line a method, at the coefficient that was chosen."""
    cells = tuple(
        (
            line["method"],
            "-" if len(METHODS[line["method"]].grid) == 1 else f"{line['coefficient']:g}",
            str(line["runs"]),
            percent(line["new"]) + ("" if line["learnt"] else " *"),
            percent(line["old"]),
            percent(line["old_worst"]),
            scientific(line["kl_all"]),
            "-" if line["budget"] is None else scientific(line["kl_preserved_most"]),
            number(line["processor_seconds"]) + " s",
        )
        for line in lines
        if line["chosen"]
    )
    return Table(HEAD, cells, f"{task}: what was learnt, and how much of the old facts is still answered rightly")


def draw_frontier(summary: dict[str, list[dict[str, Any]]], path: Path) -> Path:
    """Old kept against new learnt, a panel a task; every coefficient is a point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(summary), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(summary), squeeze=False, sharey=True)
    for panel, (task, lines) in zip(panels[0], summary.items(), strict=True):
        for index, method in enumerate(METHODS):
            mine = [line for line in lines if line["method"] == method]
            if mine:
                marker = "*" if method.startswith("ours") else "o"
                panel.plot(
                    [line["new"] for line in mine],
                    [line["old"] for line in mine],
                    marker,
                    color=f"C{index}",
                    markersize=12 if marker == "*" else 6,
                    label=method,
                    alpha=0.85,
                )
        panel.set(title=task, xlabel="new task learnt", ylim=(-0.03, 1.03))
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("old facts kept")
    panels[0][-1].legend(fontsize=7)
    with written_atomically(path) as temporary:
        figure.savefig(temporary, dpi=130)
    return path


def write_post_training(reference: Path, command: str) -> tuple[list[Table], list[tuple[str, object]]]:
    """Tables; and the JSON and the figure that were written.

    Raises:
        NsrlError: there is no run yet.
    """
    rows = read_runs(reference / "runs.jsonl")
    if not rows:
        raise NsrlError(f"there is no run in {reference / 'runs.jsonl'} yet; run nsrl bench post_training")
    summary = summarise(rows)
    write_json(reference / "post_training.json", {"command": command, "tasks": summary, "machine": rows[-1]["machine"]})
    figure = draw_frontier(summary, reference / "post_training.png")
    files: list[tuple[str, object]] = [("results", reference / "post_training.json"), ("figure", figure)]
    return [task_table(task, lines) for task, lines in summary.items()], files
