"""Every kind of constraint behind the one interface, against dense float64 algebra."""

import math

import pytest
import torch
from torch import Tensor, nn

from nsrl.projection import (
    Budget,
    Constraint,
    DiagonalConstraint,
    FeatureConstraint,
    Hard,
    JacobianConstraint,
    KroneckerConstraint,
    LowRankConstraint,
    ScaledGradient,
    StackedJacobian,
    Tikhonov,
    jacobian,
    parameter_columns,
)
from tests.projection.builders import jacrev_matrix, matrix_jacobian, matrix_of_condition, mlp, normal
from tests.tolerances import ROOT

KINDS = ["full", "lowrank", "features", "kronecker", "diagonal"]
every_kind = pytest.mark.parametrize("kind", KINDS)
FILTERS = [Hard(), Tikhonov(0.05), Budget(1e-3)]


def build(kind: str, net: nn.Module, inputs: Tensor) -> Constraint:
    """The constraint of one batch, rows scaled by 1 / sqrt(N)."""
    columns = parameter_columns(net)
    if kind == "features":
        constraint = FeatureConstraint(net)
        constraint.update(net, inputs)
        return constraint
    linearised = jacobian(net, inputs, scale=len(inputs) ** -0.5)
    if kind == "full":
        return JacobianConstraint(linearised, columns)
    if kind == "lowrank":
        lowrank = LowRankConstraint(columns, max_rank=64)
        lowrank.update(linearised)
        return lowrank
    other = KroneckerConstraint(columns) if kind == "kronecker" else DiagonalConstraint(columns)
    other.update(linearised)
    return other


def layer_inputs(net: nn.Sequential, inputs: Tensor) -> list[Tensor]:
    """Inputs of the linear layers of an MLP with a constant 1 appended."""
    seen = []
    for layer in net:
        if isinstance(layer, nn.Linear):
            seen.append(torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1).detach())
        inputs = layer(inputs)
    return seen


def output_gradients(net: nn.Sequential, inputs: Tensor) -> list[Tensor]:
    """Derivatives (N, O, d_out) of every output in the outputs of every linear layer, by autograd."""
    kept, x = [], inputs
    for layer in net:
        x = layer(x)
        if isinstance(layer, nn.Linear):
            kept.append(x)
    rows = [torch.autograd.grad(x[:, o].sum(), kept, retain_graph=True) for o in range(x.shape[1])]
    return [torch.stack([row[i] for row in rows], 1) for i in range(len(kept))]


def layer_to_flat(net: nn.Sequential) -> list[Tensor]:
    """For every linear layer the flat columns of its (d_out, d_in + 1) matrix, row by row."""
    places, start = [], 0
    for layer in net:
        if isinstance(layer, nn.Linear):
            out, width = layer.weight.shape
            weight = torch.arange(start, start + out * width).view(out, width)
            bias = torch.arange(start + out * width, start + out * width + out).view(out, 1)
            places.append(torch.cat([weight, bias], 1).flatten())
            start += out * (width + 1)
    return places


def dense_form(kind: str, net: nn.Sequential, inputs: Tensor) -> Tensor:
    """F as a dense matrix, from its definition."""
    matrix = jacrev_matrix(net, inputs).double() / len(inputs) ** 0.5
    if kind in ("full", "lowrank"):
        return matrix.T @ matrix
    if kind == "diagonal":
        return torch.diag((matrix.T @ matrix).diag())
    form = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64)
    for a, g, place in zip(layer_inputs(net, inputs), output_gradients(net, inputs), layer_to_flat(net), strict=True):
        moment = a.T @ a / len(a)
        left = torch.einsum("noi,noj->ij", g, g) / len(g) if kind == "kronecker" else torch.eye(g.shape[2]).double()
        form[place.unsqueeze(1), place.unsqueeze(0)] = torch.kron(left, moment)
    return form


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return mlp(6, 7, 3).double()


@pytest.fixture
def inputs() -> Tensor:
    return normal(4, 6)


@every_kind
def test_the_quadratic_form(kind, net, inputs):
    constraint, form = build(kind, net, inputs), dense_form(kind, net, inputs)
    for seed in range(3):
        vector = normal(constraint.width, seed=seed)
        assert constraint.quadratic(vector) == pytest.approx(0.5 * float(vector @ form @ vector), rel=1e-10)
    values = torch.linalg.eigvalsh(form)
    assert float(constraint.values.sum()) == pytest.approx(float(values.sum()), rel=1e-10)
    ours = constraint.values.sort().values
    torch.testing.assert_close(ours, values[len(values) - len(ours) :], rtol=1e-9, atol=1e-12)


@every_kind
def test_the_eigenbasis_is_orthonormal(kind, net, inputs):
    constraint = build(kind, net, inputs)
    eye = torch.eye(len(constraint.values), dtype=torch.float64)
    basis = torch.stack([constraint.combine(unit) for unit in eye], 1)
    torch.testing.assert_close(basis.T @ basis, eye, rtol=0, atol=1e-10)
    vector = normal(constraint.width)
    torch.testing.assert_close(constraint.components(vector), basis.T @ vector, rtol=1e-9, atol=1e-11)
    form = dense_form(kind, net, inputs)
    torch.testing.assert_close(basis * constraint.values @ basis.T, form, rtol=1e-9, atol=1e-11)


@every_kind
@pytest.mark.parametrize("filter", FILTERS, ids=str)
def test_projection(kind, filter, net, inputs):
    constraint, form = build(kind, net, inputs), dense_form(kind, net, inputs)
    displacement = normal(constraint.width, seed=5)
    values, basis = torch.linalg.eigh(form)
    values = values.clamp_min(0.0)
    removed = filter.removed(values, basis.T @ displacement)
    expected = displacement - basis @ (removed * (basis.T @ displacement))
    result = constraint.project(displacement, filter)
    moved = 0.25 * ROOT * float(displacement.norm())
    torch.testing.assert_close(result.displacement, expected, rtol=0, atol=moved)
    energy = float(displacement @ form @ displacement)
    assert result.predicted == pytest.approx(0.5 * float(expected @ form @ expected), rel=1e-6, abs=1e-13)
    assert result.leakage == pytest.approx(math.sqrt(2 * result.predicted / energy), rel=1e-6, abs=1e-9)
    assert result.kept == pytest.approx(float(expected.norm() / displacement.norm()), rel=0, abs=0.25 * ROOT)
    assert result.removed_share == pytest.approx(
        float((displacement - expected).norm() / displacement.norm()), rel=1e-6
    )
    assert result.effective_dimension == pytest.approx(float(removed.sum()), rel=1e-5)
    assert result.rank == int((values > 1e-12 * values.max()).sum())
    assert result.residual < 1e-12
    assert result.seconds > 0.0


@every_kind
def test_hard_projection_is_idempotent_and_orthogonal(kind, net, inputs):
    constraint = build(kind, net, inputs)
    displacement = normal(constraint.width, seed=5)
    result = constraint.project(displacement)
    again = constraint.project(result.displacement)
    torch.testing.assert_close(again.displacement, result.displacement, rtol=0, atol=1e-12)
    assert again.kept == pytest.approx(1.0)
    assert result.kept**2 + result.removed_share**2 == pytest.approx(1.0)
    assert result.leakage < 1e-7


def test_layer_filters_look_at_a_layer_budgets_at_all(net, inputs):
    constraint = build("features", net, inputs)
    filter = ScaledGradient(2.0)
    fractions = constraint.removed(torch.ones_like(constraint.values), filter)
    first, second = constraint.eigenspaces
    expected = torch.cat([filter.removed(s.values).repeat(s.multiplicity) for s in (first, second)])
    torch.testing.assert_close(fractions, expected)
    assert not torch.allclose(filter.removed(constraint.values), expected)
    budget = Budget(1e-2)
    joint = constraint.removed(torch.ones_like(constraint.values), budget)
    torch.testing.assert_close(joint, budget.removed(constraint.values, torch.ones_like(constraint.values)))


def test_report_by_layer(net, inputs):
    constraint = build("features", net, inputs)
    result = constraint.project(normal(constraint.width), Hard(rank=1))
    assert [rank.name for rank in result.ranks] == ["0", "2"]
    assert [rank.dimension for rank in result.ranks] == [7 * 7, 3 * 8]
    assert [rank.rank for rank in result.ranks] == [7 * 4, 3 * 4]  # four samples, d_out neurons
    assert [rank.effective_dimension for rank in result.ranks] == [7, 3]
    assert result.rank == 40 and result.effective_dimension == 10


@pytest.mark.parametrize("kind", ["full", "features"])
def test_kept_share_is_the_least_over_layers(kind, net, inputs):
    constraint = build(kind, net, inputs)
    displacement = normal(constraint.width)
    result = constraint.project(displacement)
    for layer, place in zip(("0", "2"), layer_to_flat(net), strict=True):
        share = float(result.displacement[place].norm() / displacement[place].norm())
        assert result.kept_by_layer[layer] == pytest.approx(share)
    assert result.kept_share == min(result.kept_by_layer.values()) < result.kept
    frozen = constraint.project(torch.zeros_like(displacement))
    assert frozen.kept_share == frozen.kept == 1.0 and frozen.removed_share == frozen.leakage == 0.0


def test_covered_and_uncovered():
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    inputs = normal(3, 3)
    for kind in ("full", "lowrank", "diagonal"):
        constraint = build(kind, net, inputs)
        assert constraint.uncovered == () and list(constraint.covered) == [name for name, _ in net.named_parameters()]
    for kind in ("features", "kronecker"):
        constraint = build(kind, net, inputs)
        assert constraint.uncovered == ("1.weight", "1.bias")
        assert constraint.covered == {n: c for n, c in parameter_columns(net).items() if not n.startswith("1.")}
        displacement = normal(constraint.width)
        moved = constraint.project(displacement).displacement
        assert torch.equal(moved[16:24], displacement[16:24])  # the norm layer passes
        assert set(constraint.project(displacement).kept_by_layer) == {"0", "2"}


def test_null_spaces_are_nested():
    """Null(features) within Null(Kronecker) within Null(full Jacobian), each of them smaller than the next."""
    net, inputs = mlp(6, 12, 12, 2).double(), normal(4, 6)
    constraints = [build(kind, net, inputs) for kind in ("features", "kronecker", "full")]
    proposal = normal(constraints[0].width)
    ranks = [constraint.project(proposal).rank for constraint in constraints]
    assert ranks == sorted(ranks, reverse=True) and len(set(ranks)) == 3
    for i, inner in enumerate(constraints):
        inside = inner.project(proposal).displacement
        assert float(inside.norm()) > 0.3 * float(proposal.norm())
        for outer in constraints[i:]:
            assert float(outer.components(inside).norm()) < 1e-10 * float(inside.norm())
    outside = constraints[2].project(proposal).displacement
    assert float(constraints[1].components(outside).norm()) > 1e-2
    assert float(constraints[0].components(constraints[1].project(proposal).displacement).norm()) > 1e-2


@pytest.mark.parametrize("filter", [*FILTERS, Hard(energy=0.7), ScaledGradient(3.0)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_all_kinds_agree_where_they_coincide(filter, bias):
    """One linear layer: F is I (x) C for all of them; for the diagonal too when the features are uncorrelated."""
    net = nn.Linear(5, 3, bias=bias).double()
    inputs = torch.diag(torch.arange(1.0, 6.0)).double()[:4]
    if bias:
        inputs = inputs @ torch.linalg.qr(normal(5, 5))[0]
    displacement = normal(sum(p.numel() for p in net.parameters()))
    kinds = KINDS if not bias else KINDS[:-1]
    results = {kind: build(kind, net, inputs).project(displacement, filter) for kind in kinds}
    if filter == Hard(energy=0.7):  # eigenvalues come in threes: half a triple is a matter of taste
        results = {kind: results[kind] for kind in ("features",)}
    for result in results.values():
        torch.testing.assert_close(result.displacement, results["features"].displacement, rtol=1e-7, atol=1e-9)
        assert result.leakage == pytest.approx(results["features"].leakage, rel=1e-6, abs=1e-9)
        assert result.rank == results["features"].rank == 12


def test_single_precision_factors_take_two_passes():
    matrix = matrix_of_condition(12, 40, 1e4).float()
    vector = normal(40, dtype=torch.float32)

    def violation(passes: int) -> float:
        constraint = JacobianConstraint(matrix_jacobian(matrix), passes=passes)
        left = constraint.project(vector).displacement
        return float((matrix.double() @ left.double()).norm() / (matrix.double().norm() * left.double().norm()))

    assert violation(2) < 1e-7
    assert violation(2) <= violation(1)


def test_full_constraint_of_stacked_tasks_in_single_precision():
    net = mlp(5, 16, 2)
    tasks = [jacobian(net, normal(6, 5, seed=seed, dtype=torch.float32)) for seed in (0, 1)]
    constraint = JacobianConstraint(StackedJacobian(tasks), parameter_columns(net))
    displacement = normal(constraint.width, dtype=torch.float32)
    moved = constraint.project(displacement)
    assert moved.displacement.dtype == torch.float32
    assert moved.leakage < 1e-5
    assert constraint.nbytes() > 0


def test_more_rows_than_parameters():
    net = nn.Linear(2, 2).double()
    constraint = JacobianConstraint(jacobian(net, normal(9, 2)))
    assert constraint.project(normal(6)).rank == 6
    assert float(constraint.project(normal(6)).displacement.norm()) < 1e-12


def test_columns_of_a_module():
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    net[0].bias.requires_grad_(False)
    assert parameter_columns(net) == {"0.weight": (0, 6), "1.weight": (6, 9), "1.bias": (9, 10)}
    assert parameter_columns(net, ["1.bias", "0.weight"]) == {"0.weight": (0, 6), "1.bias": (6, 7)}
    with pytest.raises(ValueError, match=r"0\.bias"):
        parameter_columns(net, ["0.bias"])


@every_kind
def test_bad_displacements_are_refused(kind, net, inputs):
    constraint = build(kind, net, inputs)
    for bad in (torch.zeros(3), torch.full((constraint.width,), math.nan)):
        with pytest.raises(ValueError, match=f"{constraint.width} finite numbers"):
            constraint.project(bad)


def test_an_empty_constraint_is_refused(net):
    columns = parameter_columns(net)
    for constraint in (
        FeatureConstraint(net),
        KroneckerConstraint(columns),
        DiagonalConstraint(columns),
        LowRankConstraint(columns, 4),
    ):
        with pytest.raises(ValueError, match="update"):
            constraint.project(torch.zeros(constraint.width))


def test_wrong_columns_are_refused(net, inputs):
    linearised = jacobian(net, inputs)
    columns = parameter_columns(net, ["0.weight"])
    with pytest.raises(ValueError, match="columns"):
        JacobianConstraint(linearised, columns)
    for constraint in (KroneckerConstraint(columns), DiagonalConstraint(columns), LowRankConstraint(columns, 4)):
        with pytest.raises(ValueError, match="columns"):
            constraint.update(linearised)


def test_diagonal_accumulates_and_merges(net, inputs):
    columns = parameter_columns(net)
    batches = [jacobian(net, normal(3, 6, seed=seed)) for seed in (0, 1)]
    stream, parts = DiagonalConstraint(columns), [DiagonalConstraint(columns) for _ in batches]
    for part, batch in zip(parts, batches, strict=True):
        stream.update(batch)
        part.update(batch)
    matrix = torch.cat([batch.dense() for batch in batches])
    torch.testing.assert_close(stream.values, matrix.square().sum(0))
    torch.testing.assert_close(parts[0].merged(parts[1]).values, stream.values)
    assert stream.nbytes() == 8 * stream.width
    assert stream.project(normal(stream.width)).rank == int((matrix.square().sum(0) > 0).sum())
