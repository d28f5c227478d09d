"""The restoration in the space of the parameters against dense algebra and the one in the space of the rows."""

from __future__ import annotations

import pytest
import torch

from nsrl.projection import jacobian
from nsrl.projection.budget.model import Quadratic
from nsrl.projection.budget.parameter_krylov import pull_to_reference


def model(rows: int = 60, outside: float = 0.0) -> tuple[Quadratic, torch.Tensor]:
    """A model of a linear layer, float64, whose residual lies in the range of J but for a share; and J."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 2).double()
    inputs = torch.randn(rows // 2, 4, dtype=torch.float64) * torch.logspace(0, -1, 4, dtype=torch.float64)
    factored = jacobian(layer, inputs)
    dense = factored.dense().double()
    residual = dense @ torch.randn(dense.shape[1], dtype=torch.float64)
    residual = residual + outside * torch.randn_like(residual)
    return Quadratic(factored, residual, 0.5 * float(residual.square().sum())), dense


@pytest.mark.parametrize("share", [0.9, 0.5, 0.1, 1e-3])
def test_it_is_the_shortest_displacement_that_meets_the_budget(share: float) -> None:
    quadratic, dense = model()
    budget = share * quadratic.divergence
    found = pull_to_reference(quadratic, budget, precision=0.0)
    assert quadratic.predict(found) == pytest.approx(budget, rel=1e-5)  # the bisection stops at 1e-7 of log lambda
    # Stationary: (J^T J + lambda) d = -J^T rho, with the lambda that fits best.
    left = -dense.T @ (quadratic.residual + dense @ found)
    damping = float(left @ found) / float(found @ found)
    assert damping > 0.0
    assert float((left - damping * found).norm()) <= 1e-6 * float(left.norm())


def test_what_is_inside_stays_and_what_is_out_of_reach_comes_as_near_as_can_be() -> None:
    quadratic, dense = model(outside=0.1)
    assert not pull_to_reference(quadratic, 1.01 * quadratic.divergence).any()
    nearest = float(
        (quadratic.residual - dense @ torch.linalg.lstsq(dense, quadratic.residual).solution).square().sum()
    )
    found = pull_to_reference(quadratic, 0.1 * 0.5 * nearest, precision=0.0)
    assert quadratic.predict(found) == pytest.approx(0.5 * nearest, rel=1e-6)


def test_it_stops_early_where_the_budget_is_met_well_enough() -> None:
    quadratic, _ = model()
    budget = 0.2 * quadratic.divergence
    assert quadratic.predict(pull_to_reference(quadratic, budget)) == pytest.approx(budget, rel=0.1)
