"""Randomised preconditioning against dense float64 algebra and plain conjugate gradients."""

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nsrl.projection.solvers.conjugate_gradients import batched_conjugate_gradients
from nsrl.projection.solvers.nystrom import NystromSolver, nystrom
from tests.projection.builders import matrix_jacobian, normal


def psd(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with the given eigenvalues."""
    vectors = torch.linalg.qr(normal(len(values), len(values), seed=seed))[0]
    matrix = vectors * values @ vectors.T
    return (matrix + matrix.T) / 2


def steep(condition: float, size: int = 300, leading: int = 20) -> Tensor:
    """`leading` eigenvalues from `condition` to 1 and a tail of 1e-6: at lambda 0.01 the effective dimension is 20."""
    return torch.cat([torch.logspace(math.log10(condition), 0, leading), torch.full((size - leading,), 1e-6)]).double()


def damped(matrix: Tensor, damping: float):
    return lambda rows: matrix @ rows + damping * rows


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5, 1e7])
def test_iterations_do_not_depend_on_the_condition(condition):
    """O(1) iterations at a small effective dimension; plain conjugate gradients pay for every decade."""
    values, damping = steep(condition), 1e-2
    assert float((values / (values + damping)).sum()) < 21
    matrix, rows = psd(values), normal(300, 1, seed=1)
    product = damped(matrix, damping)
    sketch = nystrom(lambda x: matrix @ x, 300, damping)
    solution, made = batched_conjugate_gradients(
        product, rows, precondition=lambda r: sketch.preconditioned(r, damping), tolerance=1e-8
    )
    assert len(sketch.values) <= 64 and made <= 8
    assert float((product(solution) - rows).norm() / rows.norm()) <= 1e-6
    plain = batched_conjugate_gradients(product, rows, tolerance=1e-8)[1]
    assert plain >= 2.5 * made if condition < 1e3 else plain >= 8 * made


def test_conjugate_gradients_equal_scipy():
    """As many iterations, up to the directions that rounding costs; both come to the precision that was asked for."""
    matrix, rows = psd(torch.logspace(0, -3, 60).double()), normal(60, 1, seed=1)
    counted: list[int] = []
    theirs, _ = scipy.sparse.linalg.cg(
        matrix.numpy(), rows[:, 0].numpy(), rtol=1e-8, atol=0.0, callback=lambda _: counted.append(1)
    )
    solution, made = batched_conjugate_gradients(lambda x: matrix @ x, rows, tolerance=1e-8)
    assert abs(made - len(counted)) <= 0.1 * len(counted)
    for found in (solution[:, 0], torch.from_numpy(theirs)):
        assert float((matrix @ found - rows[:, 0]).norm() / rows.norm()) <= 1.1e-8


@given(seed=st.integers(0, 999), size=st.integers(1, 30), columns=st.integers(1, 4))
def test_several_right_hand_sides(seed, size, columns):
    matrix, rows = psd(normal(size, seed=seed).exp(), seed), normal(size, columns, seed=seed + 1)
    rows[:, 0] = 0.0
    together, _ = batched_conjugate_gradients(lambda x: matrix @ x, rows, tolerance=1e-12)
    torch.testing.assert_close(together, torch.linalg.solve(matrix, rows), rtol=1e-6, atol=1e-8)


def test_too_few_iterations_are_not_hidden():
    matrix, rows = psd(torch.logspace(0, -8, 60).double()), normal(60, 1, seed=1)
    solution, made = batched_conjugate_gradients(lambda x: matrix @ x, rows, iterations=7)
    assert made == 7 and float((matrix @ solution - rows).norm()) > 1e-3 * float(rows.norm())


@given(seed=st.integers(0, 999), size=st.integers(1, 40), decay=st.floats(0.3, 0.99), log_damping=st.floats(-8, 1))
def test_sketches(seed, size, decay, log_damping):
    """Below K, leading eigenvalues found, large enough for the damping (Frangella et al., section 2.3)."""
    values, damping = decay ** torch.arange(size, dtype=torch.float64), 10.0**log_damping
    matrix = psd(values, seed)
    sketch = nystrom(lambda x: matrix @ x, size, damping, size=2, seed=seed)
    unit = torch.eye(sketch.values.numel(), dtype=torch.float64)
    torch.testing.assert_close(sketch.vectors.T @ sketch.vectors, unit, rtol=0, atol=1e-9)
    approximation = sketch.vectors * sketch.values @ sketch.vectors.T
    assert float(torch.linalg.eigvalsh(matrix - approximation).min()) >= -1e-12
    assert len(sketch.values) >= size or float(sketch.values[-1]) <= damping
    exact = float((values / (values + damping)).sum())
    assert sketch.effective_dimension(damping) <= exact * (1 + 1e-9)
    preconditioned = sketch.preconditioned(matrix + damping * torch.eye(size, dtype=torch.float64), damping)
    eigenvalues = np.linalg.eigvals(preconditioned.numpy()).real
    assert 0 < eigenvalues.min() and eigenvalues.max() / eigenvalues.min() < 200


def test_a_full_sketch_inverts():
    matrix, damping = psd(torch.logspace(0, -6, 30).double()), 1e-9
    sketch = nystrom(lambda x: matrix @ x, 30, damping)
    assert len(sketch.values) == 30
    _, made = batched_conjugate_gradients(
        damped(matrix, damping), normal(30, 1), precondition=lambda r: sketch.preconditioned(r, damping)
    )
    assert made <= 6


def test_the_largest_sketch_is_kept_to():
    matrix = psd(torch.ones(50).double())
    assert nystrom(lambda x: matrix @ x, 50, 1e-6, largest=20).vectors.shape == (50, 20)


def test_nothing_to_sketch():
    sketch = nystrom(torch.zeros_like, 9, 1e-3)
    assert sketch.values.numel() == 0 and sketch.effective_dimension(1e-3) == 0.0
    rows = normal(9, 2)
    assert torch.equal(sketch.preconditioned(rows, 1e-3), rows)


def test_sketches_are_reproducible():
    matrix = psd(torch.logspace(0, -6, 60).double())
    first, again, other = (nystrom(lambda x: matrix @ x, 60, 1e-2, seed=seed).values for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_sketches_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    nystrom(torch.zeros_like, 9, 1e-3)
    assert torch.equal(torch.get_rng_state(), before)


def test_products_that_are_not_finite():
    with pytest.raises(ValueError, match="NaN or infinite"):
        nystrom(lambda x: x * math.nan, 9, 1e-3)


def test_a_solver_of_many_rows_sketches_few():
    """600 rows of effective dimension 9: the Gram matrix is neither formed nor needed."""
    values = 0.5 ** torch.arange(40, dtype=torch.float64)
    left, right = (torch.linalg.qr(normal(size, 40, seed=seed))[0] for size, seed in ((600, 1), (900, 2)))
    factored = matrix_jacobian(left * values.sqrt() @ right.T)
    factored.gram = lambda *args: pytest.fail("the Gram matrix was formed")  # type: ignore[method-assign]
    solver, rows = NystromSolver(factored, 1e-3), normal(600, seed=3)
    result = solver.solve(rows)
    assert solver.sketch.vectors.shape[1] <= 16 and solver.iterations_made <= 40
    assert result.certificate.residual <= 1e-10
    matrix = factored.dense() @ factored.dense().T + 1e-3 * torch.eye(600).double()
    torch.testing.assert_close(result.values, torch.linalg.solve(matrix, rows), rtol=1e-8, atol=1e-8)
    assert result.certificate.effective_dimension == pytest.approx(float((values / (values + 1e-3)).sum()), rel=0.02)
