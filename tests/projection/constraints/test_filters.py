"""Spectral filters against their formulas, SciPy roots and limits."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nsrl.projection import Budget, Hard, ScaledGradient, SmallestMultiple, Tikhonov
from tests.projection.builders import normal

FILTERS = [
    Hard(),
    Hard(rank=2),
    Hard(tolerance=0.1),
    Hard(energy=0.9),
    Tikhonov(0.3),
    ScaledGradient(5.0),
    Budget(0.05),
    SmallestMultiple(3.0),
]
every_filter = pytest.mark.parametrize("filter", FILTERS, ids=str)
spectra = st.lists(st.floats(0.0, 10.0), min_size=1, max_size=12).map(lambda s: torch.tensor(s, dtype=torch.float64))


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@every_filter
@given(values=spectra, seed=st.integers(0, 100))
def test_fractions_grow_with_the_eigenvalue_and_stay_in_the_unit_interval(filter, values, seed):
    values = values.unique()  # ascending; among equal eigenvalues the choice of a rank is arbitrary
    fractions = filter.removed(values, normal(len(values), seed=seed))
    assert fractions.shape == values.shape
    assert bool(((fractions >= 0.0) & (fractions <= 1.0)).all())
    assert bool((fractions.diff() >= -1e-12).all())


@every_filter
@given(values=spectra, data=st.data())
def test_fractions_follow_a_permutation(filter, values, data):
    values = values.unique()
    order = torch.tensor(data.draw(st.permutations(range(len(values)))))
    components = normal(len(values))
    torch.testing.assert_close(
        filter.removed(values[order], components[order]), filter.removed(values, components)[order]
    )


@every_filter
@given(values=spectra, data=st.data())
def test_protected_directions_are_removed_whatever_their_value(filter, values, data):
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    assert bool((filter.removed(values, normal(len(values)), mask)[mask] == 1.0).all())


@pytest.mark.parametrize("filter", [Hard(), Hard(energy=1.0), Hard(tolerance=0.0)])
def test_hard_removes_all_but_round_off(filter):
    assert filter.removed(numbers(1e-3, 2.0, 1e-16, 0.0)).tolist() == [1, 1, 0, 0]
    assert Hard().removed(numbers(0.0, 0.0)).tolist() == [0, 0]
    assert Hard().removed(numbers()).shape == (0,)


def test_hard_by_rank_tolerance_and_energy():
    values = numbers(1.0, 5.0, 3.0, 1.0)  # the trace is 10
    assert Hard(rank=2).removed(values).tolist() == [0, 1, 1, 0]
    assert Hard(rank=0).removed(values).tolist() == [0, 0, 0, 0]
    assert Hard(rank=9).removed(values).tolist() == [1, 1, 1, 1]
    assert Hard(tolerance=0.5).removed(values).tolist() == [0, 1, 1, 0]
    assert Hard(tolerance=0.6).removed(values).tolist() == [0, 1, 0, 0]  # strictly above
    assert Hard(energy=0.5).removed(values).tolist() == [0, 1, 0, 0]
    assert Hard(energy=0.51).removed(values).tolist() == [0, 1, 1, 0]
    assert Hard(energy=0.8).removed(values).tolist() == [0, 1, 1, 0]
    assert Hard(energy=0.81).removed(values).sum() == 3


def test_hard_counts_what_is_protected_already():
    values, mask = numbers(1.0, 5.0, 3.0, 1.0), torch.tensor([True, False, True, False])
    assert Hard(energy=0.4).removed(values, None, mask).tolist() == [1, 0, 1, 0]  # 4 of 10 are held
    assert Hard(energy=0.5).removed(values, None, mask).tolist() == [1, 1, 1, 0]
    assert Hard(rank=1).removed(values, None, mask).tolist() == [1, 1, 1, 0]


@given(values=spectra, energy=st.floats(0.05, 1.0))
def test_energy_takes_the_smallest_leading_set(values, energy):
    taken = Hard(energy=energy).removed(values).bool()
    total = float(values.sum())
    assert float(values[taken].sum()) >= energy * total * (1 - 1e-10)
    if int(taken.sum()) > 0:
        assert float(values[taken].sum() - values[taken].min()) < energy * total


def test_tikhonov_is_the_damped_projector():
    matrix, vector, damping = normal(4, 6), normal(6, seed=1), 0.7
    values, basis = torch.linalg.eigh(matrix.T @ matrix)
    removed = Tikhonov(damping).removed(values.clamp_min(0.0))
    expected = vector - matrix.T @ torch.linalg.solve(matrix @ matrix.T + damping * torch.eye(4), matrix @ vector)
    torch.testing.assert_close(vector - basis @ (removed * (basis.T @ vector)), expected)


def test_scaled_gradient_uses_singular_values():
    features = normal(5, 3)
    _, singular, _ = torch.linalg.svd(features)
    importance = (1 + 4) * singular / (4 * singular + singular.max())
    removed = ScaledGradient(4.0).removed(torch.linalg.eigvalsh(features.T @ features).flip(0))
    torch.testing.assert_close(removed, importance)
    assert float(removed[0]) == pytest.approx(1.0)
    assert ScaledGradient(1.0).removed(numbers(0.0, 0.0)).tolist() == [0, 0]
    assert bool((ScaledGradient(1e12).removed(numbers(1.0, 1e-4)) > 0.9999).all())  # the hard limit


@given(seed=st.integers(0, 200), share=st.floats(0.01, 0.99))
def test_budget_spends_exactly_the_budget(seed, share):
    values, components = normal(6, seed=seed).square(), normal(6, seed=seed + 1)
    budget = share * 0.5 * float((values * components.square()).sum())

    def left(log_damping: float) -> float:
        rest = math.exp(log_damping) / (values.numpy() + math.exp(log_damping))
        return 0.5 * float(np.sum(values.numpy() * components.numpy() ** 2 * rest**2)) - budget

    damping = math.exp(scipy.optimize.brentq(left, -60, 40, xtol=1e-13))
    removed = Budget(budget).removed(values, components)
    torch.testing.assert_close(removed, values / (values + damping), rtol=1e-5, atol=1e-7)


def test_budget_at_its_ends():
    values, components = numbers(2.0, 1.0, 0.0), numbers(1.0, 1.0, 5.0)
    assert Budget(1.5).removed(values, components).tolist() == [0, 0, 0]  # 1/2 (2 + 1) is just inside
    assert Budget(0.0).removed(values, components).tolist() == [1, 1, 0]
    # what is protected is removed and spends nothing
    mask = torch.tensor([True, False, False])
    assert Budget(0.5).removed(values, components, mask).tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="components"):
        Budget(0.1).removed(values)


def test_smallest_multiple_is_anchored_to_round_off():
    real = numbers(4.0, 1.0, 0.5)
    assert SmallestMultiple(10.0).removed(torch.cat([real, numbers(1e-17)])).tolist() == [1, 1, 1, 0]
    assert SmallestMultiple(10.0).removed(torch.cat([real, numbers(0.1)])).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    "make,match",
    [
        (lambda: Hard(rank=1, energy=0.5), "one of"),
        (lambda: Hard(rank=-1), "rank"),
        (lambda: Hard(energy=0.0), "energy"),
        (lambda: Hard(energy=1.1), "energy"),
        (lambda: Hard(tolerance=1.0), "tolerance"),
        (lambda: Tikhonov(0.0), "damping"),
        (lambda: ScaledGradient(-1.0), "alpha"),
        (lambda: Budget(-0.1), "budget"),
        (lambda: Budget(math.nan), "budget"),
        (lambda: SmallestMultiple(0.5), "multiple"),
    ],
)
def test_nonsense_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
