"""What the states that an update linearises cost and bring: how many there are, and how they are chosen.

nsrl bench cartpole_selection
python -m nsrl.bench.studies.selection configs/bench/cartpole_selection.yaml runs/bench/cartpole_selection
runs/reference

The second command adds `subsets` to the suite's JSON and draws the figure over them in place of the suite's own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from nsrl.bench.suites.pairs import Suite, read_suite
from nsrl.bench.suites.report import learning_curves
from nsrl.bench.suites.statistics import bootstrap
from nsrl.errors import NsrlError
from nsrl.files import write_json, written_atomically
from nsrl.reading.documents import read_results
from nsrl.runs.report import Table, number


def subset_rows(suite: Suite, out: Path) -> list[dict[str, Any]]:
    """One row a run of a finished suite: selection, states, seed, restorations an update, mean return while learning.

    Raises:
        NsrlError: a run is not finished, or of a version that did not count restorations.
    """
    jobs = suite.finetuning_jobs(out)
    rows = []
    for job, curve in zip(jobs, learning_curves(jobs), strict=True):
        config: Any = job.config
        found = job.run.read_metrics()["retention"]
        if "restored" not in found:
            raise NsrlError(f"{job.folder} does not say how often it was restored; remove it and run the suite again")
        rows.append(
            {
                "selection": config.retention.selection,
                "states": config.retention.subset_states,
                "seed": config.seed,
                "updates": found["updates"],
                "restored": found["restored"],
                "rollbacks": found["rollbacks"],
                "new_while_learning": fmean(curve["new"][1:]),
                "old_lowest": min(curve["old"]),
            }
        )
    return rows


def subset_table(rows: Sequence[dict[str, Any]], title: str = "") -> Table:
    """Restorations an update and the new task's return over the run, with 95 % bootstrap intervals over seeds."""
    head = ("linearised states", "restorations an update", "new task, whole run", "old task, lowest", "rollbacks")
    lines = []
    for selection, states in _settings(rows):
        runs = [row for row in rows if (row["selection"], row["states"]) == (selection, states)]
        lines.append(
            (
                f"{states}, {selection}",
                _interval(list(map(_restorations, runs)), 2),
                _interval(list(map(_return, runs)), 0),
                number(min(run["old_lowest"] for run in runs), 0),
                str(sum(run["rollbacks"] for run in runs)),
            )
        )
    return Table(head, tuple(lines), title)


def draw_subsets(rows: Sequence[dict[str, Any]], path: Path, title: str = "") -> Path:
    """Both columns of the table against the number of states: a line a selection through its means, a dot a seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    sizes = sorted({row["states"] for row in rows})
    for selection, colour in zip(dict.fromkeys(row["selection"] for row in rows), ("#0072B2", "#D55E00"), strict=False):
        chosen = [row for row in rows if row["selection"] == selection]
        for axis, value in zip(axes, (_restorations, _return), strict=True):
            means = [fmean(value(row) for row in chosen if row["states"] == size) for size in sizes]
            axis.plot(sizes, means, color=colour, marker="o", label=selection)
            axis.scatter(
                [row["states"] for row in chosen], [value(row) for row in chosen], color=colour, s=12, alpha=0.4
            )
    for axis, name in zip(axes, ("restorations an update", "new task: mean return over the run"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set_ylim(bottom=0.0)
        axis.set_xlabel("states linearised")
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(title="selection", frameon=False)
    figure.suptitle(title, fontsize=12)
    with written_atomically(path) as temporary:
        figure.savefig(temporary, dpi=140)
    return path


def main(suite_file: str, out: str, reference: str) -> None:
    """Sum up the finished runs of a suite into its JSON and figure, and print the table.

    Raises:
        NsrlError: the suite has not been run.
    """
    suite = read_suite(suite_file)
    path = Path(reference) / f"{suite.name}.json"
    if not path.is_file():
        raise NsrlError(f"there is no {path}; run the suite first: nsrl bench {suite.name}")
    rows = subset_rows(suite, Path(out))
    write_json(path, read_results(path) | {"subsets": rows})
    draw_subsets(rows, path.with_suffix(".png"), suite.name.replace("_", " "))
    print(subset_table(rows).markdown())


def _settings(rows: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    return list(dict.fromkeys((row["selection"], row["states"]) for row in rows))


def _restorations(row: dict[str, Any]) -> float:
    return row["restored"] / row["updates"]


def _return(row: dict[str, Any]) -> float:
    return row["new_while_learning"]


def _interval(values: Sequence[float], digits: int) -> str:
    found = bootstrap(values)
    return f"{found.estimate:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


if __name__ == "__main__":
    main(*sys.argv[1:])
