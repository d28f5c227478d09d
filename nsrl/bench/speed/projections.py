"""The hard null space of one displacement: through the factors, and through a dense orthonormal basis.

dense      d = v - Q (Q^T v)          Q: P x k, orthonormal, spans the rows of J; made beforehand
factored   d = v - J^T K^+ J v        K = J J^T; decomposed beforehand
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, jvp

from nsrl.bench.speed.cases import Problem
from nsrl.projection import SpectralProjection, jacobian


def factored_null(problem: Problem) -> Callable[[], Tensor]:
    """`SpectralProjection.null`."""
    solver = _solver(problem)
    return lambda: solver.null(problem.proposal)


def factored_projection(problem: Problem) -> Callable[[], Tensor]:
    """`SpectralProjection.project` with budget 0: the same displacement with its certificate."""
    solver = _solver(problem)
    return lambda: solver.project(problem.proposal, 0.0).displacement


def dense_projection(problem: Problem) -> Callable[[], Tensor]:
    """Two products with a dense basis, stored with its rows contiguous."""
    basis = orthonormal_rows(jacobian(problem.model, problem.inputs).dense())
    return lambda: problem.proposal - (basis @ problem.proposal) @ basis


def orthonormal_rows(matrix: Tensor, chunk: int = 1 << 14) -> Tensor:
    """Overwrite a matrix of full row rank with an orthonormal basis of its rows.

    Cholesky QR in float64, some columns at a time, so that nothing large is held next to the matrix. The basis is as
    orthonormal as float32 can store it up to a condition number of about 1e4.

    Args:
        matrix: shape (k, P), k <= P.
        chunk: columns at a time.
    """
    gram = torch.zeros(len(matrix), len(matrix), dtype=torch.float64, device=matrix.device)
    for columns in matrix.split(chunk, 1):
        gram += columns.double() @ columns.double().T
    factor = torch.linalg.cholesky(gram)
    for columns in matrix.split(chunk, 1):
        columns.copy_(torch.linalg.solve_triangular(factor, columns.double(), upper=False))
    return matrix


def relative_residual(problem: Problem, displacement: Tensor) -> float:
    """|J d| / (|J| |d|), J d by forward-mode differentiation of the model in float64, |J| the spectral norm."""
    values, tangents, start = {}, {}, 0
    for name, parameter in problem.model.named_parameters():
        values[name] = parameter.detach().double()
        part = displacement[start : start + parameter.numel()]
        tangents[name] = part.view_as(parameter).double()
        start += parameter.numel()

    def call(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(problem.model, parameters, (problem.inputs.double(),))

    moved = jvp(call, (values,), (tangents,))[1]
    largest = torch.linalg.eigvalsh(jacobian(problem.model, problem.inputs).gram())[-1]
    return float(moved.norm() / (largest.sqrt() * displacement.double().norm()))


def _solver(problem: Problem) -> SpectralProjection:
    factored = jacobian(problem.model, problem.inputs)
    return SpectralProjection(factored, torch.zeros(factored.shape[0], device=problem.inputs.device), 0.0)
