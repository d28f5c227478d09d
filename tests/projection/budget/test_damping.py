"""The scalar root behind the budget: 1/2 sum w (l / (s + l))^2 = target."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from nsrl.projection.budget.model import solve_damping
from tests.tolerances import ROOT

numbers = st.floats(1e-8, 1e4)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def remainder(values: torch.Tensor, weights: torch.Tensor, damping: float) -> float:
    return 0.5 * sum(w * (damping / (s + damping)) ** 2 for s, w in zip(values.tolist(), weights.tolist(), strict=True))


@st.composite
def spectra(draw):
    size = draw(st.integers(1, 8))
    values = tensor(*draw(st.lists(numbers, min_size=size, max_size=size)))
    return values, tensor(*draw(st.lists(st.one_of(st.just(0.0), numbers), min_size=size, max_size=size)))


@given(spectrum=spectra(), share=st.floats(1e-6, 0.999))
def test_root(spectrum, share):
    values, weights = spectrum
    target = share * 0.5 * float(weights.sum())
    assume(target > 0)
    damping = solve_damping(values, weights, target)
    assert 0 < damping < math.inf
    assert remainder(values, weights, damping) == pytest.approx(target, rel=1e-5)
    assert remainder(values, weights, damping) <= target * (1 + 1e-12)  # rather inside than outside of the budget


@given(spectrum=spectra(), shares=st.tuples(st.floats(1e-4, 1.5), st.floats(1e-4, 1.5)))
def test_monotone_in_the_target(spectrum, shares):
    values, weights = spectrum
    small, large = (solve_damping(values, weights, share * 0.5 * float(weights.sum())) for share in sorted(shares))
    assert small <= large * (1 + ROOT)  # the halving starts from the target


@given(spectrum=spectra(), share=st.floats(1e-3, 0.99), factor=st.sampled_from([1e-12, 1e-3, 1e3, 1e12]))
def test_scales_with_the_eigenvalues(spectrum, share, factor):
    values, weights = spectrum
    target = share * 0.5 * float(weights.sum())
    assume(target > 0)
    damping = solve_damping(values, weights, target)
    assert solve_damping(factor * values, weights, target) == pytest.approx(factor * damping, rel=1e-5)
    assert solve_damping(values, factor * weights, factor * target) == pytest.approx(damping, rel=1e-5)


@pytest.mark.parametrize(
    "values,weights,target,expected",
    [
        ((1.0, 0.5), (1.0, 1.0), 1.0, math.inf),  # the total is exactly the target
        ((1.0, 0.5), (1.0, 1.0), 2.0, math.inf),
        ((1.0, 0.5), (0.0, 0.0), 0.0, math.inf),  # nothing to remove
        ((), (), 0.0, math.inf),
        ((0.0, 0.0), (1.0, 1.0), 0.5, 0.0),  # nothing can be removed
        ((1.0, 0.0), (1.0, 1.0), 0.4, 0.0),  # half of it cannot be removed
        ((1.0, 0.0), (1.0, 1.0), 0.5, 0.0),  # ... exactly the other half
        ((1.0, 0.5), (1.0, 1.0), 0.0, 0.0),
        ((1.0, 0.5), (1.0, 1.0), -1.0, 0.0),
        ((4.0,), (2.0,), 0.25, 4.0),  # (l / (4 + l))^2 = 1/4
        ((1.0, 0.0), (1.0, 1.0), 0.5 + 0.5 / 9, 0.5),  # (l / (1 + l))^2 = 1/9 above what cannot be removed
    ],
)
def test_edges(values, weights, target, expected):
    assert solve_damping(tensor(*values), tensor(*weights), target) == pytest.approx(expected, rel=1e-6, abs=1e-7)
