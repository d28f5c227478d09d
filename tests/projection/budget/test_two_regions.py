"""The step inside two trust regions, against the dual problem in dense algebra and SciPy's constrained minimiser."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar
from torch import Tensor

from nsrl.projection.budget.model import Quadratic
from nsrl.projection.budget.natural_gradient import LocalModel, Step
from nsrl.projection.budget.two_regions import ROUND_OFF, Multipliers, retained_step
from tests.tolerances import unit


@dataclass(frozen=True)
class Dense:
    """A materialised Jacobian."""

    rows: Tensor

    def matvec(self, vector: Tensor) -> Tensor:
        return self.rows @ vector

    def rmatvec(self, rows: Tensor) -> Tensor:
        return self.rows.T @ rows

    def factors(self) -> list[object]:
        return []


def problem(
    size: int,
    seed: int,
    *,
    offset: float = 0.0,
    damping: float = 0.0,
    radius: float = 0.01,
    ranks: tuple[int, int] | None = None,
) -> tuple[LocalModel, Quadratic]:
    """A random one; `offset` is the size of rho, so that KL(0) = offset^2 / 2."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    first, second = ranks or (size + 2, size + 2)
    fisher, buffer = draw(first, size) / first**0.5, draw(second, size) / second**0.5
    residual = draw(second)
    residual *= offset / float(residual.norm())
    local = LocalModel(Dense(fisher), draw(size), radius, damping, iterations=4 * size, precision=1e-10)
    return local, Quadratic(Dense(buffer), residual, 0.5 * offset**2)


def ceiling(local: LocalModel, retention: Quadratic, budget: float) -> float:
    """What no step inside both regions gains more than; what the best one gains. Minus infinity where there is none.

    For any mu >= 0 both regions lie in the ellipsoid q1 + mu q2 <= 0, q1 and q2 being what the two KLs exceed their
    bounds by. A linear function's extreme on an ellipsoid is a formula, and the least one over all mu is reached by a
    point inside both (duality without a gap, as both are convex). It is found here on the dense matrices, on a grid of
    mu and then by SciPy's scalar search: no subspace, no conjugate gradients, no root.
    """
    fisher, buffer = local.fisher.rows.numpy(), retention.jacobian.rows.numpy()
    gradient, slope = local.gradient.numpy(), buffer.T @ retention.residual.numpy()
    first, second = fisher.T @ fisher + local.damping * np.eye(len(gradient)), buffer.T @ buffer

    def bound(logarithm: float) -> float:
        mu = math.exp(logarithm)
        form = first + mu * second
        scale = np.sqrt(np.diag(form))  # mu changes the scale of the columns, and with it the condition
        solved = np.linalg.solve(form / np.outer(scale, scale), np.stack([gradient, slope], 1) / scale[:, None])
        solved /= scale[:, None]
        room = local.radius + mu * (budget - retention.divergence) + 0.5 * mu**2 * (slope @ solved[:, 1])
        if room < 0.0:
            return -math.inf
        return mu * (gradient @ solved[:, 1]) + math.sqrt(2.0 * room * (gradient @ solved[:, 0]))

    # from where the buffer's region says nothing yet, in the natural unit of mu: the ratio of what the KLs may be
    least = 1e-8 * min(local.radius / max(budget, retention.divergence, 1e-300), 1.0)
    grid = np.linspace(math.log(least), math.log(1e12), 100)
    bounds = [bound(point) for point in grid]
    best = int(np.argmin(bounds))
    if math.isinf(bounds[best]):
        return -math.inf
    around = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    refined = minimize_scalar(
        lambda t: max(bound(t), -1e300), bounds=around, method="bounded", options={"xatol": 1e-11}
    )
    return min(bounds[best], float(refined.fun)) if refined.fun > -1e299 else -math.inf


def check(local: LocalModel, retention: Quadratic, budget: float, step: Step, key: object = None) -> None:
    """A step keeps to both regions, and gains what the best one there does.

    Three things part the two. Round-off may carry the step over either bound by `SLACK` of what is measured there and
    by u / ROUND_OFF of the sum of both forms, which are made diagonal together in directions whose condition ends at
    1 / ROUND_OFF: then a bound that is as much larger is what allows its gain. Multipliers end at 1e12, where a share
    1e-12 of the rollout's radius is left unused of the budget. And a gain near 0 is known to round-off of its terms,
    |g| times the length of the step, only.
    """
    kl = 0.5 * float(local.fisher.matvec(step.displacement).square().sum())
    retained = retention.predict(step.displacement)
    # With damping, F's length is the radius and the metric another: the best step no longer than this one, in that.
    damped = kl + 0.5 * local.damping * float(step.displacement.square().sum())
    measured = max(budget, retention.divergence)
    slack = 1e-6 * measured + unit(torch.float64) / ROUND_OFF * (damped + retained)
    assert kl <= local.radius * (1 + 1e-6), key
    assert step.retained == pytest.approx(retained, rel=0.0, abs=slack), key
    inside = replace(local, radius=damped if local.damping else local.radius)
    if math.isinf(ceiling(inside, retention, budget)) or (local.damping and retained > budget + slack):
        assert retained <= measured + slack, key  # out of reach: no further away
        return
    assert retained <= budget + slack, key
    least = ceiling(inside, retention, budget - 4e-12 * local.radius)
    most = ceiling(replace(inside, radius=max(inside.radius, damped)), retention, max(budget, retained))
    round_off = 1e-9 * float(local.gradient.norm() * step.displacement.norm())
    assert least - 1e-6 * abs(least) - round_off <= step.gain <= most + 1e-6 * abs(most) + round_off, key


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_the_ceiling_is_what_a_constrained_minimiser_reaches(seed: int, share: float) -> None:
    """SLSQP stops early at times, and where depends on the machine: the best of several starts is near."""
    local, retention = problem(5, seed, offset=(2 * share * 0.01) ** 0.5)
    fisher, buffer = local.fisher.rows.numpy(), retention.jacobian.rows.numpy()
    gradient, residual = local.gradient.numpy(), retention.residual.numpy()

    def room(d: np.ndarray) -> np.ndarray:
        return 1.0 - 0.5 * np.array([np.sum((fisher @ d) ** 2), np.sum((residual + buffer @ d) ** 2)]) / 0.01

    def slope(d: np.ndarray) -> np.ndarray:
        return -np.stack([fisher.T @ (fisher @ d), buffer.T @ (residual + buffer @ d)]) / 0.01

    best, bound = 0.0, ceiling(local, retention, 0.01)
    for start in range(5):
        guess = 0.02 * np.random.default_rng(start).standard_normal(5) if start else np.zeros(5)
        found = minimize(
            lambda d: gradient @ d,
            guess,
            jac=lambda d: gradient,
            method="SLSQP",
            constraints={"type": "ineq", "fun": room, "jac": slope},
            options={"ftol": 1e-14},
        )
        if room(found.x).min() > -1e-9:
            best = max(best, -float(gradient @ found.x))
    assert bound * (1 - 1e-3) <= best <= bound * (1 + 1e-6)


@given(size=st.integers(2, 8), seed=st.integers(0, 2**32 - 1), budget=st.floats(1e-4, 0.02), share=st.floats(0.0, 5.0))
def test_it_gains_what_the_best_step_in_both_regions_gains(size: int, seed: int, budget: float, share: float) -> None:
    """The policy starts at a share of the budget, above 1 outside."""
    local, retention = problem(size, seed, offset=(2 * share * budget) ** 0.5)
    check(local, retention, budget, retained_step(local, retention, budget, rounds=6))


@pytest.mark.parametrize(
    ("size", "seed", "budget", "share"),
    [
        (2, 11, 0.015625, 0.5),
        (2, 11, 0.02, 0.99),
        (3, 8, 0.015625, 0.9),
        (3, 8, 0.02, 0.99),
        (3, 48, 0.005, 0.75),
        (4, 4, 0.005, 0.99),
        (4, 11, 0.015625, 0.75),
        (4, 76, 0.02, 0.9),
        (2, 84, 0.015625, 0.99),
        (5, 94, 0.001, 0.75),
        (4, 114, 0.02, 0.99),
        (2, 119, 0.02, 0.99),
        (2, 151, 0.015625, 0.75),
        (4, 158, 0.02, 0.9),
        (4, 194, 0.02, 0.75),
        (2, 195, 0.02, 0.99),
    ],
)
def test_a_step_that_leaves_one_region_where_it_enters_the_other_is_found(
    size: int, seed: int, budget: float, share: float
) -> None:
    local, retention = problem(size, seed, offset=(2 * share * budget) ** 0.5)
    step = retained_step(local, retention, budget, rounds=6)
    assert step.gain > 0.0
    check(local, retention, budget, step)


def touching(size: int, seed: int, share: float, overlap: float) -> tuple[LocalModel, Quadratic]:
    """A start at `share` > 1 of the budget 0.01, and a rollout's region that reaches it by so much of its radius."""
    local, retention = problem(size, seed, offset=(2 * share * 0.01) ** 0.5)
    fisher, buffer = local.fisher.rows, retention.jacobian.rows
    slope = buffer.T @ retention.residual

    def nearest(logarithm: float) -> Tensor:
        mu = math.exp(logarithm)
        return -mu * torch.linalg.solve(fisher.T @ fisher + mu * buffer.T @ buffer, slope)

    low, high = -30.0, 30.0
    for _ in range(70):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if retention.predict(nearest(middle)) > 0.01 else (low, middle)
    length = 0.5 * float((fisher @ nearest(high)).square().sum())
    return replace(local, radius=length * (1 + overlap)), retention


@pytest.mark.parametrize("overlap", [1e-1, 1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("seed", range(8))
def test_regions_that_barely_meet_are_no_regions_that_do_not(seed: int, overlap: float) -> None:
    local, retention = touching(2 + seed % 7, seed, 1.2, overlap)
    step = retained_step(local, retention, 0.01, rounds=6)
    assert step.retained <= 0.01 * (1 + 1e-6)
    check(local, retention, 0.01, step)


@given(
    size=st.integers(3, 8),
    seed=st.integers(0, 2**32 - 1),
    budget=st.floats(1e-9, 0.02),
    share=st.floats(0.0, 2.0),
    missing=st.tuples(st.integers(-2, 2), st.integers(-2, 2)),
    damping=st.sampled_from([0.0, 1e-3, 0.1, 1.0]),
)
def test_neither_rank_nor_damping_costs_a_step(
    size: int, seed: int, budget: float, share: float, missing: tuple[int, int], damping: float
) -> None:
    assume(damping > 0.0 or sum(missing) >= -size)  # or there are directions that neither region bounds
    check(*degenerate(size, seed, budget, share, missing, damping))


def degenerate(
    size: int, seed: int, budget: float, share: float, missing: tuple[int, int], damping: float
) -> tuple[LocalModel, Quadratic, float, Step]:
    """A problem whose Jacobians have so many rows more or fewer than columns, and its solution."""
    local, retention = problem(
        size, seed, offset=(2 * share * budget) ** 0.5, damping=damping, ranks=(size + missing[0], size + missing[1])
    )
    if not damping:  # a loss has no slope where the policy does not move
        local = replace(local, gradient=local.fisher.rmatvec(local.fisher.matvec(local.gradient)))
    return local, retention, budget, retained_step(local, retention, budget, rounds=6)


@pytest.mark.parametrize("rank", [3, 5, 9])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_budget_of_zero_is_not_exceeded(rank: int, share: float) -> None:
    """Its null space is `LocalModel.null_step`'s; what is asked here is that nothing grows."""
    for seed in range(10):
        local, retention = problem(6, seed, offset=(2 * share * 0.01) ** 0.5, ranks=(8, rank))
        step = retained_step(local, retention, 0.0, rounds=6)
        assert step.kl <= local.radius * (1 + 1e-6) and bool(torch.isfinite(step.displacement).all())
        assert retention.predict(step.displacement) <= retention.divergence * (1 + 1e-6)


def many(kind: str) -> Iterator[tuple[LocalModel, Quadratic, float, Step | None, object]]:
    """Some 6,000 problems of a kind."""
    sizes, seeds = range(2, 9), range(67)
    if kind == "touching":
        for key in product(sizes, seeds, (1.2, 2.0, 5.0), (1e-2, 1e-4, 1e-6, 1e-8)):
            yield *touching(*key), 0.01, None, key
    elif kind == "degenerate":
        missing = ((-1, 2), (2, -1), (-2, -1), (-2, -2))
        for key in product(range(3, 9), range(17), (1e-12, 1e-6, 0.015625), (0.0, 0.5, 1.2), missing, (0.0, 0.1)):
            if key[5] or sum(key[4]) >= -key[0]:
                yield *degenerate(*key), key
    else:
        shares = (0.0, 0.5, 0.99) if kind == "inside" else (1.0, 1.2, 5.0)
        for size, seed, budget, share in product(sizes, seeds, (1e-4, 1e-3, 0.015625, 0.02), shares):
            drawn = problem(size, seed, offset=(2 * share * budget) ** 0.5)
            yield *drawn, budget, None, (size, seed, budget, share)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["inside", "outside", "touching", "degenerate"])
def test_no_step_is_lost_among_many(kind: str) -> None:
    for local, retention, budget, step, key in many(kind):
        check(local, retention, budget, step or retained_step(local, retention, budget, rounds=6), key)


def test_an_inactive_budget_leaves_the_natural_gradient_alone() -> None:
    local, retention = problem(6, 0)
    step, free = retained_step(local, retention, 1e3), local.step()
    assert torch.equal(step.displacement, free.displacement) and step.multiplier == 0.0 and step.kept == 1.0
    assert step.retained == pytest.approx(retention.predict(free.displacement))


@pytest.mark.parametrize(("iterations", "rounds", "expected"), [(3, 0, 1.0), (10, 2, 0.1), (120, 2, 1e-9)])
def test_the_stationarity_condition_holds_to_the_reported_residual(iterations: int, rounds: int, expected: float):
    local, retention = problem(30, 1, offset=0.05, damping=0.1, ranks=(20, 15))
    local = replace(local, iterations=iterations)
    step = retained_step(local, retention, 0.002, rounds=rounds)
    fisher, buffer = local.fisher.rows, retention.jacobian.rows
    form = fisher.T @ fisher + 0.1 * torch.eye(30, dtype=torch.float64) + step.multiplier * buffer.T @ buffer
    slope = buffer.T @ retention.residual
    # s is the one number that is not reported: the best one
    left, along = form @ step.displacement + step.multiplier * slope, local.gradient
    scale = -float(left @ along) / float(along @ along)
    wanted = scale * along + step.multiplier * slope
    assert scale > 0.0
    assert float((left + scale * along).norm() / wanted.norm()) <= step.residual * (1 + 1e-2) + 1e-12
    assert step.residual < expected


def test_few_iterations_keep_to_both_regions_and_more_gain_more() -> None:
    gains = []
    for iterations, rounds in ((2, 0), (2, 1), (4, 2), (60, 4)):
        local, retention = problem(60, 2, offset=0.06, damping=0.05, ranks=(50, 40))
        local = replace(local, iterations=iterations)
        step = retained_step(local, retention, 0.002, rounds=rounds)
        assert step.kl <= local.radius * (1 + 1e-6) and step.retained <= 0.002 * (1 + 1e-6)
        gains.append(step.gain)
    assert gains == sorted(gains) and gains[-1] > 1.2 * gains[0] > 0.0


@pytest.mark.parametrize("guess", [Multipliers(0.05, 0.5), Multipliers(1e-4, 50.0), Multipliers(10.0, math.inf)])
def test_a_guess_changes_the_way_and_not_the_end(guess: Multipliers) -> None:
    local, retention = problem(30, 5, offset=0.05, damping=0.1, ranks=(40, 20))
    plain, guessed = (retained_step(local, retention, 0.002, guess=start, rounds=6) for start in (None, guess))
    assert guessed.gain == pytest.approx(plain.gain, rel=1e-4)
    assert guessed.multiplier == pytest.approx(plain.multiplier, rel=1e-2)
    assert guessed.kl <= local.radius * (1 + 1e-6) and guessed.retained <= 0.002 * (1 + 1e-6)


def test_a_good_guess_saves_iterations() -> None:
    local, retention = problem(200, 6, offset=0.05, damping=0.1, ranks=(150, 100))
    exact = retained_step(local, retention, 0.002, rounds=6)
    few = replace(local, iterations=10)
    good = Multipliers(exact.scale, exact.multiplier)
    gains = [retained_step(few, retention, 0.002, guess=guess, rounds=0).gain for guess in (None, good)]
    assert gains[0] < gains[1] <= exact.gain * (1 + 1e-6)


def test_a_guess_does_not_hide_that_the_budget_is_inactive() -> None:
    local, retention = problem(6, 0)
    step, free = retained_step(local, retention, 1e3, guess=Multipliers(1.0, 3.0)), local.step()
    assert torch.equal(step.displacement, free.displacement) and step.multiplier == 0.0


def test_a_tighter_budget_gains_less_and_has_a_larger_multiplier() -> None:
    local, retention = problem(20, 3, damping=0.1)
    steps = [retained_step(local, retention, budget) for budget in (1e-2, 1e-3, 1e-4, 1e-5)]
    gains, multipliers = [step.gain for step in steps], [step.multiplier for step in steps]
    assert gains == sorted(gains, reverse=True)
    # to the width that is halved down to; where the budget alone binds, it is the end of the range for all
    assert all(larger >= smaller * (1 - 1e-9) for smaller, larger in pairwise(multipliers))
    assert all(0.0 < step.kept <= 1.0 + 1e-9 for step in steps)


def test_a_policy_over_the_budget_is_not_led_further_away() -> None:
    """The budget is out of reach inside the rollout's region."""
    local, retention = problem(10, 4, offset=1.0, radius=1e-6)
    step = retained_step(local, retention, 1e-6)
    assert step.retained <= retention.divergence * (1 + 1e-9) and step.kl <= 1e-6 * (1 + 1e-6) and step.gain >= 0.0


def test_single_precision_is_enough() -> None:
    local, retention = problem(40, 5, offset=0.05, damping=0.1, ranks=(60, 30))
    exact = retained_step(local, retention, 0.002)
    local = LocalModel(Dense(local.fisher.rows.float()), local.gradient.float(), local.radius, 0.1, 40, 1e-4)
    retention = Quadratic(Dense(retention.jacobian.rows.float()), retention.residual.float(), retention.divergence)
    step = retained_step(local, retention, 0.002)
    assert step.displacement.dtype == torch.float32
    assert step.gain == pytest.approx(exact.gain, rel=1e-3) and step.retained <= 0.002 * (1 + 1e-4)


@pytest.mark.parametrize("guess", [None, Multipliers(1e15, 1e12)])
def test_single_precision_holds_the_multiplier_of_a_budget_that_alone_binds(guess: Multipliers | None) -> None:
    """Its end, 1e12, times the slope of rows of size 1e9, squared, is more than float32 has."""
    local, retention = problem(10, 7, offset=0.05)
    local = LocalModel(Dense(1e-3 * local.fisher.rows.float()), local.gradient.float(), 1e3, 0.1, 40, 1e-4)
    rows = 1e9 * retention.jacobian.rows.float()
    retention = Quadratic(Dense(rows), retention.residual.float(), retention.divergence)
    step = retained_step(local, retention, 0.002, guess=guess)
    assert step.multiplier == pytest.approx(1e12) and step.gain > 0.0
    assert math.isfinite(step.residual) and step.retained <= 0.002 * (1 + 1e-6)


@pytest.mark.parametrize("guess", [None, Multipliers(0.1, 1.0)])
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_without_a_gradient_there_is_no_step(offset: float, guess: Multipliers | None) -> None:
    """At the reference, where offset is 0, the buffer has none either: a guess has no direction to begin with."""
    local, retention = problem(5, 6, offset=offset)
    for value in (0.0, math.nan, math.inf):
        still = LocalModel(local.fisher, torch.full_like(local.gradient, value), 0.01, 0.1, 5)
        step = retained_step(still, retention, 1e-3, guess=guess)
        assert not step.displacement.any() and step.multiplier == 0.0
