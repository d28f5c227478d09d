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
        """sum s / (s + damping): how many directions a damped projector really removes."""
        if math.isinf(damping):
            return 0.0
        if damping <= 0.0:
            return float(self.rank)
        return float((self.values / (self.values + damping)).sum())


def spectrum(gram: Tensor, parameters: int, storage: torch.dtype = torch.float32) -> Spectrum:
    """Decompose a Gram matrix.

    The tolerance of the rank is max(k, P) * eps(storage) * sigma_max on the singular values of J, hence squared on
    K: what lies below is round-off of the stored factors.

    Args:
        gram: K, symmetric, shape (k, k).
        parameters: P.
        storage: dtype of the factors that K was formed from.

    Raises:
        ValueError: for a Gram matrix with NaN or infinite entries.
    """
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("the Gram matrix has NaN or infinite entries; the model's outputs have diverged")
    values, vectors = torch.linalg.eigh(gram.double())
    values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
    relative = max(gram.shape[0], parameters) * torch.finfo(storage).eps
    rank = int((values > relative**2 * values[0]).sum()) if values.numel() and float(values[0]) > 0 else 0
    return Spectrum(values, vectors, rank)
