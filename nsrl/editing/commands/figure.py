"""What edits did, as a figure: the targets' probabilities before and after, and what the preserved text paid."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from nsrl.files import written_atomically


def draw_edits(metrics: Mapping[str, Any], path: Path) -> Path:
    """Draw the results of a run of edits.

    Args:
        metrics: as `run_edits` returns them.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    before, after = ([row[column] for row in metrics["rows"]] for column in (4, 5))
    places = range(1, len(before) + 1)
    left.vlines(places, before, after, color="#CCCCCC", linewidth=1.0, zorder=1)
    left.scatter(places, before, s=22, color="#999999", label="before", zorder=2)
    left.scatter(places, after, s=22, color="#009E73", label="after", zorder=3)
    left.set(xlabel="edit", ylabel="probability of the target", ylim=(-0.04, 1.04))
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(frameon=False, loc="center right")
    report = metrics["report"]
    made = list(accumulate(batch["edits"] for batch in report["batches"]))
    if report["budget"] is None:
        right.plot([0, made[-1]], [0.0, report["kl_mean"]], "o-", color="#0072B2", label="KL of preserved text")
    else:
        measured = [batch["kl"] for batch in report["batches"]]
        right.plot([0, *made], [0.0, *measured], "o-", color="#0072B2", markersize=4, label="KL of preserved text")
        right.axhline(report["budget"], color="#D55E00", linestyle="--", label="budget")
    if report["kl_heldout"] is not None:
        right.plot(made[-1], report["kl_heldout"], "s", color="#56B4E9", label="held out")
    right.set(xlabel="edits made", ylabel="nats a token")
    right.set_ylim(bottom=0.0)
    right.legend(frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    with written_atomically(path) as temporary:
        figure.savefig(temporary, dpi=140)
    return path
