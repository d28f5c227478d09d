"""Scaling curves: exponents of known power laws, operation counts, and the figure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsrl.bench.speed import scaling
from nsrl.bench.speed.report import draw_scaling
from nsrl.bench.speed.scaling import (
    SWEEPS,
    Sizes,
    dense_operations,
    factored_operations,
    fit_exponent,
    measure_scaling,
    upper_half,
)


@given(st.floats(-2.0, 4.0), st.floats(1e-6, 1e3), st.lists(st.integers(1, 10**6), min_size=2, max_size=8, unique=True))
def test_the_exponent_of_a_power_law_is_found(exponent: float, factor: float, sizes: list[int]) -> None:
    assert fit_exponent(sizes, [factor * size**exponent for size in sizes]) == pytest.approx(exponent, abs=1e-6)


def test_noise_moves_the_exponent_little_and_one_point_has_none() -> None:
    sizes = [2**n for n in range(8)]
    noise = (0.05 * torch.randn(8)).exp().tolist()
    assert fit_exponent(sizes, [n * size**1.5 for n, size in zip(noise, sizes, strict=True)]) == pytest.approx(
        1.5, abs=0.1
    )
    assert fit_exponent([3], [1.0]) != fit_exponent([3], [1.0])


def test_the_fit_is_over_the_upper_half_but_over_three_points_at_least() -> None:
    assert upper_half([1, 2, 3, 4, 5, 6, 7]) == [4, 5, 6, 7]
    assert upper_half([1, 2, 3, 4]) == [2, 3, 4] and upper_half([1, 2]) == [1, 2]


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweep.symbol)
def test_sizes_are_those_of_the_network(sweep: scaling.Sweep) -> None:
    sizes = sweep.points(quick=True)[1]
    problem = sizes.problem()
    assert sum(parameter.numel() for parameter in problem.model.parameters()) == sizes.parameters == problem.parameters
    assert problem.rows == sizes.rows
    assert sweep.abscissa(sizes) == (sizes.parameters if sweep.symbol == "P" else getattr(sizes, sweep.field))


def slope(operations, field: str, values: list[int], **others: int) -> float:
    return fit_exponent(values, [operations(replace(Sizes(**others), **{field: value})) for value in values])


def test_operation_counts_have_the_exponents_of_the_theory() -> None:
    large = [2**12, 2**13, 2**14]
    # Novak et al. 2022, table 1: contraction N^2 O^2 P; factors N^2 O^2 width
    assert slope(dense_operations, "samples", large) == pytest.approx(2.0, abs=0.01)
    assert slope(factored_operations, "samples", large) == pytest.approx(2.0, abs=0.02)
    assert slope(factored_operations, "outputs", [32, 64, 128], width=4096, samples=2**14) == pytest.approx(
        2.0, abs=0.03
    )
    assert slope(dense_operations, "width", large) == pytest.approx(2.0, abs=0.01)
    assert slope(factored_operations, "width", [64, 128, 256], samples=4096) == pytest.approx(1.0, abs=0.1)
    # positions: squared while the factors are used, at most linear once a layer is materialised
    assert slope(factored_operations, "positions", [2, 4, 8], width=4096, samples=512) > 1.5
    assert slope(factored_operations, "positions", large) <= 1.0
    assert factored_operations(Sizes()) < dense_operations(Sizes()) / 50


def test_curves_are_measured_and_drawn(tmp_path: Path, monkeypatch) -> None:
    small = Sizes(samples=4, outputs=2, width=8)
    monkeypatch.setattr(scaling, "SWEEPS", tuple(replace(sweep, values=(4, 8, 16, 32), base=small) for sweep in SWEEPS))
    monkeypatch.setattr(scaling, "LARGEST_DENSE", 12_000)
    sweeps = measure_scaling(repeats=1)
    assert [sweep["symbol"] for sweep in sweeps] == ["N", "O", "P", "T"]
    for sweep in sweeps:
        ours, rival = sweep["methods"]["nsrl"], sweep["methods"][scaling.RIVAL]
        assert len(ours["points"]) == 4 >= len(rival["points"]) and all(p["seconds"] > 0 for p in ours["points"])
        assert ours["fitted_from"] == ours["points"][1]["at"]
        at = [point["at"] for point in ours["points"][1:]]
        assert ours["exponent"] == pytest.approx(fit_exponent(at, [p["seconds"] for p in ours["points"][1:]]))
    # a dense Jacobian that would be too large is not made
    assert len(sweeps[0]["methods"][scaling.RIVAL]["points"]) == 4
    assert len(sweeps[2]["methods"][scaling.RIVAL]["points"]) < 4
    assert draw_scaling(sweeps, tmp_path / "speed.png").stat().st_size > 20_000
