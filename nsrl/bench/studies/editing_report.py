"""What the runs of the editing study come to: a table a model and mode, collapse curves, and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from nsrl.bench.studies.editing import COUNTS, DEVELOPED, DEVELOPMENT, EDITORS, MODES, TUNED
from nsrl.bench.studies.editing_pool import SETTINGS
from nsrl.bench.studies.lines import read_runs
from nsrl.errors import NsrlError
from nsrl.files import write_json, written_atomically
from nsrl.runs.report import Table, number, percent, scientific

HEAD = (
    "",
    "runs",
    "efficacy",
    "exact",
    "paraphrases",
    "specificity",
    "eff. x spec.",
    "perplexity x",
    "KL, most",
    "held",
)
KEYS = ("efficacy", "efficacy_exact", "generalisation", "specificity", "locality", "perplexity", "kl", "knowledge")


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds and orders, an entry for a model, mode, editor and number of edits.

    A run that stopped before has no share in the means, and is counted under `stopped`.
    """
    found = []
    for model in SETTINGS:
        for mode in MODES:
            for editor in EDITORS:
                runs = [row for row in rows if (row["model"], row["mode"], row["editor"]) == (model, mode, editor)]
                for count in sorted({point["edits"] for run in runs for point in run["points"]}):
                    points = [point for run in runs for point in run["points"] if point["edits"] == count]
                    held = [run["held"] for run in runs if run["held"] is not None]
                    measured = [run["kl_most"] for run in runs if run["kl_most"] is not None]
                    found.append(
                        {
                            "model": model,
                            "mode": mode,
                            "editor": editor,
                            "edits": count,
                            "runs": len(points),
                            "stopped": sum(run["stopped"] is not None for run in runs),
                            **{key: _mean(point[key] for point in points) for key in KEYS},
                            "product": fmean(point["efficacy"] * (point["specificity"] or 0.0) for point in points),
                            "kl_most": max(measured, default=None),
                            "held": sum(held) if held else None,
                            "batches": sum(run["batches"] for run in runs) if held else None,
                            "undone": all(run["undone"] for run in runs),
                            "processor_seconds": fmean(run["processor_seconds"] for run in runs),
                        }
                    )
    return found


def best_strengths(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Of every rival's method the entry with the largest efficacy x specificity behind a sequence of 1,000 edits.

    Args:
        rows: runs on `DEVELOPED`; strengths that have none are not chosen.
    """
    best: dict[str, tuple[float, str]] = {}
    for entry in summarise([row for row in rows if row["seed"] in DEVELOPED]):
        method = EDITORS[entry["editor"]].method
        if entry["mode"] != "sequential" or entry["edits"] < max(COUNTS) or method == EDITORS["ours"].method:
            continue
        best[method] = max(best.get(method, (0.0, "")), (entry["product"], entry["editor"]))
    return {method: editor for method, (_, editor) in best.items()}


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def mode_table(summary: Sequence[dict[str, Any]], model: str, mode: str) -> Table | None:
    """One line an editor, at the largest number of edits; None where nothing was run."""
    mine = [entry for entry in summary if (entry["model"], entry["mode"]) == (model, mode)]
    most = max((entry["edits"] for entry in mine), default=0)
    lines = tuple(
        (
            entry["editor"],
            str(entry["runs"]),
            percent(entry["efficacy"]),
            percent(entry["efficacy_exact"]),
            "-" if entry["generalisation"] is None else percent(entry["generalisation"]),
            "-" if entry["specificity"] is None else percent(entry["specificity"]),
            number(entry["product"], 3),
            "-" if entry["perplexity"] is None else number(entry["perplexity"], 3),
            scientific(entry["kl"] if entry["kl_most"] is None else entry["kl_most"]),
            "-" if entry["held"] is None else f"{entry['held']}/{entry['batches']}",
        )
        for entry in mine
        if entry["edits"] == most
    )
    return Table(HEAD, lines, f"{model}: {most} edits, {mode}") if lines else None


def draw_collapse(summary: Sequence[dict[str, Any]], path: Path) -> Path:
    """Efficacy, specificity and perplexity along the edits of a sequence, a row of panels a model."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = [model for model in SETTINGS if any(entry["model"] == model for entry in summary)]
    # The first mode in which ours was run: without it there is nothing to compare.
    ran = {entry["mode"] for entry in summary if entry["editor"] == "ours"} or {entry["mode"] for entry in summary}
    mode = next((mode for mode in MODES if mode in ran), MODES[0])
    # Ours and the rivals at the strength that was chosen for each; the others are in the tables.
    ran_editors = {entry["editor"] for entry in summary if entry["mode"] == mode}
    chosen = [editor for editor in ("ours", *TUNED) if editor in ran_editors] or sorted(ran_editors)
    figure = Figure(figsize=(14.0, 3.9 * len(models)), layout="constrained")
    FigureCanvasAgg(figure)
    panels, palette = figure.subplots(len(models), 4, squeeze=False), colormaps["tab10"]
    shown = (("efficacy", "efficacy"), ("specificity", "specificity"), ("product", "efficacy x specificity"))
    for row, model in zip(panels, models, strict=True):
        for panel, (key, title) in zip(row, (*shown, ("perplexity", "relative perplexity")), strict=True):
            for index, editor in enumerate(chosen):
                mine = [e for e in summary if (e["model"], e["mode"], e["editor"]) == (model, mode, editor)]
                mine = [entry for entry in mine if entry[key] is not None]
                if not mine:
                    continue
                ours = editor.startswith("ours")
                panel.plot(
                    [entry["edits"] for entry in mine],
                    [entry[key] for entry in mine],
                    "o-" if ours else "--",
                    color=palette(index),
                    linewidth=2.2 if editor == "ours" else 1.2,
                    markersize=4,
                    label=editor,
                )
            panel.set(title=f"{model}: {title}", xlabel=f"edits, {mode}", xscale="log")
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
            if key == "perplexity":
                panel.set_yscale("log")
            else:
                panel.set_ylim(-0.03, 1.03)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False, fontsize=8)
    with written_atomically(path) as temporary:
        figure.savefig(temporary, dpi=130)
    return path


def write_editing(reference: Path, command: str) -> tuple[list[Table], list[tuple[str, object]]]:
    """Tables; and the JSON and the figure that were written beside the lines.

    Args:
        reference: folder of the lines.
        command: that made them.

    Raises:
        NsrlError: there is no run yet.
    """
    rows = [row for path in sorted(reference.glob("*.jsonl")) for row in read_runs(path)]
    if not any(row["points"] for row in rows):
        raise NsrlError(f"no run of the editing study came to a result in {reference}; run nsrl bench edit")
    summary = summarise([row for row in rows if row["seed"] < DEVELOPMENT])
    results = reference / "editing.json"
    write_json(results, {"command": command, "summary": summary, "machine": rows[-1]["machine"]})
    figure = draw_collapse(summary, reference / "editing.png")
    tables = [mode_table(summary, model, mode) for model in SETTINGS for mode in MODES]
    return [table for table in tables if table is not None], [("results", results), ("figure", figure)]
