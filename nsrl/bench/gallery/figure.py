"""A plate of the gallery: axes to draw on, and the numbers that the picture shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nsrl.files import written_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from nsrl.ntk.slopes import Slope

DPI = 110
# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclass
class Plate:
    """A figure and what was measured for it.

    Attributes:
        figure: the picture.
        numbers: plain JSON.
    """

    figure: Figure
    numbers: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> Path:
        """Write the PNG, whole or not at all."""
        with written_atomically(path) as temporary:
            self.figure.savefig(temporary, dpi=DPI)
        return path


def panels(count: int, width: float = 4.4, height: float = 3.6, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with so many axes, in rows."""
    # The object interface: pyplot would keep every figure and choose a backend that may want a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = -(-count // rows)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(np.ravel(figure.subplots(rows, columns, squeeze=False)))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def label(axis: Axes, x: str, y: str, title: str = "", legend: bool = False) -> None:
    """Name the axes."""
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    if title:
        axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.25)
    if legend:
        axis.legend(fontsize=8, frameon=False)


def mark(axis: Axes, values: Any) -> None:
    """Write these numbers on a logarithmic x axis: its own labels overlap within a decade or two."""
    from matplotlib.ticker import NullLocator

    axis.set_xticks(list(values), [f"{value:g}" for value in values])
    axis.xaxis.set_minor_locator(NullLocator())


def law(axis: Axes, x: Any, y: Any, name: str, colour: str, marker: str = "o") -> Slope:
    """Draw points of a power law with the fitted line, on log-log axes; the fit."""
    from nsrl.ntk.slopes import fit_slope

    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    fit = fit_slope(x, y)
    axis.loglog(x, y, marker, color=colour, markersize=4, label=f"{name}: slope {fit.slope:.2f}")
    ends = np.array([x.min(), x.max()])
    axis.loglog(ends, np.exp(fit.intercept) * ends**fit.slope, "-", color=colour, linewidth=1)
    return fit


def told(fit: Slope, expected: float) -> dict[str, float]:
    """A slope for the JSON, beside what it should be."""
    return {"slope": fit.slope, "low": fit.low, "high": fit.high, "expected": expected}
