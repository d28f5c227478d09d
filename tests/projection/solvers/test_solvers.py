"""Every method against dense float64 algebra: any conditioning, any rank, any shape; certificates that are measured."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nsrl.projection import StackedJacobian, jacobian
from nsrl.projection.jacobians.factored import doubled
from nsrl.projection.solvers.direct import DualSolver
from nsrl.projection.solvers.factorise import factorise, null_projection, solve
from nsrl.projection.solvers.nystrom import NystromSolver
from nsrl.projection.solvers.plan import METHODS
from tests.projection.builders import Products, matrix_jacobian, matrix_of_condition, mlp, normal
from tests.tolerances import relative

every_method = pytest.mark.parametrize("method", METHODS)
exact_method = pytest.mark.parametrize("method", ["dual", "primal"])
CONDITIONS = [1e1, 1e2, 1e3, 1e4, 1e5, 1e6]


def of_rank(rows: int, columns: int, rank: int, condition: float = 10.0, seed: int = 0) -> Tensor:
    left = torch.linalg.qr(normal(rows, rank, seed=seed))[0]
    return left @ matrix_of_condition(rank, columns, condition, seed + 1)


SHAPES = {
    "wide": lambda condition: matrix_of_condition(24, 60, condition),
    "tall": lambda condition: matrix_of_condition(60, 24, condition),
    "square": lambda condition: matrix_of_condition(30, 30, condition),
    "deficient": lambda condition: of_rank(30, 40, 12, condition),
    "tall and deficient": lambda condition: of_rank(60, 24, 12, condition),
    "duplicates": lambda condition: matrix_of_condition(12, 40, condition).repeat(3, 1),
    "one row": lambda condition: matrix_of_condition(1, 20, 1.0),
    "one column": lambda condition: matrix_of_condition(20, 1, 1.0),
    "zero": lambda condition: torch.zeros(6, 9).double(),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)


def pseudo_inverse(matrix: Tensor) -> Tensor:
    return torch.from_numpy(scipy.linalg.pinv(matrix.numpy(), rtol=1e-11))


def leakage(matrix: Tensor, vector: Tensor) -> float:
    """|J d| / (|J| |d|) in float64, with the Frobenius norm of J."""
    product = matrix.double() @ vector.double()
    return float(product.norm() / (matrix.double().norm() * vector.double().norm()))


@every_method
@every_shape
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("share", [1e-6, 1e-3, 1.0])
def test_damped_systems(method, shape, condition, share):
    matrix = SHAPES[shape](condition)
    rows, size = normal(matrix.shape[0], 2, seed=5), matrix.shape[0]
    damping = share * max(float(matrix.square().sum()), 1e-3)
    result = solve(matrix_jacobian(matrix), rows, damping, method=method)
    system = matrix @ matrix.T + damping * torch.eye(size).double()
    expected = torch.from_numpy(scipy.linalg.solve(system.numpy(), rows.numpy(), assume_a="pos"))
    torch.testing.assert_close(result.values, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))
    left = system @ result.values - rows
    assert result.certificate.residual == pytest.approx(
        float((left.norm(dim=0) / rows.norm(dim=0)).max()), rel=0.1, abs=1e-10
    )
    assert result.certificate.residual <= 1e-9
    assert (result.certificate.damping, result.certificate.dtype) == (damping, torch.float64)


@exact_method
@every_shape
@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3])
def test_undamped_systems_give_the_pseudo_inverse(method, shape, condition):
    """A right-hand side in the range is met, one outside is not, and the certificate says how much of it is left."""
    matrix = SHAPES[shape](condition)
    gram = matrix @ matrix.T
    inside, outside = gram @ normal(matrix.shape[0], seed=5), normal(matrix.shape[0], seed=6)
    solver = factorise(matrix_jacobian(matrix), 0.0, method=method)
    for rows in (inside, outside):
        result = solver.solve(rows)
        expected = pseudo_inverse(matrix).T @ (pseudo_inverse(matrix) @ rows)
        scale = float(expected.norm()) + 1e-12
        assert float((result.values - expected).norm()) <= 1e-7 * scale
        left = float((gram @ result.values - rows).norm())
        norm = float(rows.norm())
        # K y is off by u |K| |y|, and |y| <= |b| / s for the least eigenvalue s of K, whose condition is J's squared
        round_off = relative(torch.float64, len(rows), condition**2)
        assert result.certificate.residual == pytest.approx(left / norm if norm else 0.0, rel=1e-6, abs=round_off)
    assert solver.rank == np.linalg.matrix_rank(matrix.numpy())


@every_method
@every_shape
@pytest.mark.parametrize("condition", CONDITIONS)
def test_hard_projections(method, shape, condition):
    """Nothing that J sees is left, and nothing else is taken."""
    matrix = SHAPES[shape](condition)
    vector = normal(matrix.shape[1], seed=5)
    result = null_projection(matrix_jacobian(matrix), vector, method=method)
    basis = scipy.linalg.orth(matrix.numpy().T, rcond=1e-11) if shape != "zero" else np.zeros((9, 0))
    expected = vector - torch.from_numpy(basis @ (basis.T @ vector.numpy()))
    change, left = float((result.values - expected).norm()), float((matrix @ result.values).norm())
    if method == "nystrom":
        # Two passes leave (l / (s + l))^2 of a direction: of sigma = s^{1/2} times that, at most 0.325 l^{1/2}.
        assert left <= 0.325e-6 * float(vector.norm()) and result.certificate.residual <= 1e-6
        assert change <= 2.0 * (1e-12 * condition**2) ** 2 * float(vector.norm()) + 1e-11
    else:
        # J^T J tells its null space with the square of the condition number, J^T y with the number itself.
        assert change <= (5e-16 * condition**2 if method == "primal" else 1e-15 * condition) + 1e-12
        assert left <= 1e-13 and result.certificate.residual <= 1e-13
    assert result.certificate.passes <= 2


@every_method
@pytest.mark.parametrize("shape", ["wide", "tall and deficient", "duplicates"])
@pytest.mark.parametrize("damping", [1e-4, 1e-1, 1e2])
def test_soft_projections(method, shape, damping):
    """v - J^T (K + l)^{-1} J v = l (J^T J + l)^{-1} v (DESIGN, section 2)."""
    matrix = SHAPES[shape](1e2)
    vector = normal(matrix.shape[1], seed=5)
    result = null_projection(matrix_jacobian(matrix), vector, damping, method=method)
    metric = matrix.T @ matrix + damping * torch.eye(matrix.shape[1]).double()
    torch.testing.assert_close(result.values, damping * torch.linalg.solve(metric, vector), rtol=1e-8, atol=1e-9)
    assert result.certificate.residual <= 1e-9 and result.certificate.damping == damping


@every_method
@pytest.mark.parametrize("rows,columns", [(64, 200), (64, 600), (200, 120)])
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_leakage_with_single_precision_factors(method, rows, columns, condition):
    """|J d| / (|J| |d|) <= 1e-8 after two passes at any conditioning: what is left is the rounding of d to float32."""
    rank = min(64, rows)
    matrix = of_rank(rows, columns, rank, condition) if rows > rank else matrix_of_condition(rows, columns, condition)
    matrix, vector = matrix.float(), normal(columns, dtype=torch.float32)
    if rows > columns // 2:  # keep a null space in float32, too: columns repeat
        matrix = matrix[:, : columns // 2].repeat(1, 2)
    result = null_projection(matrix_jacobian(matrix), vector, method=method)
    assert result.values.dtype == torch.float32 and result.certificate.dtype == torch.float32
    assert result.certificate.passes <= 2
    assert leakage(matrix, result.values) <= 1e-8


@pytest.mark.parametrize("condition", [1e1, 1e3])
def test_cholesky_where_it_is_safe(condition):
    solver = DualSolver(matrix_jacobian(matrix_of_condition(24, 60, condition)))
    assert (solver.method, solver.rank, solver.effective_dimension) == ("dual/cholesky", 24, 24.0)
    assert solver.solve(normal(24)).certificate.residual < 1e-9


@pytest.mark.parametrize("shape", ["tall", "deficient", "duplicates", "zero", "one column"])
def test_eigenbasis_where_the_gram_matrix_is_singular(shape):
    """Duplicates can pass Cholesky with a pivot of round-off size: that is not the pseudo-inverse."""
    matrix = SHAPES[shape](10.0)
    solver = DualSolver(matrix_jacobian(matrix))
    assert solver.method == "dual/eigh" and solver.rank == np.linalg.matrix_rank(matrix.numpy())


def test_cholesky_passes_what_is_singular():
    """The trap that `DualSolver` looks at the pivots for: LAPACK reports success, the solution is noise."""
    found = 0
    for seed in range(40):
        row = normal(1, 40, seed=seed)
        matrix = torch.cat([normal(5, 40, seed=seed + 100), row, row])
        gram = matrix @ matrix.T
        found += not bool(torch.linalg.cholesky_ex(gram)[1])
        solver, rows = DualSolver(matrix_jacobian(matrix)), gram @ normal(7, seed=seed)
        assert solver.method == "dual/eigh"
        expected = pseudo_inverse(matrix).T @ (pseudo_inverse(matrix) @ rows)
        torch.testing.assert_close(solver.solve(rows).values, expected, rtol=1e-8, atol=1e-10)
    assert found >= 3


def test_a_failed_cholesky_falls_back(monkeypatch):
    monkeypatch.setattr(
        torch.linalg, "cholesky_ex", lambda matrix: (torch.full_like(matrix, math.nan), torch.tensor(3))
    )
    matrix, rows = matrix_of_condition(24, 60, 10.0), normal(24)
    for damping in (0.0, 0.1):
        result = solve(matrix_jacobian(matrix), rows, damping, method="dual")
        expected = torch.linalg.solve(matrix @ matrix.T + damping * torch.eye(24).double(), rows)
        assert result.certificate.method == "dual/eigh"
        torch.testing.assert_close(result.values, expected)


@pytest.mark.parametrize("garbage", [math.nan, 1e3, 1.5])
def test_a_cholesky_factor_that_solves_nothing_is_given_up(monkeypatch, garbage):
    honest = torch.cholesky_solve
    monkeypatch.setattr(torch, "cholesky_solve", lambda rows, factor: garbage * honest(rows, factor))
    matrix, rows = matrix_of_condition(24, 60, 10.0), normal(24)
    result = solve(matrix_jacobian(matrix), rows, method="dual")
    assert result.certificate.method == "dual/eigh"
    torch.testing.assert_close(result.values, torch.linalg.solve(matrix @ matrix.T, rows))


@given(seed=st.integers(0, 999), rows=st.integers(1, 12), columns=st.integers(1, 12), log_damping=st.floats(-3, 3))
def test_methods_agree(seed, rows, columns, log_damping):
    matrix, right, vector = (
        normal(rows, columns, seed=seed),
        normal(rows, seed=seed + 1),
        normal(columns, seed=seed + 2),
    )
    damping = 10.0**log_damping
    solvers = [factorise(matrix_jacobian(matrix), damping, method=method) for method in METHODS]
    values = [(s.solve(right).values, s.null(vector).values) for s in solvers]
    for solution, projected in values[1:]:
        torch.testing.assert_close(solution, values[0][0], rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(projected, values[0][1], rtol=1e-7, atol=1e-8)


@every_method
def test_effective_dimension_and_rank(method):
    matrix, damping = of_rank(30, 40, 12, 1e3), 1e-3
    values = torch.linalg.svdvals(matrix).square()
    certificate = solve(matrix_jacobian(matrix), normal(30), damping, method=method).certificate
    exact = float((values / (values + damping)).sum())
    if method == "nystrom":
        assert 0.9 * exact <= certificate.effective_dimension <= exact * (1 + 1e-9)
    else:
        assert certificate.effective_dimension == pytest.approx(exact, rel=1e-6)
    assert exact - 1 <= certificate.rank <= 12
    assert certificate.rank == 12 or method != "primal"


def test_rank_of_a_regular_damped_system():
    assert DualSolver(matrix_jacobian(matrix_of_condition(24, 60, 1e2)), 1e-1).rank == 24


@every_method
def test_a_network_and_its_stack(method):
    """Real factors in single precision; two tasks one below the other are solved like one."""
    net = mlp(3, 8, 2)
    parts = [jacobian(net, normal(15, 3, seed=seed, dtype=torch.float32), scale=15**-0.5) for seed in (1, 2)]
    stacked = StackedJacobian(parts)
    matrix, rows = doubled(stacked).dense(), normal(60, seed=3)  # type: ignore[attr-defined]
    result = solve(stacked, rows, 1e-3, method=method)
    expected = torch.linalg.solve(matrix @ matrix.T + 1e-3 * torch.eye(60).double(), rows)
    torch.testing.assert_close(result.values, expected, rtol=1e-8, atol=1e-8)
    assert result.certificate.residual < 1e-10 and result.certificate.dtype == torch.float32


@pytest.mark.parametrize("method", ["dual", "nystrom"])
def test_products_are_enough(method):
    matrix, rows = matrix_of_condition(24, 60, 10.0), normal(24)
    result = solve(Products(matrix), rows, 0.1, method=method)
    torch.testing.assert_close(
        result.values, torch.linalg.solve(matrix @ matrix.T + 0.1 * torch.eye(24).double(), rows)
    )


def test_products_are_not_enough_for_primal():
    assert factorise(Products(normal(50, 6))).method == "dual/eigh"  # though P < k
    with pytest.raises(ValueError, match="solve it by 'dual'"):
        factorise(Products(normal(50, 6)), method="primal")


@pytest.mark.parametrize(
    "matrix,memory,expected",
    [
        (normal(60, 10), None, "primal"),
        (normal(10, 60), None, "dual"),
        (normal(60, 80), 5e4, "nystrom"),
    ],
)
def test_the_plan_is_followed(matrix, memory, expected):
    certificate = solve(matrix_jacobian(matrix), normal(len(matrix)), 0.1, memory=memory).certificate
    assert certificate.method.split("/")[0] == expected


def test_primal_forms_no_gram_matrix():
    factored = matrix_jacobian(normal(60, 10))
    factored.gram = lambda *args: pytest.fail("the Gram matrix was formed")  # type: ignore[method-assign]
    assert solve(factored, normal(60), 0.1).certificate.residual < 1e-12


def test_the_hard_projection_by_nystrom_states_its_damping():
    matrix = matrix_of_condition(24, 60, 1e3)
    certificate = null_projection(matrix_jacobian(matrix), normal(60), method="nystrom").certificate
    assert certificate.damping == pytest.approx(1e-12, rel=1e-6)  # the largest eigenvalue is 1


def test_a_sketch_that_memory_bounds_is_paid_for_in_iterations():
    """100 directions matter, 16 fit: slower, right all the same."""
    matrix, rows = of_rank(200, 300, 100, 10.0), normal(200)
    small, large = (factorise(matrix_jacobian(matrix), 1e-3, method="nystrom", memory=m) for m in (1.0, 1e9))
    assert isinstance(small, NystromSolver) and isinstance(large, NystromSolver)
    assert small.sketch.vectors.shape[1] == 16 and large.sketch.vectors.shape[1] >= 100
    expected = torch.linalg.solve(matrix @ matrix.T + 1e-3 * torch.eye(200).double(), rows)
    for solver in (small, large):
        result = solver.solve(rows)
        assert result.certificate.residual <= 1e-10
        torch.testing.assert_close(result.values, expected, rtol=1e-7, atol=1e-7)
    assert small.iterations_made > 2 * large.iterations_made


def test_certificates_read_well():
    text = str(solve(matrix_jacobian(matrix_of_condition(24, 60, 10.0).float()), normal(24), 0.1).certificate)
    assert text.startswith("dual/cholesky: residual ") and "rank 24" in text and "float32 factors" in text


def test_one_pass_is_no_refinement(monkeypatch):
    """With an inverse that is 1 % too large a pass leaves a hundredth of what was there."""
    honest = DualSolver._inverse
    monkeypatch.setattr(DualSolver, "_inverse", lambda self, rows: 1.01 * honest(self, rows))
    matrix, rows = matrix_of_condition(24, 60, 10.0), normal(24)
    once, twice = (factorise(matrix_jacobian(matrix), 1e-3, passes=passes).solve(rows).certificate for passes in (1, 2))
    assert (once.passes, twice.passes) == (1, 2)
    assert [once.residual, twice.residual] == pytest.approx([1e-2, 1e-4], rel=1e-6)


@every_method
def test_zero_right_hand_sides(method):
    solver = factorise(matrix_jacobian(normal(4, 6)), 0.1, method=method)
    assert not bool(solver.solve(torch.zeros(4).double()).values.any())
    result = solver.null(torch.zeros(6).double())
    assert not bool(result.values.any()) and result.certificate.residual == 0.0


@every_method
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["jacobian", "rows", "vector", "damping"])
def test_numbers_that_are_not_finite_are_refused(method, place, value):
    matrix, rows, vector, damping = normal(4, 6), normal(4), normal(6), 0.1
    if place == "damping":
        damping = value
    else:
        {"jacobian": matrix[1], "rows": rows, "vector": vector}[place][2] = value
    with pytest.raises(ValueError, match=r"NaN|finite"):
        solver = factorise(matrix_jacobian(matrix), damping, method=method)
        solver.solve(rows)
        solver.null(vector)


@every_method
def test_nonsense_is_refused(method):
    with pytest.raises(ValueError, match="0 or a positive finite number, not -1"):
        factorise(matrix_jacobian(normal(4, 6)), -1.0, method=method)
    solver = factorise(matrix_jacobian(normal(4, 6)), 0.1, method=method)
    with pytest.raises(ValueError, match="4 finite numbers"):
        solver.solve(normal(5))
    with pytest.raises(ValueError, match="6 finite numbers"):
        solver.null(normal(5))


@pytest.mark.cuda
@every_method
def test_on_cuda(method):
    matrix, rows = of_rank(30, 40, 12, 1e3), normal(30)
    result = solve(matrix_jacobian(matrix.cuda()), rows.cuda(), 1e-3, method=method)
    expected = torch.linalg.solve(matrix @ matrix.T + 1e-3 * torch.eye(30).double(), rows)
    torch.testing.assert_close(result.values.cpu(), expected, rtol=1e-8, atol=1e-8)
