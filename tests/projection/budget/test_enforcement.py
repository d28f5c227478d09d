"""Enforcement on a problem whose KL is exactly its model, so that where it must end is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from nsrl.projection import jacobian
from nsrl.projection.budget.enforcement import Enforcement
from nsrl.projection.budget.model import Quadratic
from nsrl.projection.budget.multiplier import Multiplier
from nsrl.projection.jacobians.factored import Jacobian
from nsrl.projection.optimizer import FlatParameters


class Linear:
    """Outputs of a linear layer, held at those it had: KL = mean |dz|^2 / 2, quadratic in the weights."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(5, 3).double()
        self.inputs = torch.randn(20, 5, generator=generator, dtype=torch.float64)
        self.reference = self.layer(self.inputs).detach()
        self.parameters = FlatParameters(list(self.layer.parameters()))
        self.feasible = self.parameters.read()
        self.way = torch.randn(self.feasible.shape, generator=generator, dtype=torch.float64)
        self.measured = 0

    def binding_divergence(self) -> float:
        self.measured += 1
        kl = 0.5 * float((self.layer(self.inputs) - self.reference).detach().square().sum(1).mean())
        return kl if math.isfinite(kl) else math.inf

    def restoration(self) -> Quadratic[Jacobian]:
        scale = len(self.inputs) ** -0.5
        rows = jacobian(self.layer, self.inputs, scale=scale)
        residual = ((self.layer(self.inputs).detach() - self.reference) * scale).flatten()
        return Quadratic(rows, residual, 0.5 * float(residual.square().sum()))

    def move(self, length: float | Tensor) -> float:
        self.parameters.write(self.feasible + length * self.way)
        return self.binding_divergence()


def test_one_restoration_of_a_quadratic_kl_reaches_its_aim() -> None:
    problem = Linear()
    kl = problem.move(1.0)
    reached, made = Enforcement(problem, limit=0.1 * kl, aim=0.08 * kl, steps=4).restore_inside(kl)
    # the Krylov solver stops at 2 % of the aim
    assert made == 1 and reached == problem.binding_divergence() == pytest.approx(0.08 * kl, rel=0.05)


def test_nothing_is_done_inside_the_limit_or_where_the_model_has_diverged() -> None:
    problem = Linear()
    kl = problem.move(1.0)
    before = problem.parameters.read()
    for limit, given in ((2.0 * kl, kl), (0.1 * kl, math.inf)):
        assert Enforcement(problem, limit, 0.5 * limit, 4).restore_inside(given) == (given, 0)
    assert torch.equal(problem.parameters.read(), before)


def test_a_restoration_that_does_not_help_leaves_the_parameters_alone() -> None:
    problem = Linear()
    kl = problem.move(1.0)
    before = problem.parameters.read()
    problem.binding_divergence = lambda: 2.0 * kl  # type: ignore[method-assign]
    assert Enforcement(problem, 0.1 * kl, 0.08 * kl, 4).restore_inside(kl) == (kl, 1)
    assert torch.equal(problem.parameters.read(), before)


@pytest.mark.parametrize("share", [0.9, 0.25, 1e-3])
def test_falling_back_finds_the_farthest_point_of_the_segment_inside(share: float) -> None:
    """KL grows with the square of the length, so that the point is sqrt(share) of the way."""
    problem = Linear()
    kl = problem.move(1.0)
    Enforcement(problem, share * kl, 0.5 * share * kl, 4, bisections=20).fall_back(problem.feasible)
    assert problem.binding_divergence() <= share * kl
    length = float((problem.parameters.read() - problem.feasible).norm() / problem.way.norm())
    assert math.sqrt(share) - length == pytest.approx(0.0, abs=2.0**-20 + 1e-12)


def test_falling_back_from_nan_ends_at_the_feasible_parameters() -> None:
    problem = Linear()
    problem.move(math.nan)
    Enforcement(problem, 0.1, 0.05, 4).fall_back(problem.feasible)
    assert torch.equal(problem.parameters.read(), problem.feasible)


@pytest.mark.parametrize("relative", [True, False])
def test_a_multiplier_settles_where_the_kl_meets_its_target(relative: bool) -> None:
    """A plant whose KL falls with the multiplier, KL = 0.04 / (1 + m): the target 0.01 is met at m = 3."""
    multiplier = Multiplier(0.01, 0.05, 0.3, start=1e-3, floor=1e-4, ceiling=1e4, relative=relative)
    value = 0.0
    for _ in range(2000):
        value = multiplier.update(0.04 / (1.0 + value))
    assert value == pytest.approx(3.0, rel=1e-6)
