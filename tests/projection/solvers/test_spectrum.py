"""Eigen-decompositions of Gram matrices: order, rank, effective dimension."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsrl.projection import spectrum
from tests.projection.builders import matrix_of_condition, normal


def gram_of_rank(rows: int, columns: int, rank: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Gram matrix in float64 of a rank-deficient Jacobian stored in `dtype`: the last rows repeat the first ones."""
    jacobian = normal(rank, columns, seed=seed, dtype=dtype)
    repeats = torch.arange(rows) % rank
    return jacobian[repeats].double() @ jacobian[repeats].double().T


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 999))
def test_decomposition(rows, columns, seed):
    jacobian = normal(rows, columns, seed=seed)
    gram = jacobian @ jacobian.T
    result = spectrum(gram)
    assert result.values.dtype == result.vectors.dtype == torch.float64
    torch.testing.assert_close(result.vectors * result.values @ result.vectors.T, gram, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.vectors.T @ result.vectors, torch.eye(rows, dtype=torch.float64))
    assert bool((result.values[:-1] >= result.values[1:]).all()) and bool((result.values >= 0).all())
    singular = torch.linalg.svdvals(jacobian)
    torch.testing.assert_close(result.values[: len(singular)], singular.square(), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("rows,columns,rank", [(20, 50, 7), (40, 10, 10), (200, 30, 30), (8, 8, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_of_repeated_states(rows, columns, rank, dtype):
    assert spectrum(gram_of_rank(rows, columns, rank, dtype), dtype).rank == rank


@pytest.mark.parametrize("factor", [1e-20, 1e-6, 1e6, 1e20])
def test_rank_is_free_of_scale(factor):
    gram = gram_of_rank(20, 50, 7, torch.float32)
    assert spectrum(factor * gram, torch.float32).rank == 7


@pytest.mark.parametrize("columns", [100, 10_000])
def test_rank_does_not_depend_on_columns_that_are_zero(columns):
    """A critic's parameters own columns of zeros: they must not cost protected directions."""
    jacobian = matrix_of_condition(16, 100, 1e3)
    assert spectrum(jacobian @ jacobian.T, torch.float32).rank == 16


def test_rank_of_nothing():
    assert spectrum(torch.zeros(3, 3)).rank == 0
    assert spectrum(torch.zeros(0, 0)).rank == 0


def test_low_rank_in_single_precision_is_decomposed_in_double():
    """float32 `eigh` fails or returns garbage here (pitfall 5)."""
    gram = gram_of_rank(60, 80, 3, torch.float32).float()
    result = spectrum(gram)
    assert torch.isfinite(result.vectors).all() and result.values.dtype == torch.float64
    torch.testing.assert_close(result.vectors * result.values @ result.vectors.T, gram.double(), rtol=1e-5, atol=1e-5)


@given(seed=st.integers(0, 999), log_damping=st.floats(-12, 12))
def test_effective_dimension(seed, log_damping):
    """The trace of the soft projector J^T (J J^T + lambda)^{-1} J, by a dense solve."""
    jacobian, damping = normal(5, 8, seed=seed), 10.0**log_damping
    result = spectrum(jacobian @ jacobian.T, torch.float64)
    soft = jacobian.T @ torch.linalg.solve(jacobian @ jacobian.T + damping * torch.eye(5).double(), jacobian)
    assert result.effective_dimension(damping) == pytest.approx(float(soft.trace()), rel=1e-6, abs=1e-9)
    assert result.effective_dimension(2 * damping) <= result.effective_dimension(damping) <= result.rank + 1e-9


def test_effective_dimension_at_the_ends():
    result = spectrum(gram_of_rank(20, 50, 7, torch.float32))
    assert result.effective_dimension(0.0) == 7
    assert result.effective_dimension(math.inf) == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gram_matrices_that_are_not_finite(value):
    gram = torch.eye(3)
    gram[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        spectrum(gram)


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 999), log_damping=st.floats(-6, 3))
def test_solutions(rows, columns, seed, log_damping):
    """Damped: the inverse. Undamped: the pseudo-inverse at the rank. One right-hand side or several."""
    jacobian, damping = normal(rows, columns, seed=seed), 10.0**log_damping
    gram, right = jacobian @ jacobian.T, normal(rows, 2, seed=seed + 1)
    parts = spectrum(gram, torch.float64)
    expected = torch.linalg.solve(gram + damping * torch.eye(rows).double(), right)
    torch.testing.assert_close(
        parts.solve(right, damping), expected, rtol=1e-7, atol=1e-7 * float(expected.abs().max())
    )
    inverse = torch.linalg.pinv(gram, rtol=1e-12, hermitian=True)
    scale = float(inverse.abs().max())
    torch.testing.assert_close(parts.solve(right), inverse @ right, rtol=1e-6, atol=1e-9 * scale)
    torch.testing.assert_close(parts.solve(right[:, 0]), parts.solve(right)[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows,columns,rank", [(200, 30, 30), (200, 30, 7), (2000, 5, 5)])
def test_rank_in_parameter_space(rows, columns, rank, dtype):
    """J^T J has the rank of J J^T, judged by the same tolerance."""
    jacobian = (normal(rows, rank) @ normal(rank, columns, seed=1)).to(dtype).double()
    assert spectrum(jacobian.T @ jacobian, dtype, rows).rank == rank
    if rows < 1000:
        assert spectrum(jacobian @ jacobian.T, dtype).rank == rank


@pytest.mark.parametrize("failure", ["raises", "NaN"])
def test_eigensolvers_that_fail_are_replaced(monkeypatch, failure):
    """CUDA's fails or returns NaN for some matrices of low rank; LAPACK's is asked then."""
    gram, asked, honest = gram_of_rank(20, 50, 7, torch.float32), [], torch.linalg.eigh

    def eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(matrix.device.type)
        if len(asked) > 1:
            return honest(matrix)
        if failure == "raises":
            raise torch.linalg.LinAlgError("failed to converge")
        return torch.full((20,), math.nan), torch.full((20, 20), math.nan)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    result = spectrum(gram)
    assert asked == ["cpu", "cpu"] and result.rank == 7
    torch.testing.assert_close(result.vectors * result.values @ result.vectors.T, gram, rtol=1e-9, atol=1e-9)
