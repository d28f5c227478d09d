"""The budgeted projection against dense float64 solutions of the constrained problem."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from nsrl.projection import KrylovProjection, Projection, SpectralProjection, jacobian
from tests.projection.builders import matrix_jacobian, matrix_of_condition, mlp, normal

CLOSE = {"rtol": 1e-6, "atol": 1e-8}
SOLVERS = {
    "dual": lambda *args, **kw: SpectralProjection(*args, method="dual", **kw),
    "primal": lambda *args, **kw: SpectralProjection(*args, method="primal", **kw),
    "krylov": lambda *args, **kw: KrylovProjection(*args, iterations=60, precision=0.0, **kw),
}
every_solver = pytest.mark.parametrize("solver", SOLVERS)


def model(matrix: Tensor, rho: Tensor, divergence: float, displacement: Tensor) -> float:
    """KL(0) - 1/2 |rho|^2 + 1/2 |rho + J d|^2 in float64."""
    rho = rho.double()
    moved = rho + matrix.double() @ displacement.double()
    return divergence + 0.5 * float(moved.square().sum() - rho.square().sum())


def least(matrix: Tensor, rho: Tensor, divergence: float) -> float:
    """The smallest value the model can take."""
    best = torch.from_numpy(np.linalg.pinv(matrix.numpy()) @ -rho.numpy())
    return model(matrix, rho, divergence, best)


def solve(matrix: Tensor, rho: Tensor, divergence: float, proposal: Tensor, budget: float, metric: Tensor) -> Tensor:
    """The constrained problem in parameter space: (V^-1 + mu J^T J) d = V^-1 d0 - mu J^T rho, root in mu by SciPy."""
    j, r, d0, v = matrix.numpy(), rho.numpy(), proposal.numpy(), metric.numpy()

    def step(multiplier: float) -> np.ndarray:
        return np.linalg.solve(np.diag(1 / v) + multiplier * j.T @ j, d0 / v - multiplier * j.T @ r)

    def excess(log_multiplier: float) -> float:
        return model(matrix, rho, divergence, torch.from_numpy(step(math.exp(log_multiplier)))) - budget

    if model(matrix, rho, divergence, proposal) <= budget:
        return proposal
    return torch.from_numpy(step(math.exp(scipy.optimize.brentq(excess, -30.0, 25.0, xtol=1e-12))))


def problem(rows: int, columns: int, seed: int, pull: float = 0.3, size: float = 1.0):
    matrix = normal(rows, columns, seed=seed)
    rho = pull * normal(rows, seed=seed + 1)
    divergence = 0.5 * float(rho.square().sum())
    return matrix, rho, divergence, size * normal(columns, seed=seed + 2)


@st.composite
def problems(draw):
    """Any shape (k > P too), rows repeated or not, any residual, and a budget that can be met with a margin."""
    rows, columns, seed = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(0, 9999))
    matrix, rho, divergence, proposal = problem(
        rows, columns, seed, draw(st.sampled_from([0.0, 0.1, 1.0])), draw(st.sampled_from([0.0, 0.1, 1.0, 10.0]))
    )
    if draw(st.booleans()):
        matrix, rho = matrix.repeat(2, 1), rho.repeat(2)
        divergence *= 2
    floor, proposed = least(matrix, rho, divergence), model(matrix, rho, divergence, proposal)
    share = draw(st.one_of(st.floats(0.01, 0.999), st.floats(1.001, 1.5)))
    budget = floor + share * (proposed - floor)
    assume(budget > floor + 1e-6)
    return matrix, rho, divergence, proposal, budget


@every_solver
@given(case=problems())
def test_optimality_conditions(solver, case):
    """Feasible, stationary, complementary: the three together identify the unique solution."""
    matrix, rho, divergence, proposal, budget = case
    result = SOLVERS[solver](matrix_jacobian(matrix), rho, divergence).project(proposal, budget)
    value, scale = model(matrix, rho, divergence, result.displacement), abs(budget) + divergence + 1e-3
    assert value <= budget + 1e-6 * scale
    assert result.predicted == pytest.approx(value, abs=1e-6 * scale)
    assert result.predicted <= budget + 1e-6 * scale
    slope = matrix.T @ (rho + matrix @ result.displacement)
    change = result.displacement - proposal
    assert float((change + result.multiplier * slope).norm()) <= 1e-4 * float(change.norm()) + 1e-8
    assert result.multiplier * (budget - value) == pytest.approx(0.0, abs=1e-5 * (1 + result.multiplier) * scale)


@every_solver
@given(case=problems(), seed=st.integers(0, 99))
def test_solution_in_any_metric(solver, case, seed):
    matrix, rho, divergence, proposal, budget = case
    scale = normal(matrix.shape[1], seed=seed).exp()
    projection = SOLVERS[solver](matrix_jacobian(matrix), rho, divergence, scale=scale)
    result = projection.project(proposal, budget)
    expected = solve(matrix, rho, divergence, proposal, budget, scale.square())
    size = 1 + float(expected.norm())
    assert float((result.displacement - expected).norm()) <= 1e-4 * size
    assert result.predicted == pytest.approx(model(matrix, rho, divergence, result.displacement), rel=1e-5, abs=1e-8)


def test_against_a_general_purpose_optimizer():
    """From several starts: where SLSQP gives up, and whether it calls that a success, is a matter of the last bits."""
    matrix, rho, divergence, proposal = problem(4, 6, seed=3)
    budget = 0.5 * model(matrix, rho, divergence, proposal)
    target = proposal.numpy()

    def room(d: np.ndarray) -> float:
        return budget - model(matrix, rho, divergence, torch.from_numpy(d))

    ends = [
        scipy.optimize.minimize(
            lambda d: 0.5 * ((d - target) ** 2).sum(),
            start.numpy(),
            jac=lambda d: d - target,
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
            constraints={"type": "ineq", "fun": room},
        ).x
        for start in (torch.zeros(6).double(), proposal, *(normal(6, seed=seed) for seed in range(3)))
    ]
    inside = [end for end in ends if room(end) >= -1e-9 * budget]
    result = SpectralProjection(matrix_jacobian(matrix), rho, divergence).project(proposal, budget)
    # the distance is strongly convex: what is as near to 1e-9 is the same point to 1e-4
    nearest = min(inside, key=lambda end: float(((end - target) ** 2).sum()))
    torch.testing.assert_close(result.displacement, torch.from_numpy(nearest), rtol=1e-4, atol=1e-5)
    assert float((result.displacement - proposal).norm()) <= (1 + 1e-6) * float(np.linalg.norm(nearest - target))


def test_metric_of_a_network_is_the_fitted_scale():
    """Linear layers take the rank-one fit of the scale, and the projection is exact in *that* metric."""
    torch.manual_seed(0)
    factored = jacobian(mlp(3, 5, 2).double(), normal(6, 3), scale=6**-0.5)
    rho, proposal = 0.1 * normal(12, seed=1), normal(factored.shape[1], seed=2)
    wanted = normal(factored.shape[1], seed=3).exp()
    fitted = factored.scaled(wanted)[1]
    budget = 0.1 * model(factored.dense(), rho, 0.02, proposal)
    result = SpectralProjection(factored, rho, 0.02, scale=wanted).project(proposal, budget)
    expected = solve(factored.dense(), rho, 0.02, proposal, budget, fitted.square())
    torch.testing.assert_close(result.displacement, expected, rtol=1e-5, atol=1e-6)


@every_solver
@pytest.mark.parametrize("budget", [math.inf, 1e9])
def test_a_budget_that_does_not_bind_returns_the_proposal(solver, budget):
    matrix, rho, divergence, proposal = problem(4, 6, seed=3)
    result = SOLVERS[solver](matrix_jacobian(matrix), rho, divergence).project(proposal, budget)
    assert torch.equal(result.displacement, proposal)
    assert (result.damping, result.multiplier, result.kept) == (math.inf, 0.0, 1.0)
    assert result.predicted == pytest.approx(model(matrix, rho, divergence, proposal))


@given(seed=st.integers(0, 999), shares=st.tuples(st.floats(0.01, 0.999), st.floats(0.01, 0.999)))
@every_solver
def test_a_larger_budget_keeps_more(solver, seed, shares):
    matrix, rho, _, proposal = problem(4, 6, seed, pull=0.0)
    proposed = model(matrix, rho, 0.0, proposal)
    projection = SOLVERS[solver](matrix_jacobian(matrix), rho, 0.0)
    small, large = (projection.project(proposal, share * proposed) for share in sorted(shares))
    slack = 1 + 1e-6
    assert small.damping <= large.damping * slack
    assert small.kept <= large.kept * slack
    assert small.predicted <= large.predicted * slack
    assert (large.displacement - proposal).norm() <= (small.displacement - proposal).norm() * slack + 1e-9


@pytest.mark.parametrize("rows,columns", [(4, 9), (6, 6), (9, 4)])
def test_zero_budget_is_the_hard_null_space(rows, columns):
    matrix, _, _, proposal = problem(rows, columns, seed=5)
    projection = SpectralProjection(matrix_jacobian(matrix), torch.zeros(rows).double(), 0.0)
    expected = proposal - torch.from_numpy(np.linalg.pinv(matrix.numpy())) @ (matrix @ proposal)
    result = projection.project(proposal, 0.0)
    torch.testing.assert_close(result.displacement, expected, **CLOSE)
    torch.testing.assert_close(projection.null(proposal), expected, **CLOSE)
    assert result.damping == 0.0
    assert result.kept == pytest.approx(float(expected.norm() / proposal.norm()), abs=1e-8)


@pytest.mark.parametrize("rows,columns", [(4, 9), (6, 6)])
def test_zero_budget_pulls_back_to_the_reference(rows, columns):
    matrix, rho, divergence, proposal = problem(rows, columns, seed=5)
    result = SpectralProjection(matrix_jacobian(matrix), rho, divergence).project(proposal, 0.0)
    expected = proposal - torch.from_numpy(np.linalg.pinv(matrix.numpy())) @ (matrix @ proposal + rho)
    torch.testing.assert_close(result.displacement, expected, **CLOSE)
    assert result.predicted == pytest.approx(0.0, abs=1e-9)


def test_small_budgets_approach_the_hard_projection():
    matrix, rho, divergence, proposal = problem(4, 9, seed=5)
    projection = SpectralProjection(matrix_jacobian(matrix), rho, divergence)
    hard = projection.project(proposal, 0.0).displacement
    gaps = [float((projection.project(proposal, b).displacement - hard).norm()) for b in (1e-2, 1e-6, 1e-12)]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-5


@given(seed=st.integers(0, 999), log_damping=st.floats(-6, 6), rows=st.integers(1, 9))
def test_soft_null_space_is_a_damped_natural_gradient(seed, log_damping, rows):
    """(I - J^T (J J^T + l I)^{-1} J) g = l (J^T J + l I)^{-1} g (DESIGN, section 2)."""
    matrix, gradient, damping = normal(rows, 6, seed=seed), normal(6, seed=seed + 1), 10.0**log_damping
    projection = SpectralProjection(matrix_jacobian(matrix), torch.zeros(rows).double(), 0.0)
    expected = damping * torch.linalg.solve(matrix.T @ matrix + damping * torch.eye(6).double(), gradient)
    torch.testing.assert_close(projection.null(gradient, damping), expected, rtol=1e-6, atol=1e-9)


def test_hard_null_space_in_a_metric():
    """N = I - V J^T (J V J^T)^+ J: idempotent, inside the null space of J, self-adjoint in V^{-1}."""
    matrix, scale = normal(4, 7), normal(7, seed=1).exp()
    projection = SpectralProjection(matrix_jacobian(matrix), torch.zeros(4).double(), 0.0, scale=scale)
    projector = torch.stack([projection.null(column) for column in torch.eye(7).double()], 1)
    torch.testing.assert_close(matrix @ projector, torch.zeros(4, 7).double(), **CLOSE)
    torch.testing.assert_close(projector @ projector, projector, **CLOSE)
    torch.testing.assert_close(projector / scale.square()[:, None], (projector / scale.square()[:, None]).T, **CLOSE)


@pytest.mark.parametrize("columns", [200, 2000])
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_hard_projection_in_single_precision(columns, condition):
    """Float32 factors, float64 Gram, two passes: |J d| / (|J| |d|) <= 1e-6 at any conditioning (DESIGN, section 3)."""
    matrix = matrix_of_condition(64, columns, condition).float()
    projection = SpectralProjection(matrix_jacobian(matrix), torch.zeros(64), 0.0)
    for vector in (
        projection.project(normal(columns, dtype=torch.float32), 0.0).displacement,
        projection.null(normal(columns, dtype=torch.float32)),
    ):
        assert vector.dtype == torch.float32
        left = (matrix.double() @ vector.double()).norm() / (matrix.double().norm() * vector.double().norm())
        assert float(left) <= 1e-6


@pytest.mark.parametrize("share", [1e-2, 1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_predicted_is_true_in_single_precision(condition, share):
    """The model at the displacement that is returned, evaluated in float64, is the one that was promised."""
    matrix, proposal = matrix_of_condition(64, 200, condition).float(), normal(200, dtype=torch.float32)
    rho = torch.zeros(64)
    budget = share * model(matrix, rho, 0.0, proposal)
    result = SpectralProjection(matrix_jacobian(matrix), rho, 0.0).project(proposal, budget)
    assert result.predicted == pytest.approx(model(matrix, rho, 0.0, result.displacement), rel=0.05)
    assert result.predicted <= budget * 1.001


@pytest.mark.parametrize("share", [1e-4, 1e-8])
@pytest.mark.parametrize("iterations", [10, 60])
def test_krylov_tells_what_it_reached_in_single_precision(share, iterations):
    """Float32 products may miss a tiny budget, but not silently."""
    matrix, proposal = matrix_of_condition(64, 200, 1e5).float(), normal(200, dtype=torch.float32)
    budget = share * model(matrix, torch.zeros(64), 0.0, proposal)
    projection = KrylovProjection(matrix_jacobian(matrix), torch.zeros(64), 0.0, iterations=iterations)
    result = projection.project(proposal, budget)
    assert result.predicted == pytest.approx(model(matrix, torch.zeros(64), 0.0, result.displacement), rel=0.05)


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_budgets_out_of_reach_give_the_least_value(solver, dtype):
    """k > P and a residual outside the range of J: no displacement meets the budget, so take the closest best one."""
    matrix, rho, divergence, proposal = problem(40, 10, seed=7, pull=1.0)
    matrix, rho, proposal = matrix.to(dtype), rho.to(dtype), proposal.to(dtype)
    floor = least(matrix.double(), rho.double(), divergence)
    projection = SOLVERS[solver](matrix_jacobian(matrix), rho, divergence)
    for share in (0.999, 0.99, 0.9, 0.7, 0.5, 0.1, 0.0):
        result = projection.project(proposal, share * floor)
        value = model(matrix, rho, divergence, result.displacement)
        assert value == pytest.approx(floor, rel=1e-3), share
        assert result.predicted == pytest.approx(value, rel=1e-3), share


def test_the_certificate_is_measured():
    """A float32 solve has a residual: small, and not exactly zero."""
    matrix, rho, divergence, proposal = problem(64, 200, seed=2)
    projection = SpectralProjection(matrix_jacobian(matrix.float()), rho.float(), divergence)
    assert 0.0 < projection.project(proposal.float(), 0.1).residual < 1e-5


def test_the_certificate_of_a_budget_out_of_reach_is_large():
    matrix, rho, divergence, proposal = problem(40, 10, seed=7, pull=1.0)
    assert SpectralProjection(matrix_jacobian(matrix), rho, divergence).project(proposal, 0.0).residual > 0.1


@pytest.mark.parametrize("iterations", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("budget", [0.0, 1e-3, 1e-1])
def test_krylov_tells_what_it_reached(iterations, budget):
    """Too few iterations: the model is what is reported, even when that is above the budget."""
    matrix, rho, divergence, proposal = problem(20, 30, seed=1)
    result = KrylovProjection(matrix_jacobian(matrix), rho, divergence, iterations=iterations).project(proposal, budget)
    value = model(matrix, rho, divergence, result.displacement)
    assert result.predicted == pytest.approx(value, rel=1e-6, abs=1e-9)
    assert value < model(matrix, rho, divergence, proposal)
    assert result.iterations <= iterations


@pytest.mark.parametrize("rows,columns", [(20, 30), (30, 20)])
@pytest.mark.parametrize("share", [0.9, 0.1, 0.01])
def test_krylov_equals_spectral(rows, columns, share):
    matrix, rho, divergence, proposal = problem(rows, columns, seed=1, pull=0.05)
    floor = least(matrix, rho, divergence)
    budget = floor + share * (model(matrix, rho, divergence, proposal) - floor)
    spectral, krylov = (
        SOLVERS[name](matrix_jacobian(matrix), rho, divergence).project(proposal, budget) for name in ("dual", "krylov")
    )
    torch.testing.assert_close(krylov.displacement, spectral.displacement, rtol=1e-4, atol=1e-6)
    assert krylov.damping == pytest.approx(spectral.damping, rel=1e-4)
    default = KrylovProjection(matrix_jacobian(matrix), rho, divergence).project(proposal, budget)
    assert default.predicted <= 1.02 * budget + 1e-12
    assert float((default.displacement - spectral.displacement).norm()) < 0.05 * float(proposal.norm())


@every_solver
def test_budgets_met_exactly_by_the_proposal(solver):
    """Round-off decides whether the proposal is inside: either answer is fine, NaN is not."""
    for seed in range(40):
        matrix, rho, divergence, proposal = problem(4, 6, seed, pull=0.0)
        projection = SOLVERS[solver](matrix_jacobian(matrix), rho, divergence)
        budget = model(matrix, rho, divergence, proposal)
        for near in (math.nextafter(budget, 0.0), budget, math.nextafter(budget, math.inf)):
            result = projection.project(proposal, near)
            assert result.predicted == pytest.approx(budget, rel=1e-9)
            torch.testing.assert_close(result.displacement, proposal, rtol=1e-6, atol=1e-6)


def test_nothing_to_protect():
    empty = matrix_jacobian(torch.zeros(3, 5).double())
    for make in SOLVERS.values():
        for budget in (0.0, 0.1):
            result = make(empty, torch.zeros(3).double(), 0.0).project(normal(5), budget)
            assert isinstance(result, Projection)
            assert torch.equal(result.displacement, normal(5))


@every_solver
@pytest.mark.parametrize("nonsense", ["budget", "proposal", "scale", "length"])
def test_nonsense_is_refused(solver, nonsense):
    matrix, rho, divergence, proposal = problem(4, 6, seed=3)
    scale, budget = None, 0.1
    if nonsense == "budget":
        budget = math.nan
    elif nonsense == "proposal":
        proposal[2] = math.nan
    elif nonsense == "scale":
        scale = torch.tensor([0.0, 1, 1, 1, 1, 1]).double()
    else:
        rho = rho[:3]
    with pytest.raises(ValueError):
        SOLVERS[solver](matrix_jacobian(matrix), rho, divergence, scale=scale).project(proposal, budget)


@given(case=problems(), seed=st.integers(0, 99), scaled=st.booleans())
def test_primal_equals_dual(case, seed, scaled):
    matrix, rho, divergence, proposal, budget = case
    scale = normal(matrix.shape[1], seed=seed).exp() if scaled else None
    dual, primal = (
        SpectralProjection(matrix_jacobian(matrix), rho, divergence, scale=scale, method=method)
        for method in ("dual", "primal")
    )
    assert (dual.spectrum.rank, dual.method, primal.method) == (primal.spectrum.rank, "dual", "primal")
    for limit in (budget, 0.0):
        theirs, ours = dual.project(proposal, limit), primal.project(proposal, limit)
        size = 1.0 + float(theirs.displacement.norm())
        assert float((ours.displacement - theirs.displacement).norm()) <= 1e-8 * size
        assert ours.predicted == pytest.approx(theirs.predicted, rel=1e-8, abs=1e-8)
        assert ours.damping == pytest.approx(theirs.damping, rel=1e-6)
        assert ours.effective_dimension == pytest.approx(theirs.effective_dimension, rel=1e-6)
    for damping in (0.0, 0.1):
        gap = dual.null(proposal, damping) - primal.null(proposal, damping)
        assert float(gap.norm()) <= 1e-8 * (1.0 + float(proposal.norm()))


@pytest.mark.parametrize("rows,columns,expected", [(40, 10, "primal"), (10, 40, "dual"), (1, 1, "dual")])
def test_fewer_parameters_than_rows_are_solved_in_parameter_space(rows, columns, expected):
    matrix, rho, divergence, proposal = problem(rows, columns, seed=3)
    projection = SpectralProjection(matrix_jacobian(matrix), rho, divergence)
    assert projection.method == expected
    assert projection.project(proposal, 0.0).certificate.method.split("/")[0] == expected
    assert projection.spectrum.values.shape == (min(rows, columns),)


def test_primal_forms_no_gram_matrix():
    matrix, rho, divergence, proposal = problem(40, 10, seed=3)
    factored = matrix_jacobian(matrix)
    factored.gram = lambda *args: pytest.fail("the Gram matrix was formed")
    SpectralProjection(factored, rho, divergence).project(proposal, 0.1)


@pytest.mark.parametrize("share", [1e-2, 1e-6, 0.0])
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_primal_in_single_precision(condition, share):
    """k > P with float32 factors: the promised model is the true one, and the hard null space is empty of J."""
    matrix = (matrix_of_condition(300, 20, condition) @ normal(20, 40, seed=1)).float()
    proposal, rho = normal(40, dtype=torch.float32), torch.zeros(300)
    proposed = model(matrix, rho, 0.0, proposal)
    projection = SpectralProjection(matrix_jacobian(matrix), rho, 0.0)
    result = projection.project(proposal, share * proposed)
    value = model(matrix, rho, 0.0, result.displacement)
    assert projection.method == "primal" and result.displacement.dtype == torch.float32
    assert result.predicted == pytest.approx(value, rel=0.01, abs=1e-18)
    assert value <= 1.001 * share * proposed + 1e-14 * proposed
    assert result.residual < 1e-5


@pytest.mark.parametrize("method", ["dual", "primal"])
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_leakage_in_single_precision(condition, method):
    """Two passes leave |J d| / (|J| |d|) <= 1e-8, the rounding of d itself (DESIGN, section 3)."""
    matrix = matrix_of_condition(64, 400, condition).float()
    projection = SpectralProjection(matrix_jacobian(matrix), torch.zeros(64), 0.0, method=method)
    for vector in (
        projection.project(normal(400, dtype=torch.float32), 0.0).displacement,
        projection.null(normal(400, dtype=torch.float32)),
    ):
        left = (matrix.double() @ vector.double()).norm() / (matrix.double().norm() * vector.double().norm())
        assert float(left) <= 1e-8


@pytest.mark.parametrize("solver,name", [("dual", "dual/eigh"), ("primal", "primal"), ("krylov", "krylov")])
@pytest.mark.parametrize("rows,columns", [(20, 30), (30, 20)])
def test_certificates(solver, name, rows, columns):
    matrix, rho, divergence, proposal = problem(rows, columns, seed=1, pull=0.05)
    floor = least(matrix, rho, divergence)
    budget = floor + 0.1 * (model(matrix, rho, divergence, proposal) - floor)
    result = SOLVERS[solver](matrix_jacobian(matrix), rho, divergence).project(proposal, budget)
    certificate, values = result.certificate, torch.linalg.svdvals(matrix).square()
    assert certificate.method == name and certificate.dtype == torch.float64
    assert certificate.residual < 1e-6 and certificate.seconds > 0.0
    effective = float((values / (values + certificate.damping)).sum())
    if solver == "krylov":  # of the Ritz values
        assert 0.5 * effective <= certificate.effective_dimension <= effective * (1 + 1e-9)
        assert 10 <= certificate.rank <= 20
    else:
        assert certificate.effective_dimension == pytest.approx(effective) and certificate.rank == 20
    assert (result.damping, result.residual, result.rank) == (
        certificate.damping,
        certificate.residual,
        certificate.rank,
    )
    assert (result.iterations, result.seconds) == (certificate.passes, certificate.seconds)


def test_a_jacobian_too_large_to_be_decomposed():
    matrix, rho, divergence, _ = problem(20, 30, seed=1)
    with pytest.raises(ValueError, match="linearise fewer states, or solve by KrylovProjection"):
        SpectralProjection(matrix_jacobian(matrix), rho, divergence, memory=1000.0)
