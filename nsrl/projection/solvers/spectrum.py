"""Eigen-decomposition of a Gram matrix, in float64, with the numbers that a user needs to trust it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """K = U diag(s) U^T of a Gram matrix K = J J^T, or of J^T J, which has the same eigenvalues but for zeros.

    Attributes:
        values: s, descending, non-negative, shape (n,), float64.
        vectors: U, shape (n, n), float64.
        rank: number of eigenvalues above the tolerance.
    """

    values: Tensor
    vectors: Tensor
    rank: int

    def effective_dimension(self, damping: float) -> float:
        """Sum s / (s + damping): how many directions a damped projector really removes."""
        if math.isinf(damping):
            return 0.0
        if damping <= 0.0:
            return float(self.rank)
        return float((self.values / (self.values + damping)).sum())

    def solve(self, rows: Tensor, damping: float = 0.0) -> Tensor:
        """(K + damping)^{-1} times rows (n,) or (n, c), float64; for damping 0 the pseudo-inverse at the rank."""
        if damping > 0.0:
            inverse = 1.0 / (self.values + damping)
        else:
            kept = torch.arange(self.values.numel(), device=self.values.device) < self.rank
            inverse = torch.where(kept, 1.0 / self.values.clamp_min(1e-300), torch.zeros_like(self.values))
        components = self.vectors.T @ rows
        return self.vectors @ (components * (inverse if rows.ndim == 1 else inverse.unsqueeze(1)))


def spectrum(gram: Tensor, storage: torch.dtype = torch.float32, rows: int | None = None) -> Spectrum:
    """Decompose a Gram matrix.

    Eigenvalues at most `tolerance` times the largest are round-off and do not count towards the rank: of the stored
    factors, whose error moves the singular values of J by up to sqrt(k) eps sigma_max (squared, on K), or of the
    eigen-decomposition itself.

    Args:
        gram: K, symmetric, shape (n, n).
        storage: dtype of the factors that K was formed from.
        rows: rows k of J, when `gram` is J^T J; default n.

    Raises:
        ValueError: for a Gram matrix with NaN or infinite entries.
    """
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("the Gram matrix has NaN or infinite entries; the model's outputs have diverged")
    values, vectors = _eigh(gram.double())
    values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
    relative = tolerance(rows or gram.shape[0], storage)
    rank = int((values > relative * values[0]).sum()) if values.numel() and float(values[0]) > 0 else 0
    return Spectrum(values, vectors, rank)


def tolerance(rows: int, storage: torch.dtype) -> float:
    """Share of the largest eigenvalue of a Gram matrix below which there is only round-off."""
    factors = rows * torch.finfo(storage).eps ** 2
    decomposition = 10 * rows * torch.finfo(torch.float64).eps
    return max(factors, decomposition)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors; on the CPU when the device's solver fails or returns NaN.

    CUDA's does either, now and then, for matrices of low rank (pytorch issues 94772 and 105359); LAPACK's does not.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
        if bool(torch.isfinite(values).all()):
            return values, vectors
    except torch.linalg.LinAlgError:
        pass
    values, vectors = torch.linalg.eigh(matrix.cpu())
    return values.to(matrix.device), vectors.to(matrix.device)
