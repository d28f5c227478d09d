"""Solving through the Gram matrix K = J J^T, k x k, in float64."""

from __future__ import annotations

import math
from functools import cached_property
from time import perf_counter

import torch
from torch import Tensor

from nsrl.projection.jacobians.factored import Jacobian, row_chunks
from nsrl.projection.solvers.solver import Solution, Solver, residual_share
from nsrl.projection.solvers.spectrum import Spectrum, spectrum, tolerance

#: A Cholesky factor whose solution leaves more than this is given up for the eigenbasis.
LARGEST_RESIDUAL = 1e-8


class DualSolver(Solver):
    """The Gram matrix in float64, by Cholesky where that is safe and by its eigenbasis where not."""

    def __init__(self, jacobian: Jacobian, damping: float = 0.0, passes: int = 2):
        super().__init__(jacobian, damping, passes)
        self.gram = self.jacobian.gram().double()
        if not bool(torch.isfinite(self.gram).all()):
            raise ValueError("the Gram matrix has NaN or infinite entries; the model's outputs have diverged")
        self._cholesky = self._factor(damping)

    @property
    def method(self) -> str:
        """As in `Certificate`."""
        return "dual/eigh" if self._cholesky is None else "dual/cholesky"

    @property
    def rank(self) -> int:
        """Numerical rank of J; a lower bound where only K + lambda was factorised."""
        if self._cholesky is None:
            return self._spectrum.rank
        # No eigenvalue is known, but each counts for less than one in the effective dimension.
        return len(self.gram) if self._is_regular else math.ceil(self._effective - 1e-6)

    @property
    def effective_dimension(self) -> float:
        """Sum s / (s + lambda)."""
        return self._spectrum.effective_dimension(self.damping) if self._cholesky is None else self._effective

    def solve(self, rows: Tensor) -> Solution:
        """As `Solver.solve`; a Cholesky factor that turns out useless is replaced."""
        solution = super().solve(rows)
        if self._cholesky is not None and not solution.certificate.residual <= LARGEST_RESIDUAL:
            self._cholesky = None
            solution = super().solve(rows)
        return solution

    def _factor(self, damping: float) -> Tensor | None:
        """Cholesky factor of K + damping; None when it fails or K + damping is singular to working precision."""
        rows = len(self.gram)
        damped = self.gram + damping * torch.eye(rows, dtype=torch.float64, device=self.gram.device)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if rows == 0 or bool(failed):
            return None
        # Squares of the pivots bound the least eigenvalue from above: in practice by a factor of k at most. What lies
        # below the tolerance of an undamped K is round-off of the factors of J, and the pseudo-inverse leaves it out.
        pivots = factor.diagonal().square()
        round_off = tolerance(rows, self.dtype if damping == 0.0 else torch.float64)
        return factor if float(pivots.min()) > rows * round_off * float(pivots.max()) else None

    @cached_property
    def _spectrum(self) -> Spectrum:
        return spectrum(self.gram, self.dtype)

    @cached_property
    def _is_regular(self) -> bool:
        return self.damping == 0.0 or self._factor(0.0) is not None

    @cached_property
    def _effective(self) -> float:
        """Tr K (K + lambda)^{-1} = k - lambda |L^{-1}|^2."""
        assert self._cholesky is not None
        unit = torch.eye(len(self.gram), dtype=torch.float64, device=self.gram.device)
        inverse = torch.linalg.solve_triangular(self._cholesky, unit, upper=False)
        return len(self.gram) - self.damping * float(inverse.square().sum())

    def _inverse(self, rows: Tensor) -> Tensor:
        if self._cholesky is None:
            return self._spectrum.solve(rows, self.damping)
        return torch.cholesky_solve(rows, self._cholesky)

    def _gram(self, rows: Tensor) -> Tensor:
        return self.gram @ rows


class ParameterBasis:
    """Eigenbasis of J^T J, which is summed over rows that are formed some at a time.

    Its eigenvalues are those of K = J J^T, and U = J W s^{-1/2} are the eigenvectors of K.

    Args:
        jacobian: a `FactoredJacobian` or `StackedJacobian`, shape (k, P).
        storage: dtype that the factors had when they were captured.

    Attributes:
        spectrum: of J^T J.
        values: its eigenvalues above round-off, shape (r,).
        vectors: their eigenvectors, shape (P, r).

    Raises:
        ValueError: a Jacobian with NaN or infinite entries, or without the factors of all columns.
    """

    def __init__(self, jacobian: Jacobian, storage: torch.dtype):
        rows, columns = jacobian.shape
        matrix: Tensor | None = None
        for chunk in row_chunks(jacobian):
            matrix = chunk.T @ chunk if matrix is None else matrix.addmm_(chunk.T, chunk)
        self.spectrum: Spectrum = spectrum(torch.zeros(columns, columns) if matrix is None else matrix, storage, rows)
        rank = self.spectrum.rank
        self.values, self.vectors = self.spectrum.values[:rank], self.spectrum.vectors[:, :rank]

    def components(self, pulled: Tensor) -> Tensor:
        """U^T b, shape (r,), from J^T b, shape (P,)."""
        return (self.vectors.T @ pulled) / self.values.sqrt()

    def relaxed(self, gradient: Tensor, damping: float) -> Tensor:
        """(J^T J + damping)^{-1} times a float64 vector in the range of J^T, shape (P,)."""
        return self.vectors @ ((self.vectors.T @ gradient) / (self.values + damping))


class PrimalSolver(Solver):
    """The eigenbasis of J^T J. For `solve`, rows of J are formed again, some at a time, whenever they are needed."""

    def __init__(self, jacobian: Jacobian, damping: float = 0.0, passes: int = 2):
        super().__init__(jacobian, damping, passes)
        self.basis = ParameterBasis(self.jacobian, self.dtype)

    @property
    def method(self) -> str:
        """As in `Certificate`."""
        return "primal"

    @property
    def rank(self) -> int:
        """Numerical rank of J."""
        return self.basis.spectrum.rank

    @property
    def effective_dimension(self) -> float:
        """Sum s / (s + lambda)."""
        return self.basis.spectrum.effective_dimension(self.damping)

    def null(self, vector: Tensor) -> Solution:
        """As `Solver.null`: where it ends, J^T J d = lambda (v - d)."""
        start = perf_counter()
        self._check(vector, self.jacobian.shape[1], "vector")
        proposal = result = vector.double()
        seen = self._seen(proposal)
        pulled = gradient = self._pulled(seen)
        passes, residual = 0, 1.0 if bool(seen.any()) else 0.0
        while passes < self.passes and residual > 1e-14:
            result = result - self.basis.relaxed(gradient, self.damping)
            left = self._seen(result)
            gradient = self._pulled(left) - self.damping * (proposal - result)
            passes += 1
            residual = residual_share(gradient, pulled) if self.damping > 0.0 else residual_share(left, seen)
        return Solution(result.to(vector.dtype), self._certificate(residual, passes, start))

    def _inverse(self, rows: Tensor) -> Tensor:
        pulled, values = self.basis.vectors.T @ self._transposed(rows), self.basis.values.unsqueeze(1)
        if self.damping == 0.0:
            return self._times(self.basis.vectors @ (pulled / values.square()))
        return (rows - self._times(self.basis.vectors @ (pulled / (values + self.damping)))) / self.damping

    def _gram(self, rows: Tensor) -> Tensor:
        return self._times(self._transposed(rows))

    def _times(self, vectors: Tensor) -> Tensor:
        return torch.cat([chunk @ vectors for chunk in row_chunks(self.jacobian)])

    def _transposed(self, rows: Tensor) -> Tensor:
        total, start = rows.new_zeros(self.jacobian.shape[1], rows.shape[1]), 0
        for chunk in row_chunks(self.jacobian):
            total += chunk.T @ rows[start : start + len(chunk)]
            start += len(chunk)
        return total
