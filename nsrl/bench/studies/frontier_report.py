"""What the lines of the frontier come to: a table a pair, a figure, and what is to be said of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from nsrl.bench.studies.frontier_plan import BUDGET, BUFFERS, GRID, METHODS, PAIRS, SCALES, STATES
from nsrl.bench.studies.lines import read_runs
from nsrl.bench.suites.statistics import bootstrap, interquartile_mean
from nsrl.errors import NsrlError
from nsrl.files import write_text, written_atomically
from nsrl.runs.report import Table, number, percent, scientific

#: Share of the way from the agents' score to a fresh policy's that counts as learnt, and of the old score as kept.
LEARNT, KEPT = 0.9, 0.99
#: Runs of a method, in the mean, from which on a pair is drawn.
FEWEST = 3
HEAD = ("", "agents", "learnt", "worst", "area, IQM [95 %]", "old kept", "worst old", "KL, most", "held", "time")


def read_rows(reference: Path, pair: str) -> list[dict[str, Any]]:
    """Lines of a pair, those of the methods' own settings only."""
    rows = read_runs(reference / f"{pair}.jsonl")
    return [row for row in rows if _is_plain(row) and _is_own(row)]


def _is_plain(row: dict[str, Any]) -> bool:
    return row["states"] == STATES and row["scale"] == 1.0


def _is_own(row: dict[str, Any]) -> bool:
    return row["penalty"] == METHODS[row["method"]].options.get("penalty")


def scores(rows: Sequence[dict[str, Any]], solved: float | None = None) -> list[dict[str, Any]]:
    """Every row with its normalised scores.

    Adds `end` and `area`, the new task's score at the end and its mean over the run: 0 is what the agents score there
    before, 1 what fresh policies of the same algorithm, or of the better one, score at the end, or what counts as
    solved if that is more; and `old`, the old score at the end as a share of that before (of the distance to the worst
    return that was seen, or to 0 if that is less).
    """
    agents = [row["curve"][0][2] for row in rows if not row["method"].startswith("scratch")]
    if not agents:  # fresh policies alone have nothing to be held against
        return []
    before = fmean(agents)
    fresh = [
        fmean(values)
        for name in ("scratch PPO", "scratch TRPO")
        if (values := [row["curve"][-1][2] for row in rows if row["method"] == name])
    ]
    fresh += [] if solved is None else [solved]
    top = max(fresh, default=max(row["curve"][-1][2] for row in rows))
    floor = min(0.0, *(point[1] for row in rows for point in row["curve"]))
    found = []
    for row in rows:
        curve = np.asarray([[point[0], point[1], point[2]] for point in row["curve"]], dtype=np.float64)
        new = (curve[:, 2] - before) / max(top - before, 1e-9)
        area = float(np.trapezoid(new, curve[:, 0]) / max(curve[-1, 0] - curve[0, 0], 1.0))
        kept = (curve[-1, 1] - floor) / max(curve[0, 1] - floor, 1e-9)
        found.append(row | {"end": float(new[-1]), "area": area, "old": float(kept)})
    return found


def pair_table(rows: Sequence[dict[str, Any]], pair: str) -> Table:
    """One line a method."""
    lines = []
    for name in METHODS:
        runs = [row for row in rows if row["method"] == name]
        if not runs:
            continue
        area = bootstrap([run["area"] for run in runs], interquartile_mean)
        fresh = name.startswith("scratch")
        most = max((run["kl_most"] for run in runs if run["kl_most"] is not None), default=None)
        updates = sum(run["updates"] or 0 for run in runs)
        lines.append(
            (
                name,
                str(len(runs)),
                f"{sum(run['end'] >= LEARNT for run in runs)}",
                number(min(run["end"] for run in runs), 2),
                f"{area.estimate:.2f} [{area.low:.2f}, {area.high:.2f}]",
                "-" if fresh else f"{sum(run['old'] >= KEPT for run in runs)}",
                "-" if fresh else percent(min(run["old"] for run in runs)),
                scientific(most),
                "-" if not updates else percent(sum(run["held"] or 0 for run in runs) / updates),
                number(fmean(run["seconds"] for run in runs), 0) + " s",
            )
        )
    task = PAIRS[pair]
    kind = "test" if task.test else "development"
    return Table(HEAD, tuple(lines), f"{pair} ({kind} pair): {task.old} -> {task.new}, KL budget {BUDGET:g}")


def grid_table(reference: Path, pair: str = "cartpole_swapped") -> Table | None:
    """What each coefficient that was tried came to; None where none was."""
    rows = [row for row in read_runs(reference / f"{pair}.jsonl") if _is_plain(row) and row["method"] in GRID]
    tuned = [row for row in rows if row["penalty"] is not None and (row["seed"], row["multiple"]) == (0, 3)]
    if not tuned:
        return None
    keys = sorted({(row["method"], row["penalty"]) for row in tuned})
    lines = []
    for method, penalty in keys:
        runs = [row for row in tuned if (row["method"], row["penalty"]) == (method, penalty)]
        means = [fmean(run["curve"][-1][column] for run in runs) for column in (1, 2)]
        whole = fmean(fmean(point[2] for point in run["curve"][1:]) for run in runs)
        lines.append((f"{method} {penalty:g}", str(len(runs)), *(number(value, 0) for value in (*means, whole))))
    head = ("", "agents", "old, end", "new, end", "new, whole run")
    return Table(head, tuple(lines), f"coefficients tried on {pair}")


def varied_table(reference: Path, key: str) -> Table | None:
    """What comes of other sizes of the buffer ("states") or scales of the rewards ("scale"); None if none was run."""
    pair, values, names = BUFFERS if key == "states" else SCALES
    usual = STATES if key == "states" else 1.0
    rows = [row for row in read_runs(reference / f"{pair}.jsonl") if row["method"] in names and _is_own(row)]
    other = "scale" if key == "states" else "states"
    rows = [row for row in rows if row[other] == (1.0 if other == "scale" else STATES)]
    agents = {(row["kind"], row["seed"], row["multiple"]) for row in rows if row[key] != usual}
    if not agents:
        return None
    lines = []
    for name in names:
        for value in sorted({*values, usual}):
            runs = [row for row in rows if row["method"] == name and row[key] == value]
            runs = [row for row in runs if (row["kind"], row["seed"], row["multiple"]) in agents]
            if not runs:
                continue
            before, after, new = (
                [run["curve"][at][column] for run in runs] for at, column in ((0, 1), (-1, 1), (-1, 2))
            )
            lost = max(a - b for a, b in zip(before, after, strict=True))
            lines.append(
                (
                    name,
                    f"{value:g}",
                    str(len(runs)),
                    number(fmean(after), 0),
                    number(lost, 0),
                    number(fmean(new), 0),
                    number(min(new), 0),
                    scientific(max(run["kl_most"] for run in runs)),
                )
            )
    what = "buffer states" if key == "states" else "rewards times"
    head = ("", what, "agents", "old, end", "old, most lost", "new, end", "new, worst", "KL, most")
    return Table(head, tuple(lines), f"{what} on {pair}")


def draw_frontier(found: dict[str, list[dict[str, Any]]], path: Path) -> Path:
    """Old score kept against area under the new task's curve: a panel a pair, a colour a method, a dot an agent."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # what lies under the default's dots, one upon the other, is for the tables
    names = [name for name in METHODS if not name.startswith(("scratch", "shared"))]
    # a dot or two make no picture
    many = {pair: rows for pair, rows in found.items() if len(rows) >= FEWEST * len({row["method"] for row in rows})}
    found = many or found
    # neighbours in the list are told apart by light and dark of one hue
    palette = [*colormaps["tab20"].colors, *colormaps["tab20b"].colors][: len(names)]  # type: ignore[attr-defined]
    figure = Figure(figsize=(4.2 * len(found), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for axis, (pair, rows) in zip(axes, found.items(), strict=True):
        for name, colour in zip(names, palette, strict=True):
            runs = [row for row in rows if row["method"] == name]
            if not runs:
                continue
            axis.scatter([run["area"] for run in runs], [run["old"] for run in runs], s=10, alpha=0.35, color=colour)
            centre = [fmean(run[key] for run in runs) for key in ("area", "old")]
            axis.scatter(*[[value] for value in centre], s=60, color=colour, label=name, edgecolor="white", zorder=3)
        axis.set_title(pair.replace("_", " "), fontsize=10)
        axis.set_xlabel("new task: normalised area under the curve")
        axis.set_ylabel("old task: share of the score kept")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.set_figheight(4.4 + 0.2 * (len(labels) // 4))
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    with written_atomically(path) as temporary:
        figure.savefig(temporary, dpi=140)
    return path


def write_frontier(reference: Path) -> tuple[list[Table], list[tuple[str, Path]]]:
    """Tables of all pairs that have lines; report.md and the figure are written beside these.

    Raises:
        NsrlError: there is no line.
    """
    found = {pair: rows for pair in PAIRS if (rows := scores(read_rows(reference, pair), PAIRS[pair].solved))}
    if not found:
        raise NsrlError(f"no run of the frontier came to a result; see {reference}")
    tables = [pair_table(rows, pair) for pair, rows in found.items()]
    grid = grid_table(reference)
    extra = [grid, varied_table(reference, "states"), varied_table(reference, "scale")]
    tables += [table for table in extra if table is not None]
    figure = draw_frontier(found, reference / "frontier.png")
    text = "\n\n".join(
        [
            "# The frontier",
            "Made by `nsrl bench frontier`; a line a run in the `.jsonl` files beside this one.",
            f"Learnt: agents at {LEARNT:.0%} of the way from their score to a fresh policy's, or to what counts as "
            "solved on the test pairs, if that is more. Worst: the least of "
            "these ways. Area: the mean of the way over the run, the interquartile mean over the agents. Old kept: "
            f"agents with at least {KEPT:.0%} of the old score at the end. KL, most: the largest measured behind an "
            "update of any run. Held: updates behind which it was within the budget. Shared: all parameters move, "
            "inside the budget, where the default's updates are confined to free units.",
            *(f"## {table.title}\n\n{table.markdown()}" for table in tables),
            f"![frontier]({figure.name})",
        ]
    )
    report = reference / "report.md"
    write_text(report, text + "\n")
    return tables, [("report", report), ("figure", figure)]
