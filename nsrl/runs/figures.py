"""Learning curves as PNG: returns on the old and the new task, and the KL on the buffer beside its budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsrl.files import written_atomically
from nsrl.rl.budget.config import accepted

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LEAST_KL = 1e-7


@dataclass(frozen=True)
class Curve:
    """What one run measured over time.

    Attributes:
        label: name of the method or run in the legend.
        returns: per task name, (steps, mean returns).
        kl: (steps, mean KL on the buffer), in nats.
        kl_heldout: (steps, mean KL on the held-out states).
    """

    label: str
    returns: dict[str, tuple[list[int], list[float]]]
    kl: tuple[list[int], list[float]] = field(default_factory=lambda: ([], []))
    kl_heldout: tuple[list[int], list[float]] = field(default_factory=lambda: ([], []))


def curve_from_history(label: str, rows: Sequence[dict[str, Any]], tasks: Sequence[str]) -> Curve:
    """A curve from the rows of history.jsonl.

    Args:
        label: name of the run.
        rows: objects with `timesteps` and any of `return/TASK`, `kl_mean`, `kl_heldout`.
        tasks: tasks to take.
    """

    def series(key: str) -> tuple[list[int], list[float]]:
        points = [(row["timesteps"], row[key]) for row in rows if row.get(key) is not None]
        return [step for step, _ in points], [value for _, value in points]

    return Curve(label, {task: series(f"return/{task}") for task in tasks}, series("kl_mean"), series("kl_heldout"))


def first_returns(curve: Curve, task: str = "old") -> dict[str, float]:
    """What the pretrained agent got in the run's own evaluation episodes, for the dotted line."""
    values = curve.returns.get(task, ([], []))[1]
    return {task: values[0]} if values else {}


def draw_curves(
    curves: Sequence[Curve],
    path: Path,
    *,
    tasks: Sequence[tuple[str, str]],
    budget: float | None = None,
    references: dict[str, float] | None = None,
    title: str = "",
) -> Path:
    """Draw one panel a task and, where a KL was measured, one for the KL.

    Args:
        curves: the runs; one colour each.
        path: the PNG.
        tasks: (name in the curves, title of the panel).
        budget: KL budget in nats, a dashed line; 0 is drawn at the KL that it accepts.
        references: per task a return to compare with (the pretrained agent's), a dotted line.
        title: of the whole figure.

    Returns:
        The path.
    """
    # The object interface: pyplot would keep every figure and choose a backend that may want a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with_kl = any(curve.kl[0] for curve in curves)
    panels = len(tasks) + with_kl
    figure = Figure(figsize=(4.6 * panels, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False, sharex=True)[0]
    for axis, (task, name) in zip(axes, tasks, strict=False):
        for curve, colour in zip(curves, COLOURS, strict=False):
            steps, values = curve.returns.get(task, ([], []))
            axis.plot(steps, values, color=colour, marker="o", markersize=3, label=curve.label)
        reference = (references or {}).get(task)
        if reference is not None:
            axis.axhline(reference, color="0.4", linestyle=":", linewidth=1.2, label="pretrained agent")
        axis.set_title(name, fontsize=10)
        axis.set_ylabel("mean return")
    if with_kl:
        _draw_kl(axes[-1], curves, budget)
    for axis in axes[1 : len(tasks)]:
        axis.sharey(axes[0])  # returns of a pair are of one kind; own scales would make ripples look like drops
    for axis in axes:
        axis.set_xlabel("environment steps on the new task" if with_kl else "environment steps")
        axis.xaxis.set_major_formatter(_thousands)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    _add_legend(figure, axes)
    if title:
        figure.suptitle(title, fontsize=12)
    with written_atomically(path) as temporary:
        figure.savefig(temporary, dpi=140)
    return path


def _draw_kl(axis: Any, curves: Sequence[Curve], budget: float | None) -> None:
    """The KL panel, logarithmic: solid on the buffer, dashed on the held-out states."""
    for curve, colour in zip(curves, COLOURS, strict=False):
        series = ((curve.kl, "-", curve.label), (curve.kl_heldout, "--", "held-out states"))
        for (steps, values), style, label in series:
            # Before the first update the KL is zero, which a logarithmic axis cannot show.
            points = [(step, value) for step, value in zip(steps, values, strict=True) if step > 0]
            # The dashed lines share one grey entry in the legend, made by `_add_legend`.
            label = label if style == "-" else "_" + label
            axis.plot(
                [step for step, _ in points],
                [max(value, LEAST_KL) for _, value in points],
                color=colour,
                linestyle=style,
                linewidth=1.5 if style == "-" else 1.0,
                label=label,
            )
    if budget is not None:
        label = f"KL budget {budget:g}"
        axis.axhline(accepted(budget), color="black", linestyle=(0, (1, 1)), linewidth=1.4, label=label)
    axis.set_yscale("log")
    # At least one and a half decades, or small wiggles would look like jumps.
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, high / 50.0), high * 1.5)
    axis.set_title("KL to the pretrained policy on the buffer", fontsize=10)
    axis.set_ylabel("mean KL (nats per state)")


def _add_legend(figure: Any, axes: Sequence[Any]) -> None:
    """One legend under all panels, each label once."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if any(line.get_label() == "_held-out states" for axis in axes for line in axis.lines):
        from matplotlib.lines import Line2D

        entries["KL on held-out states"] = Line2D([], [], color="0.3", linestyle="--", linewidth=1.0)
    columns = min(len(entries), 6)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False)


def _thousands(value: float, _position: int) -> str:
    return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k" if value else "0"
