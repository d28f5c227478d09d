"""How time grows with samples, outputs, parameters and positions: measured, fitted, and as operation counts predict.

The network is a three-layer MLP applied at every position, averaged over positions. A predicted exponent is fitted
to operation counts at the very sizes that the measured one is fitted at: both are slopes of the same stretch of curve.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from nsrl.bench.speed.cases import MeanOverPositions, Problem, mlp
from nsrl.bench.speed.methods import METHODS

#: The rival of the curves, and the largest dense Jacobian that it is given, in entries.
RIVAL = "torch.func contraction"
LARGEST_DENSE = 200_000_000


@dataclass(frozen=True)
class Sizes:
    """The sizes of one point.

    Attributes:
        samples: N.
        outputs: O, outputs of a sample.
        width: of the inputs and of both hidden layers.
        positions: T.
    """

    samples: int = 64
    outputs: int = 10
    width: int = 256
    positions: int = 1

    @property
    def rows(self) -> int:
        """The number k of rows."""
        return self.samples * self.outputs

    @property
    def parameters(self) -> int:
        """The number P of parameters."""
        return sum((inner + 1) * outer for inner, outer in self.layers)

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """Widths in and out of each linear layer."""
        return (self.width, self.width), (self.width, self.width), (self.width, self.outputs)

    def problem(self) -> Problem:
        """The network and a batch."""
        torch.manual_seed(0)
        network = nn.Sequential(mlp(self.width, self.width, self.width, self.outputs), MeanOverPositions())
        return Problem(network, torch.randn(self.samples, self.positions, self.width), torch.zeros(self.parameters))


@dataclass(frozen=True)
class Sweep:
    """One size varied, the others held.

    Attributes:
        symbol: of the varied size.
        title: of the axis.
        field: of `Sizes` that is varied.
        values: that it takes.
        base: the other sizes.
    """

    symbol: str
    title: str
    field: str
    values: tuple[int, ...]
    base: Sizes = Sizes()

    def points(self, quick: bool) -> list[Sizes]:
        """The sizes to time; quick: the three smallest."""
        values = self.values[:3] if quick else self.values
        return [replace(self.base, **{self.field: value}) for value in values]

    def abscissa(self, sizes: Sizes) -> int:
        """What the time is plotted against."""
        return sizes.parameters if self.symbol == "P" else getattr(sizes, self.field)


SWEEPS = (
    Sweep("N", "samples N", "samples", (16, 32, 64, 128, 256, 512)),
    Sweep("O", "outputs of a sample O", "outputs", (4, 8, 16, 32, 64)),
    Sweep("P", "parameters P", "width", (64, 128, 256, 512, 1024, 2048), Sizes(samples=32)),
    Sweep("T", "positions T", "positions", (1, 2, 4, 8, 16, 32, 64), Sizes(samples=16, outputs=8)),
)


def factored_operations(sizes: Sizes) -> float:
    """Multiply-adds of the factored Gram matrix; those of the Gram, in float64, count twice.

    A forward pass and O backward passes; then a layer's Gram through its factors or through its materialised rows,
    whichever is less.
    """
    n, o, t, k = sizes.samples, sizes.outputs, sizes.positions, sizes.rows
    total = 0.0
    for inner, outer in sizes.layers:
        factors = (n * t) ** 2 * inner + (k * t) ** 2 * outer
        rows = k * t * inner * outer + k**2 * inner * outer
        total += (1 + o) * n * t * inner * outer + 2 * min(factors, rows)
    return total


def dense_operations(sizes: Sizes) -> float:
    """Multiply-adds of a materialised Jacobian times its transpose."""
    n, o, t, k = sizes.samples, sizes.outputs, sizes.positions, sizes.rows
    products = sum(inner * outer for inner, outer in sizes.layers)
    return (1 + o) * n * t * products + k * t * products + k**2 * sizes.parameters


OPERATIONS: dict[str, Callable[[Sizes], float]] = {"nsrl": factored_operations, RIVAL: dense_operations}


def fit_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of the least-squares line through log seconds against log sizes; NaN for fewer than two points."""
    if len(sizes) < 2:
        return float("nan")
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (sizes, seconds))
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x @ x))


def measure_scaling(*, quick: bool = False, repeats: int = 3) -> list[dict[str, Any]]:
    """Time our Gram matrix and the rival's over every sweep.

    Returns:
        One object a sweep: `symbol`, `title`, and per method the `points` (sizes, abscissa, median seconds), the
        `exponent` fitted to those `fitted_from` an abscissa on, and the one `predicted` there by operation counts.
    """
    return [
        {
            "symbol": sweep.symbol,
            "title": sweep.title,
            "methods": {name: _measure_curve(sweep, name, quick, repeats) for name in OPERATIONS},
        }
        for sweep in SWEEPS
    ]


def _measure_curve(sweep: Sweep, method: str, quick: bool, repeats: int) -> dict[str, Any]:
    timed: list[tuple[Sizes, float]] = []
    for sizes in sweep.points(quick):
        if method == "nsrl" or sizes.rows * sizes.parameters <= LARGEST_DENSE:
            timed.append((sizes, _median_seconds(METHODS[method].prepare(sizes.problem()), repeats)))
    fitted = upper_half(timed)
    at = [sweep.abscissa(sizes) for sizes, _ in fitted]
    return {
        "points": [{"sizes": asdict(sizes), "at": sweep.abscissa(sizes), "seconds": time} for sizes, time in timed],
        "fitted_from": at[0],
        "exponent": fit_exponent(at, [time for _, time in fitted]),
        "predicted": fit_exponent(at, [OPERATIONS[method](sizes) for sizes, _ in fitted]),
    }


def upper_half(points: Sequence[Any]) -> Sequence[Any]:
    """The points that an exponent is fitted to, three at least: at small sizes the calls cost more than the work."""
    return points[-max(3, (len(points) + 1) // 2) :]


def _median_seconds(run: Callable[[], Tensor], repeats: int) -> float:
    """After one run that does not count."""
    run()
    seconds = []
    for _ in range(repeats):
        start = perf_counter()
        run()
        seconds.append(perf_counter() - start)
    return statistics.median(seconds)
