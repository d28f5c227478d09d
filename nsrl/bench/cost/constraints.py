"""What a constraint costs, forecast from the shapes of the layers and measured, up to a hundred million parameters.

    nsrl bench cost

Features and Kronecker factors on the linear layers of a language model (random weights and inputs: the time of a
product does not depend on what is in it), the full Jacobian on a policy. Processor time on one thread. The rates are
measured first, in the same process; everything else is forecast from them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from nsrl.projection.budget.projection import SpectralProjection
from nsrl.projection.constraints.cost import Cost, LayerShape, Rates, constraint_cost, measure_rates
from nsrl.projection.constraints.features import FeatureConstraint
from nsrl.projection.constraints.kronecker import KroneckerConstraint
from nsrl.projection.constraints.thin import ThinProjection
from nsrl.projection.jacobians.columns import parameter_columns
from nsrl.projection.jacobians.linearise import jacobian
from nsrl.projection.optimizer import FlatParameters
from nsrl.runs.machine import describe_environment
from nsrl.runs.report import Table

#: d_in and d_out of the linear layers of a block of SmolLM2-135M, which has thirty.
BLOCK = ((576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576))
BLOCKS = (1, 30)
#: Retained tokens, and the shares of a layer's directions that are protected.
SAMPLES, SHARE_IN, SHARE_OUT = 1024, 0.25, 0.25
#: States and outputs of the policy that the full Jacobian is measured on, and its widths.
POLICY, STATES, OUTPUTS = (48, 192, 192), (96, 192), 8
#: What is compared.
PARTS = ("gathering_seconds", "decomposing_seconds", "projecting_seconds", "gathering_bytes", "held_bytes")
#: The factor that a forecast is to be within.
WITHIN = 1.5


def measure_costs(quick: bool = False, told: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Forecast and measured cost of every kind and size.

    Args:
        quick: the smallest of each, whose times mean little.
        told: how far it is.
    """
    rates = measure_rates()
    told(f"products {rates.single:.3g} / {rates.double:.3g} operations a second (float32 / float64)")
    rows = []
    for states in STATES[:1] if quick else STATES:
        widths = [*POLICY, OUTPUTS]
        shapes = [LayerShape(a + 1, g) for a, g in pairwise(widths)]
        cost = constraint_cost("jacobian", shapes, rates, samples=states, outputs=OUTPUTS)
        rows.append(_row("jacobian", cost, measure_jacobian(widths, states), rows=states * OUTPUTS))
        told(_sentence(rows[-1]))
    for blocks in BLOCKS[:1] if quick else BLOCKS:
        shapes = [LayerShape(a, g, blocks) for a, g in BLOCK]
        for kind, measure in (("features", measure_features), ("kronecker", measure_kronecker)):
            cost = constraint_cost(
                kind,  # type: ignore[arg-type]
                shapes,
                rates,
                samples=SAMPLES,
                share_in=SHARE_IN,
                share_out=SHARE_OUT,
            )
            rows.append(_row(kind, cost, measure(blocks), rows=SAMPLES))
            told(_sentence(rows[-1]))
    return {
        "command": "nsrl bench cost",
        "rates": asdict(rates),
        "samples": SAMPLES,
        "shares": {"in": SHARE_IN, "out": SHARE_OUT},
        "within": WITHIN,
        "rows": rows,
        "threads": torch.get_num_threads(),
        "machine": describe_environment(),
    }


def read_rates(content: dict[str, Any]) -> Rates:
    """The rates of a study, as it wrote them."""
    found = content["rates"]
    return Rates(
        found["single"], found["double"], found["stream"], found["call"], {int(n): s for n, s in found["eigh"].items()}
    )


def _row(kind: str, cost: Cost, measured: dict[str, float | None], rows: int) -> dict[str, Any]:
    forecast = {part: getattr(cost, part) for part in PARTS}
    if kind == "jacobian":  # its two parts are one call
        forecast["gathering_seconds"] += forecast.pop("decomposing_seconds")
        measured = {part: value for part, value in measured.items() if part != "decomposing_seconds"}
    found = {part: value for part, value in measured.items() if value is not None}
    return {
        "kind": kind,
        "parameters": cost.parameters,
        "samples": rows,
        "forecast": {part: forecast[part] for part in found},
        "measured": found,
        "ratio": {part: forecast[part] / found[part] for part in found},
    }


def _sentence(row: dict[str, Any]) -> str:
    ratios = ", ".join(
        f"{part.partition('_')[0]} {row['ratio'][part]:.2f}" for part in PARTS[:3] if part in row["ratio"]
    )
    return f"{row['kind']}, {row['parameters']:,} parameters: forecast over measured {ratios}"


def _blocks(count: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleList(nn.ModuleList(nn.Linear(a, g, bias=False) for a, g in BLOCK) for _ in range(count))


def _samples(width: int, share: float, generator: torch.Generator) -> Tensor:
    """M rows of a subspace that is a share of all directions, (M, width)."""
    rank = int(share * width)
    return torch.randn(SAMPLES, rank, generator=generator) @ torch.randn(rank, width, generator=generator)


def measure_features(blocks: int) -> dict[str, float | None]:
    """Processor seconds and bytes of layer features, from the samples to a projection in place."""
    module, generator = _blocks(blocks), torch.Generator().manual_seed(1)
    constraint = FeatureConstraint(module)
    inputs = {width: _samples(width, SHARE_IN, generator) for width in {a for a, _ in BLOCK}}
    start = time.process_time()
    for part in constraint.moments.values():
        part.add(inputs[part.layer.width_in])
    gathered, size = time.process_time(), constraint.nbytes()
    constraint.consolidate()
    thin = ThinProjection.of(constraint)
    return _projected(module, thin, start, gathered, size)


def measure_kronecker(blocks: int) -> dict[str, float | None]:
    """The same of Kronecker factors, with one drawn output a sample."""
    module, generator = _blocks(blocks), torch.Generator().manual_seed(1)
    constraint = KroneckerConstraint(parameter_columns(module))
    inputs = {width: _samples(width, SHARE_IN, generator) for width in {a for a, _ in BLOCK}}
    grads = {width: _samples(width, SHARE_OUT, generator).unsqueeze(1) for width in {g for _, g in BLOCK}}
    start = time.process_time()
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            constraint.add_layer(name, inputs[layer.in_features], grads[layer.out_features])
    gathered, size = time.process_time(), constraint.nbytes()
    thin = ThinProjection.of_factors(constraint)
    return _projected(module, thin, start, gathered, size)


def _projected(
    module: nn.Module, thin: ThinProjection, start: float, gathered: float, size: int
) -> dict[str, float | None]:
    decomposed = time.process_time()
    parameters = list(module.parameters())
    begin = FlatParameters(parameters).read()
    seconds = []
    for _ in range(3):
        with torch.no_grad():
            for p in parameters:
                p.add_(1e-4)
        before = time.process_time()
        thin.retract(parameters, begin)
        seconds.append(time.process_time() - before)
    return {
        "gathering_seconds": gathered - start,
        "decomposing_seconds": decomposed - gathered,
        "projecting_seconds": sorted(seconds)[1],
        "gathering_bytes": float(size),
        "held_bytes": float(thin.nbytes()),
    }


def measure_jacobian(widths: Sequence[int], states: int) -> dict[str, float | None]:
    """Processor seconds of the full Jacobian's Gram matrix and its decomposition, and of a projection in a budget."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, g in pairwise(widths):
        layers += [nn.Linear(a, g), nn.Tanh()]
    module = nn.Sequential(*layers[:-1])
    rows = jacobian(module, torch.randn(states, widths[0]), scale=states**-0.5)
    start = time.process_time()
    solver = SpectralProjection(rows, torch.zeros(rows.shape[0], dtype=torch.float64), divergence=0.0)
    made, seconds = time.process_time(), []
    for _ in range(3):
        way = torch.randn(rows.shape[1])
        before = time.process_time()
        solver.project(way, budget=0.01)
        seconds.append(time.process_time() - before)
    return {"gathering_seconds": made - start, "projecting_seconds": sorted(seconds)[1]}


def cost_table(content: dict[str, Any]) -> Table:
    """A line a kind and size: measured seconds, and forecast over measured."""

    def cell(row: dict[str, Any], part: str) -> str:
        if part not in row["measured"]:
            return "-"
        return f"{row['measured'][part]:.2g} s ({row['ratio'][part]:.2f})"

    rows = tuple(
        (
            row["kind"],
            f"{row['parameters'] / 1e6:.3g} M",
            f"{row['samples']:,}",
            *(cell(row, part) for part in PARTS[:3]),
            "-" if "held_bytes" not in row["measured"] else f"{row['measured']['held_bytes'] / 2**20:.0f} MiB",
        )
        for row in content["rows"]
    )
    head = ("", "parameters", "rows", "gathering", "decomposing", "a projection", "held")
    return Table(head, rows, "one thread; in brackets forecast over measured")


def outside(content: dict[str, Any]) -> list[str]:
    """A sentence for every forecast that is not within the factor of what was measured."""
    return [
        f"{row['kind']} at {row['parameters']:,} parameters: {part} forecast at {ratio:.2f} times what it was"
        for row in content["rows"]
        for part, ratio in row["ratio"].items()
        if not 1.0 / content["within"] <= ratio <= content["within"]
    ]
