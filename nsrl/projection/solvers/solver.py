"""What the solvers share: an approximate inverse of K + lambda, refined by the residual that is measured."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from nsrl.projection.jacobians.factored import Jacobian, doubled, storage


@dataclass(frozen=True)
class Certificate:
    """How a system with K = J J^T was solved, and what the answer is worth.

    Attributes:
        method: "dual/cholesky", "dual/eigh", "primal", "nystrom" or "krylov".
        residual: |K y + damping y - b| / |b|, measured after the last pass (of several right-hand sides, the largest).
        rank: numerical rank of J. A lower bound where the method does not see the whole spectrum: nystrom, krylov,
            and a damped dual/cholesky of a rank-deficient K.
        effective_dimension: sum s / (s + damping) over the eigenvalues of K, with the same reservation.
        damping: lambda, as it was used.
        dtype: of the factors of J. Factorisations and vectors of length k are float64 always.
        passes: refinement passes made (Krylov dimension for "krylov").
        seconds: wall time.
    """

    method: str
    residual: float
    rank: int
    effective_dimension: float
    damping: float
    dtype: torch.dtype
    passes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.method}: residual {self.residual:.1e}, rank {self.rank}, effective dimension "
            f"{self.effective_dimension:.1f} at lambda {self.damping:.3g}, {str(self.dtype).removeprefix('torch.')} "
            f"factors, {self.passes} passes, {self.seconds:.3g} s"
        )


@dataclass(frozen=True)
class Solution:
    """An answer and what it is worth.

    Attributes:
        values: y, shape (k,) or (k, c), float64; of a projection the vector, shape (P,), in its own dtype.
        certificate: how it was obtained. The residual of a projection is |J d - lambda y| / |J v|; of a damped
            "primal" one, which has no y, the same after multiplication with J^T. The seconds are those of this answer,
            without the factorisation.
    """

    values: Tensor
    certificate: Certificate


class Solver(ABC):
    """(K + lambda)^+ in some form.

    Products with J are made with its factors in float64: in float32 their round-off, amplified by K^{-1}, ends up in
    the answer (at condition 1e5 a projected vector is off by 5e-4, whatever the number of passes).

    Args:
        jacobian: J, shape (k, P).
        damping: lambda; 0 for the pseudo-inverse.
        passes: largest number of refinement passes.

    Raises:
        ValueError: a damping that is negative or not finite, a Jacobian with NaN or infinite entries.
    """

    def __init__(self, jacobian: Jacobian, damping: float = 0.0, passes: int = 2):
        if not 0.0 <= damping < math.inf:
            raise ValueError(f"the damping must be 0 or a positive finite number, not {damping}")
        self.jacobian = doubled(jacobian)
        self.damping = damping
        self.passes = passes
        self.dtype, self.device = storage(jacobian)

    @property
    @abstractmethod
    def method(self) -> str:
        """As in `Certificate`."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """Numerical rank of J, or a lower bound (see `Certificate`)."""

    @property
    @abstractmethod
    def effective_dimension(self) -> float:
        """Sum s / (s + lambda), or a lower bound."""

    @abstractmethod
    def _inverse(self, rows: Tensor) -> Tensor:
        """(K + lambda)^+ times rows (k, c), as good as one application is."""

    @abstractmethod
    def _gram(self, rows: Tensor) -> Tensor:
        """K times rows (k, c)."""

    def solve(self, rows: Tensor) -> Solution:
        """(K + lambda)^+ b for b of shape (k,) or (k, c), refined by the residual that is left.

        Raises:
            ValueError: a wrong shape, NaN or infinite entries.
        """
        start = perf_counter()
        self._check(rows, self.jacobian.shape[0], "right-hand side")
        wrong = right = rows.double().reshape(len(rows), -1)
        solution, passes, residual = torch.zeros_like(right), 0, 1.0 if bool(right.any()) else 0.0
        while passes < self.passes and residual > 1e-14:
            refined = solution + self._inverse(wrong)
            left = right - self._gram(refined) - self.damping * refined
            passes += 1
            share = residual_share(left, right)
            if not share < residual:  # NaN, too
                break
            solution, wrong, residual = refined, left, share
        return Solution(solution.view(rows.shape), self._certificate(residual, passes, start))

    def null(self, vector: Tensor) -> Solution:
        """Project v of shape (P,) to v - J^T (K + lambda)^+ J v: what J does not see, or, damped, sees little of.

        Raises:
            ValueError: a wrong shape, NaN or infinite entries.
        """
        start = perf_counter()
        self._check(vector, self.jacobian.shape[1], "vector")
        result, passes = vector.double(), 0
        seen = wrong = self._seen(result)
        dual = torch.zeros_like(seen)
        while passes < self.passes and residual_share(wrong, seen) > 1e-14:
            correction = self._inverse(wrong.unsqueeze(1)).squeeze(1)
            result = result - self._pulled(correction)
            dual = dual + correction
            wrong = self._seen(result) - self._softness * dual
            passes += 1
        return Solution(result.to(vector.dtype), self._certificate(residual_share(wrong, seen), passes, start))

    @property
    def _softness(self) -> float:
        """The lambda that passes of a projection converge to."""
        return self.damping

    def _seen(self, vector: Tensor) -> Tensor:
        seen = self.jacobian.matvec(vector).double()
        if not bool(torch.isfinite(seen).all()):
            raise ValueError("a product with J has NaN or infinite entries; the model's outputs have diverged")
        return seen

    def _pulled(self, rows: Tensor) -> Tensor:
        return self.jacobian.rmatvec(rows).double()

    def _check(self, tensor: Tensor, length: int, what: str) -> None:
        if tensor.ndim == 0 or len(tensor) != length or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"the {what} must be {length} finite numbers, not of shape {tuple(tensor.shape)} or NaN")

    def _certificate(self, residual: float, passes: int, start: float) -> Certificate:
        return Certificate(
            self.method,
            residual,
            self.rank,
            self.effective_dimension,
            self.damping,
            self.dtype,
            passes,
            perf_counter() - start,
        )


def residual_share(part: Tensor, whole: Tensor) -> float:
    """Largest ratio of norms over the columns; 0 where there is nothing."""
    norms, wholes = torch.linalg.vector_norm(part, dim=0), torch.linalg.vector_norm(whole, dim=0)
    ratios = torch.where(wholes > 0.0, norms / wholes.clamp_min(1e-300), norms)
    return float(ratios.max()) if ratios.numel() else 0.0
