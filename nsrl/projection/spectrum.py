"""Eigen-decomposition of a Gram matrix, in float64, with the numbers that a user needs to trust it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """K = U diag(s) U^T of a Gram matrix K = J J^T.

    Attributes:
        values: s, descending, non-negative, shape (k,), float64.
        vectors: U, shape (k, k), float64.
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


def spectrum(gram: Tensor, storage: torch.dtype = torch.float32) -> Spectrum:
    """Decompose a Gram matrix.

    Eigenvalues at most `tolerance` times the largest are round-off and do not count towards the rank: of the stored
    factors, whose error moves the singular values of J by up to sqrt(k) eps sigma_max (squared, on K), or of the
    eigen-decomposition itself.

    Args:
        gram: K, symmetric, shape (k, k).
        storage: dtype of the factors that K was formed from.

    Raises:
        ValueError: for a Gram matrix with NaN or infinite entries.
    """
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("the Gram matrix has NaN or infinite entries; the model's outputs have diverged")
    values, vectors = torch.linalg.eigh(gram.double())
    values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
    relative = tolerance(gram.shape[0], storage)
    rank = int((values > relative * values[0]).sum()) if values.numel() and float(values[0]) > 0 else 0
    return Spectrum(values, vectors, rank)


def tolerance(rows: int, storage: torch.dtype) -> float:
    """Share of the largest eigenvalue of a Gram matrix below which there is only round-off."""
    factors = rows * torch.finfo(storage).eps ** 2
    decomposition = 10 * rows * torch.finfo(torch.float64).eps
    return max(factors, decomposition)
