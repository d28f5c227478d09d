"""The step inside two trust regions, against SciPy's constrained minimiser and dense algebra."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from nsrl.rl.natural import LocalModel
from nsrl.rl.trust import Multipliers, Quadratic, retained_step


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


def problem(size: int, seed: int, *, offset: float = 0.0, damping: float = 0.0, radius: float = 0.01,
            ranks: tuple[int, int] | None = None) -> tuple[LocalModel, Quadratic]:  # fmt: skip
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


def oracle(local: LocalModel, retention: Quadratic, budget: float) -> float:
    """Largest gain inside both regions, by SLSQP."""
    fisher, buffer = local.fisher.rows.numpy(), retention.jacobian.rows.numpy()
    gradient, residual = local.gradient.numpy(), retention.residual.numpy()
    shift = retention.divergence - 0.5 * residual @ residual
    constraints = [
        {"type": "ineq", "fun": lambda d: (local.radius - 0.5 * np.sum((fisher @ d) ** 2)) / local.radius,
         "jac": lambda d: -(fisher.T @ (fisher @ d)) / local.radius},
        {"type": "ineq", "fun": lambda d: (budget - shift - 0.5 * np.sum((residual + buffer @ d) ** 2)) / budget,
         "jac": lambda d: -(buffer.T @ (residual + buffer @ d)) / budget},
    ]  # fmt: skip
    found = minimize(lambda d: gradient @ d, np.zeros(len(gradient)), jac=lambda d: gradient, method="SLSQP",
                     constraints=constraints, options={"maxiter": 500, "ftol": 1e-14})  # fmt: skip
    return -float(found.fun)


@settings(max_examples=25)
@given(size=st.integers(2, 8), seed=st.integers(0, 200), budget=st.floats(1e-4, 0.02), share=st.floats(0.0, 0.99))
def test_it_gains_what_a_constrained_minimiser_gains(size: int, seed: int, budget: float, share: float) -> None:
    """With no damping the problem is exact; the policy starts at a share of the budget."""
    local, retention = problem(size, seed, offset=(2 * share * budget) ** 0.5)
    step = retained_step(local, retention, budget, rounds=6)
    assert step.kl <= local.radius * (1 + 1e-6) and step.retained <= budget * (1 + 1e-6)
    assert step.retained == pytest.approx(retention.predict(step.displacement), rel=1e-6)
    assert step.gain == pytest.approx(oracle(local, retention, budget), rel=2e-4)


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
    assert gains == sorted(gains, reverse=True) and multipliers == sorted(multipliers)
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


@pytest.mark.parametrize("guess", [None, Multipliers(0.1, 1.0)])
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_without_a_gradient_there_is_no_step(offset: float, guess: Multipliers | None) -> None:
    """At the reference, where offset is 0, the buffer has none either: a guess has no direction to begin with."""
    local, retention = problem(5, 6, offset=offset)
    for value in (0.0, math.nan, math.inf):
        still = LocalModel(local.fisher, torch.full_like(local.gradient, value), 0.01, 0.1, 5)
        step = retained_step(still, retention, 1e-3, guess=guess)
        assert not step.displacement.any() and step.multiplier == 0.0
