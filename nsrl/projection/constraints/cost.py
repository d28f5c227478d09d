"""What a constraint costs before it is made: bytes, operations, and seconds at rates that are measured in a moment.

Layers are counted by their shapes, so that a model need not exist. One process and one torch thread; how the parts are
divided among many processes is said in docs/scale.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["features", "kronecker", "jacobian"]
KINDS: tuple[Kind, ...] = ("features", "kronecker", "jacobian")

#: Sizes at which a decomposition's rate is measured; in between it is interpolated, beyond it stays.
SIZES = (64, 192, 576, 1152)
#: Passes over a layer's numbers that a projection makes beside its products: read twice, difference, norms, write.
TOUCHED = 8.0
#: Calls of torch's in a projection through the full Jacobian, most of them for the root that lambda is; counted.
CALLS = 420
#: Products with J or its transpose that such a projection makes; numbers that one streams for each of the output
#: gradients, in a product that is summed; and times that it goes through a k x k matrix. Fitted at 512 and 1,024 rows.
PRODUCTS, SUMMED, SQUARES = 3.0, 25.0, 12.0


@dataclass(frozen=True)
class LayerShape:
    """A linear layer.

    Attributes:
        width_in: d_in, with the constant of a bias.
        width_out: d_out.
        count: layers of this shape.
    """

    width_in: int
    width_out: int
    count: int = 1


@dataclass(frozen=True)
class Rates:
    """How fast one thread is.

    Attributes:
        single: float32 operations a second in a matrix product.
        double: the same in float64.
        stream: bytes a second that are read and written.
        call: seconds of a call of torch's on a few numbers.
        eigh: seconds of a float64 eigendecomposition, by size.
    """

    single: float
    double: float
    stream: float
    call: float
    eigh: dict[int, float]

    def decomposed(self, size: int) -> float:
        """Seconds of a float64 eigendecomposition of a matrix of this size."""
        sizes = sorted(self.eigh)
        near = min(sizes, key=lambda known: abs(known - size))
        if size in self.eigh or not sizes[0] < size < sizes[-1]:
            return self.eigh[near] * (size / near) ** 3
        below, above = max(s for s in sizes if s < size), min(s for s in sizes if s > size)
        share = (size - below) / (above - below)
        # seconds per n^3 change slowly
        per = (1.0 - share) * self.eigh[below] / below**3 + share * self.eigh[above] / above**3
        return per * size**3


@dataclass(frozen=True)
class Cost:
    """What a constraint needs.

    Attributes:
        parameters: that it covers.
        gathering_bytes: while the retained samples are gone through.
        held_bytes: from then on.
        gathering_seconds: the products of all retained samples, without the model's own passes.
        decomposing_seconds: once a refresh.
        projecting_seconds: of one projection.
        exchanged_bytes: that every process contributes to all-reduces at a refresh, whose samples are shared out.
        projecting_exchanged_bytes: the same of one projection, where the parameters are sharded by rows of the layers.
    """

    parameters: int
    gathering_bytes: float
    held_bytes: float
    gathering_seconds: float
    decomposing_seconds: float
    projecting_seconds: float
    exchanged_bytes: float
    projecting_exchanged_bytes: float


def constraint_cost(
    kind: Kind,
    layers: Sequence[LayerShape],
    rates: Rates,
    *,
    samples: int,
    outputs: int = 1,
    share_in: float = 0.5,
    share_out: float = 0.5,
) -> Cost:
    """The cost of a kind of constraint on a network of linear layers.

    Args:
        kind: "features" and "kronecker" as `ThinProjection` projects them, "jacobian" as `SpectralProjection` does.
        layers: by shape.
        rates: of the machine.
        samples: M, that are gone through; tokens count as samples of their own.
        outputs: O, rows of a sample: all whitened outputs, or 1 where one is drawn.
        share_in: share of a layer's input directions that is protected.
        share_out: the same of its output directions, with "kronecker".

    Raises:
        ValueError: an unknown kind, no samples, or a share outside 0 to 1.
    """
    if kind not in KINDS:
        raise ValueError(f"the kind must be one of {', '.join(KINDS)}, not {kind!r}")
    if samples < 1 or outputs < 1 or not (0.0 <= share_in <= 1.0 and 0.0 <= share_out <= 1.0):
        raise ValueError(
            f"samples {samples} and outputs {outputs} must be at least 1, the shares {share_in} and {share_out} within "
            "0 and 1"
        )
    if kind == "jacobian":
        return _jacobian(layers, rates, samples, outputs)
    total = Cost(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    for layer in layers:
        a, g, n = layer.width_in, layer.width_out, layer.count
        thin_in = min(share_in, 1.0 - share_in) * a
        two_sided = kind == "kronecker"
        thin_out = min(share_out, 1.0 - share_out) * g if two_sided else 0.0
        moments = 8.0 * (a * a + (g * g if two_sided else 0))
        products = 2.0 * samples * (a * a + (outputs * g * g if two_sided else 0))
        decomposed = rates.decomposed(a) + (rates.decomposed(g) if two_sided else 0.0)
        projected = 4.0 * a * g * (thin_in + thin_out) / rates.single + TOUCHED * 4.0 * a * g / rates.stream
        # a projection from the left meets all rows of a layer, wherever they lie
        sent = 4.0 * thin_out * a
        total = Cost(
            total.parameters + n * a * g,
            total.gathering_bytes + n * moments,
            total.held_bytes + n * 4.0 * (a * thin_in + g * thin_out),
            total.gathering_seconds + n * products / rates.double,
            total.decomposing_seconds + n * decomposed,
            total.projecting_seconds + n * projected,
            total.exchanged_bytes + n * moments,
            total.projecting_exchanged_bytes + n * sent,
        )
    return total


def _jacobian(layers: Sequence[LayerShape], rates: Rates, samples: int, outputs: int) -> Cost:
    rows = samples * outputs
    parameters = sum(n.count * n.width_in * n.width_out for n in layers)
    factors = sum(4.0 * n.count * samples * (n.width_in + outputs * n.width_out) for n in layers)
    gram = sum(n.count * 2.0 * (samples**2 * n.width_in + rows**2 * n.width_out) for n in layers)
    # the Hadamard products go through the Gram matrix once a layer, for reading, multiplying and adding
    through = sum(n.count for n in layers) * 3.0 * 8.0 * rows**2
    # J v and J^T u: a product with every layer's inputs, and the output gradients read and multiplied
    passes = sum(n.count * 2.0 * samples * n.width_in * n.width_out for n in layers)
    sums = sum(n.count * 4.0 * SUMMED * rows * n.width_out for n in layers)
    return Cost(
        parameters,
        factors + 8.0 * 4.0 * rows**2,
        factors + 8.0 * 2.0 * rows**2,
        gram / rates.double + through / rates.stream,
        rates.decomposed(rows),
        PRODUCTS * (passes / rates.single + sums / rates.stream)
        + SQUARES * 8.0 * rows**2 / rates.stream
        + CALLS * rates.call,
        8.0 * rows**2,
        4.0 * 8.0 * rows,
    )


def measure_rates(sizes: Sequence[int] = SIZES, clock: Callable[[], float] = time.process_time) -> Rates:
    """The rates of this machine's processor, in one to five seconds; medians of three.

    Args:
        sizes: at which decompositions are timed.
        clock: seconds; that of the process, so that others on the machine do not count.
    """
    generator = torch.Generator().manual_seed(0)
    wide, thin = (torch.randn(shape, generator=generator) for shape in ((1024, 1024), (1024, 256)))
    doubles = torch.randn(4096, 512, generator=generator, dtype=torch.float64)
    long, few = torch.randn(2**22, generator=generator), torch.randn(4, generator=generator)
    seconds = {
        "single": _median(lambda: wide @ thin, clock),
        "double": _median(lambda: doubles.T @ doubles, clock),
        "stream": _median(lambda: long + long, clock),
        "call": _median(lambda: few + few, clock),
    }
    eigh = {}
    for size in sizes:
        rows = torch.randn(2 * size, size, generator=generator, dtype=torch.float64)
        moment = rows.T @ rows
        eigh[size] = _median(lambda moment=moment: torch.linalg.eigh(moment), clock)  # type: ignore[misc]
    return Rates(
        2.0 * 1024 * 1024 * 256 / seconds["single"],
        2.0 * 4096 * 512 * 512 / seconds["double"],
        # two are read and one is written
        12.0 * len(long) / seconds["stream"],
        seconds["call"],
        eigh,
    )


def _median(action: Callable[[], object], clock: Callable[[], float]) -> float:
    action()
    seconds = []
    for _ in range(3):
        start, repeats, spent = clock(), 0, 0.0
        while spent < 0.02:  # a clock's tick is up to a hundredth of a second
            action()
            repeats += 1
            spent = clock() - start
        seconds.append(spent / repeats)
    return sorted(seconds)[1]
