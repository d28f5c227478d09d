"""Parameters without an axis, in every kind of constraint and at every door of the core."""

import pytest
import torch
from torch import Tensor, nn

from nsrl.projection import (
    Budget,
    DiagonalConstraint,
    FeatureConstraint,
    Hard,
    JacobianConstraint,
    KroneckerConstraint,
    KrylovProjection,
    LowRankConstraint,
    SpectralProjection,
    StackedJacobian,
    Tikhonov,
    attach_constraint,
    jacobian,
    parameter_columns,
    solve,
)
from nsrl.projection.optimizer import FlatParameters
from tests.projection.builders import Net, jacrev_matrix, normal


def residual(net: Net, x: Tensor) -> Tensor:
    hidden = torch.tanh(net.a(x))
    hidden = hidden + net.alpha * torch.tanh(net.b(hidden))
    return net.scale.exp() * net.c(hidden) + net.shift


def build() -> Net:
    """A gain, a logit scale and a shift of one number each, before, between and behind the layers' columns."""
    torch.manual_seed(0)
    numbers = {
        name: nn.Parameter(torch.tensor(value)) for name, value in (("alpha", 0.3), ("scale", 0.2), ("shift", -0.4))
    }
    return Net(residual, **numbers, a=nn.Linear(4, 5), b=nn.Linear(5, 5), c=nn.Linear(5, 3)).double()


NUMBERS = ("alpha", "scale", "shift")


def kinds(module: Net, x: Tensor) -> dict:
    columns, rows = parameter_columns(module), jacobian(module, x, scale=len(x) ** -0.5)
    found = {
        "full": JacobianConstraint(rows, columns),
        "diagonal": DiagonalConstraint(columns),
        "kronecker": KroneckerConstraint(columns),
        "low rank": LowRankConstraint(columns, 40),
    }
    for kind in ("diagonal", "kronecker", "low rank"):
        found[kind].update(rows)
    found["features"] = FeatureConstraint(module)
    found["features"].update(module, x)
    return found


def test_the_scaled_form_and_the_dense_one():
    module, x = build(), normal(4, 4)
    result, expected = jacobian(module, x), jacrev_matrix(module, x)
    scale = normal(result.shape[1], seed=2).exp()
    scaled, fitted = result.scaled(scale)
    torch.testing.assert_close(scaled.dense(), expected * fitted)
    for name in NUMBERS:
        start, stop = parameter_columns(module)[name]
        assert stop == start + 1 and float(fitted[start]) == float(scale[start])
    torch.testing.assert_close(result.column_squares(), expected.square().sum(0))


@pytest.mark.parametrize("kind", ["full", "diagonal", "low rank"])
def test_kinds_that_cover_everything(kind):
    """1/2 d^T F d against the dense rows, and a projection that holds the change of the outputs at zero."""
    module, x = build(), normal(4, 4)
    constraint = kinds(module, x)[kind]
    assert constraint.uncovered == ()
    rows = jacrev_matrix(module, x) / 2.0
    displacement = normal(rows.shape[1], seed=5)
    form = rows.square().sum(0).diag() if kind == "diagonal" else rows.T @ rows
    assert constraint.quadratic(displacement) == pytest.approx(float(displacement @ form @ displacement) / 2)
    done = constraint.project(displacement)
    assert float((form @ done.displacement).norm()) <= 1e-9 * float((form @ displacement).norm())
    assert {"alpha", "scale", "shift"} <= done.kept_by_layer.keys()
    for filter in (Tikhonov(0.1), Budget(1e-3), Hard(rank=3)):
        assert torch.isfinite(constraint.project(displacement, filter).displacement).all()


@pytest.mark.parametrize("kind", ["features", "kronecker"])
def test_kinds_of_linear_layers_leave_numbers_uncovered(kind):
    module, x = build(), normal(3, 4)
    constraint = kinds(module, x)[kind]
    assert constraint.uncovered == NUMBERS
    displacement = normal(constraint.width, seed=5)
    done = constraint.project(displacement)
    for name in NUMBERS:
        start = constraint.columns[name][0]
        assert float(done.displacement[start]) == float(displacement[start])  # passes as it is
    frozen = build()
    for name in NUMBERS:
        frozen.get_parameter(name).requires_grad_(False)
    again = kinds(frozen, x)[kind]
    flat = FlatParameters([p for p in frozen.parameters() if p.requires_grad])
    before, start = frozen(x).detach(), flat.read()
    step = again.project(normal(again.width, seed=5)).displacement
    if kind == "features":  # exact for a step of any size
        flat.write(start + step)
        torch.testing.assert_close(frozen(x).detach(), before, rtol=1e-9, atol=1e-9)
    else:
        assert float(jacobian(frozen, x).matvec(step).norm()) <= 1e-7 * float(step.norm())


@pytest.mark.parametrize("where", ["gradient", "step", "cumulative", "metric"])
def test_an_optimizer_with_numbers_among_its_parameters(where):
    module, x = build(), normal(4, 4)
    parameters = list(module.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    constraint = kinds(module, x)["full"]
    rows = jacrev_matrix(module, x)
    start = FlatParameters(parameters).read()
    module(normal(6, 4, seed=3)).square().sum().backward()
    if where == "metric":  # Adam has no metric before its first step
        optimizer.step()
        start = FlatParameters(parameters).read()
        constraint, rows = kinds(module, x)["full"], jacrev_matrix(module, x)
    attached = attach_constraint(optimizer, parameters, constraint, where=where)
    optimizer.step()
    way = FlatParameters(parameters).read() - start
    attached.detach()
    assert float(way.norm()) > 0.0
    if where != "gradient":
        assert float((rows @ way).norm()) <= 1e-7 * float(rows.norm() * way.norm())


def test_projections_and_solvers():
    module, x = build(), normal(4, 4)
    rows = StackedJacobian([jacobian(module, x), jacobian(module, normal(3, 4, seed=1))])
    dense = torch.cat([jacrev_matrix(module, x), jacrev_matrix(module, normal(3, 4, seed=1))])
    proposal, zeros = normal(dense.shape[1], seed=5), torch.zeros(len(dense)).double()
    hard = SpectralProjection(rows, zeros, 0.0).null(proposal)
    expected = proposal - torch.linalg.pinv(dense) @ (dense @ proposal)
    torch.testing.assert_close(hard, expected, rtol=1e-7, atol=1e-7)
    for projection in (SpectralProjection, KrylovProjection):
        done = projection(rows, zeros, 0.0).project(proposal, 1e-2)
        assert done.predicted <= 1e-2 * 1.02  # the Krylov precision
        assert float((dense @ done.displacement).square().sum()) / 2 == pytest.approx(done.predicted, rel=1e-6)
    right = normal(len(dense), seed=6)
    found = solve(rows, right, damping=0.1).values
    torch.testing.assert_close((dense @ dense.T + 0.1 * torch.eye(len(dense)).double()) @ found, right)
