"""Writes the tables of docs/scale.md from runs/reference/cost.json: `make scale`.

The run on paper: a transformer of 1e11 parameters, 1e9 retained tokens, 1e4 accelerators. Operations and bytes are
those of `nsrl.projection.constraints.cost`, whose forecasts `nsrl bench cost` has measured up to 1e8 parameters.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from nsrl.bench.cost.constraints import read_rates
from nsrl.projection.constraints.cost import Cost, LayerShape, Rates, constraint_cost
from nsrl.runs.report import Table

ROOT = Path(__file__).parents[1]
#: What the tables lie between.
BEGIN, END = "<!-- made by `make scale` -->", "<!-- end of what `make scale` makes -->"

WIDTH, LAYERS, ACCELERATORS, TOKENS = 10_240, 80, 10**4, 10**9
#: Query, key, value and output, and the two of the feed-forward part: 12 d^2 a layer.
SHAPES = (
    LayerShape(WIDTH, WIDTH, 4 * LAYERS),
    LayerShape(WIDTH, 4 * WIDTH, LAYERS),
    LayerShape(4 * WIDTH, WIDTH, LAYERS),
)
#: Shares of a layer's directions that are protected.
SHARE = 0.25
#: Not measured: no accelerator was at hand. What nsrl.projection.solvers.plan assumes of an H100, half of its memory's
#: bandwidth, and a link of 400 Gbit/s each.
ASSUMED = Rates(single=3e13, double=3e13, stream=1.5e12, call=1e-5, eigh={4 * WIDTH: 9.0 * (4 * WIDTH) ** 3 / 5e11})
LINK = 5e10
#: What a half of the peak in bfloat16 makes of a forward pass, also assumed.
FORWARD = 4e14


def page(text: str, reference: Path) -> str:
    """The page with the tables made anew.

    Args:
        text: of the page.
        reference: folder of the committed results.
    """
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    content = json.loads((reference / "cost.json").read_text(encoding="utf-8"))
    return f"{head}{BEGIN}\n\n{tables(read_rates(content), content)}\n{END}{tail}"


def tables(core: Rates, content: dict) -> str:
    """The measured constants, and a line a kind of constraint."""
    ratios = [ratio for row in content["rows"] for ratio in row["ratio"].values()]
    cpu = content["machine"]["cpu"]
    constants = (
        f"Measured on one core ({cpu}): {scale(core.single)} float32 and {scale(core.double)} float64 operations a "
        f"second in products, {scale(core.stream)} bytes a second, {core.decomposed(1152):.2g} s for the "
        f"eigendecomposition of a float64 matrix of 1,152. From these, {len(ratios)} figures of `nsrl bench cost` are "
        f"forecast at {min(ratios):.2f} to {max(ratios):.2f} times what was measured "
        "([numbers](../runs/reference/cost.json))."
    )
    head = ("", "gathered", "held", "gathering", "decomposing", "a projection", "exchanged a refresh")
    rows = tuple(
        line(f"{name}, {machine}", cost(kind, rates), rates, shown)
        for kind, name in (("features", "features"), ("kronecker", "Kronecker"), ("jacobian", "full Jacobian"))
        for machine, rates, shown in (("cores", core, True), ("accelerators", ASSUMED, False))
    )
    forward = 2.0 * parameters() * TOKENS / (FORWARD * ACCELERATORS)
    return (
        "\n\n".join(
            [
                constants,
                Table(head, rows).markdown(),
                f"A forward pass over all {scale(TOKENS)} tokens, which gathering needs besides, and measuring the KL "
                f"on all of them: 2 P M = {scale(2.0 * parameters() * TOKENS)} operations, {forward:.0f} s.",
            ]
        )
        + "\n"
    )


def parameters() -> int:
    """P."""
    return sum(shape.width_in * shape.width_out * shape.count for shape in SHAPES)


def cost(kind: str, rates: Rates) -> Cost:
    """Of a kind, as if one process did it all."""
    shares = {"share_in": SHARE, "share_out": SHARE}
    return constraint_cost(kind, SHAPES, rates, samples=TOKENS, **shares)  # type: ignore[arg-type]


def line(name: str, whole: Cost, rates: Rates, bytes_shown: bool) -> tuple[str, ...]:
    """A row: bytes of the whole, and seconds where everything but a single decomposition is shared out evenly."""
    largest = max(shape.width_in for shape in SHAPES) if whole.held_bytes < 1e18 else TOKENS
    decomposing = max(whole.decomposing_seconds / ACCELERATORS, rates.decomposed(largest))
    sent = whole.exchanged_bytes
    return (
        name,
        f"{scale(whole.gathering_bytes)} B",
        f"{scale(whole.held_bytes)} B",
        duration(whole.gathering_seconds / ACCELERATORS),
        duration(decomposing),
        duration(whole.projecting_seconds / ACCELERATORS),
        f"{scale(sent)} B" if bytes_shown else f"{scale(sent)} B, {duration(2.0 * sent / ACCELERATORS / LINK)}",
    )


def scale(number: float) -> str:
    """Two digits and a power of ten."""
    mantissa, _, power = f"{number:.1e}".partition("e")
    return f"{mantissa}e{int(power)}"


def duration(seconds: float) -> str:
    """In the unit that leaves few digits; beyond a year by its power of ten."""
    year = 365.25 * 86_400
    for unit, size in (("ms", 1e-3), ("s", 1.0), ("min", 60.0), ("h", 3600.0), ("days", 86_400.0), ("years", year)):
        limit = {"ms": 1.0, "s": 120.0, "min": 7200.0, "h": 172_800.0, "days": 2.0 * year}.get(unit, float("inf"))
        if seconds < limit:
            return f"{scale(seconds / size)} {unit}" if unit == "years" else f"{seconds / size:.2g} {unit}"
    raise AssertionError("no number of seconds is beyond years")


if __name__ == "__main__":
    path = ROOT / "docs" / "scale.md"
    sys.stdout.write(f"{path.relative_to(ROOT)}\n")
    path.write_text(page(path.read_text(encoding="utf-8"), ROOT / "runs" / "reference"), encoding="utf-8")
