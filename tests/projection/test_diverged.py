"""What has diverged is refused wherever it enters: a comparison with NaN is false, so that silence would pass it on."""

import math

import pytest
import torch
from torch import nn

from nsrl.projection import (
    DiagonalConstraint,
    FactoredJacobian,
    FeatureConstraint,
    KroneckerConstraint,
    KrylovProjection,
    LowRankConstraint,
    SpectralProjection,
    jacobian,
    parameter_columns,
)
from nsrl.projection.budget.model import solve_damping
from nsrl.projection.constraints.constraint import Constraint, Eigenspace
from nsrl.projection.jacobians.blocks import LinearBlock
from nsrl.projection.solvers.nystrom import NystromSolver
from tests.projection.builders import matrix_jacobian, mlp, normal

BROKEN = [math.nan, math.inf]
broken = pytest.mark.parametrize("value", BROKEN)


def linear_jacobian(value: float) -> FactoredJacobian:
    """Of a linear layer, with one entry of its factors broken."""
    module = nn.Linear(4, 3).double()
    result = jacobian(module, normal(5, 4))
    (block,) = result.blocks
    assert isinstance(block, LinearBlock)
    block.grads[2, 1, 0, 1] = value
    return result


@broken
@pytest.mark.parametrize(
    "kind",
    [DiagonalConstraint, KroneckerConstraint, lambda c: LowRankConstraint(c, 20)],
    ids=["diagonal", "kronecker", "low rank"],
)
def test_constraints_made_of_a_jacobian(kind, value):
    """Hard() takes eigenvalues above a share of the largest: of NaN none, so everything would be let through."""
    constraint = kind(parameter_columns(nn.Linear(4, 3)))
    constraint.update(linear_jacobian(1.0))
    with pytest.raises(ValueError, match="NaN or infinite"):
        constraint.update(linear_jacobian(value))


@broken
def test_features(value):
    module = mlp(4, 5, 3).double()
    constraint = FeatureConstraint(module)
    inputs = normal(6, 4)
    inputs[3, 2] = value
    with pytest.raises(ValueError, match="inputs of 0 have NaN or infinite"):
        constraint.update(module, inputs)


class Given(Constraint):
    """Eigenvalues as they are given, in the basis of the parameters."""

    def __init__(self, values: torch.Tensor):
        super().__init__({"w": (0, len(values))})
        self._spaces = (Eigenspace("layer", values, len(values)),)

    @property
    def eigenspaces(self):
        return self._spaces

    def components(self, vector):
        return vector.double()

    def combine(self, components):
        return components

    def nbytes(self):
        return 0


@broken
def test_eigenvalues(value):
    constraint = Given(torch.tensor([2.0, value, 1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="layer has NaN or infinite eigenvalues"):
        constraint.project(torch.ones(3).double())


@broken
def test_the_root_of_a_budget(value):
    good, bad = torch.ones(3).double(), torch.tensor([1.0, value, 1.0]).double()
    assert 0.0 < solve_damping(good, good, 0.5) < math.inf
    for values, weights, target in ((bad, good, 0.5), (good, bad, 0.5), (good, good, math.nan)):
        with pytest.raises(ValueError, match="NaN or infinite"):
            solve_damping(values, weights, target)
    assert solve_damping(good, good, math.inf) == math.inf


@pytest.mark.parametrize("projection", [SpectralProjection, KrylovProjection])
def test_products_that_overflow(projection):
    """The rows are finite and so is the proposal, but their product in float32 is not."""
    rows = matrix_jacobian(torch.full((2, 3), 1e25, dtype=torch.float32))
    zeros = torch.zeros(2)
    if projection is KrylovProjection:
        made = projection(rows, zeros, 0.0)
        with pytest.raises(ValueError, match="NaN or infinite"):
            made.project(torch.full((3,), 1e25), 0.1)
    else:  # in float64 there is room
        assert projection(rows, zeros, 0.0).project(torch.full((3,), 1e25), 0.1).predicted <= 0.1 * (1 + 1e-6)


@broken
@pytest.mark.parametrize("projection", [SpectralProjection, KrylovProjection])
def test_projections_with_broken_rows(projection, value):
    matrix = normal(4, 6)
    matrix[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        projection(matrix_jacobian(matrix), torch.zeros(4).double(), 0.0).project(normal(6, seed=1), 1e-3)


@broken
def test_a_solver_without_a_gram_matrix(value):
    matrix = normal(4, 6)
    matrix[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        NystromSolver(matrix_jacobian(matrix), 0.1)
