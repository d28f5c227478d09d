"""A growing subspace of R^d, stored through whichever is thinner: an orthonormal basis of it or of its complement."""

from __future__ import annotations

import torch
from torch import Tensor


class Subspace:
    """Span of an orthonormal basis Q (d, r), held in min(r, d - r) vectors of length d; immutable.

    Beyond r = d / 2 the complement is held, as the Householder reflectors of its QR decomposition: the orthogonal
    matrix that they stand for has the complement in its first d - r columns and a basis of the subspace in the others,
    and is multiplied with without being formed.

    Args:
        basis: Q, orthonormal, shape (d, r), float64.

    Attributes:
        dimension: d.
        rank: r.
    """

    def __init__(self, basis: Tensor):
        self.dimension, self.rank = basis.shape
        self._basis: Tensor | None = basis
        self._reflectors: tuple[Tensor, Tensor] | None = None
        if 2 * self.rank > self.dimension:
            full = torch.geqrf(basis)
            beyond = torch.eye(self.dimension, dtype=basis.dtype, device=basis.device)[:, self.rank :]
            complement = torch.ormqr(*full, beyond.contiguous()) if beyond.numel() else beyond
            self._reflectors = torch.geqrf(complement) if beyond.numel() else (complement, basis.new_zeros(0))
            self._basis = None

    @classmethod
    def empty(cls, dimension: int, like: Tensor) -> Subspace:
        """The zero subspace of R^dimension, in float64 on the device of `like`."""
        return cls(torch.zeros(dimension, 0, dtype=torch.float64, device=like.device))

    def coordinates(self, matrix: Tensor) -> Tensor:
        """Rows of a matrix (n, d) in the basis: shape (n, r)."""
        if self._basis is not None:
            return matrix @ self._basis
        return self._rotated(matrix, False)[:, self.dimension - self.rank :]

    def combine(self, coordinates: Tensor) -> Tensor:
        """Rows from their coordinates (n, r): shape (n, d)."""
        if self._basis is not None:
            return coordinates @ self._basis.T
        beside = coordinates.new_zeros(len(coordinates), self.dimension - self.rank)
        return self._rotated(torch.cat([beside, coordinates], 1), True)

    def without(self, matrix: Tensor) -> Tensor:
        """Rows with their part in the subspace removed, (n, d)."""
        return matrix - self.combine(self.coordinates(matrix))

    def extended(self, vectors: Tensor) -> Subspace:
        """The subspace together with the span of (nearly) orthonormal vectors (d, q) from its complement."""
        if not vectors.shape[1]:
            return self
        for _ in range(2):
            vectors = torch.linalg.qr(self.without(vectors.T).T)[0]
        return Subspace(torch.cat([self.basis(), vectors], 1))

    def basis(self) -> Tensor:
        """Q, shape (d, r), formed."""
        if self._basis is not None:
            return self._basis
        eye = torch.eye(self.rank, dtype=torch.float64, device=self._device)
        return self.combine(eye).T.contiguous()

    def nbytes(self) -> int:
        """Memory held, in bytes."""
        tensors = (self._basis,) if self._basis is not None else self._reflectors or ()
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def _device(self) -> torch.device:
        assert self._reflectors is not None
        return self._reflectors[0].device

    def _rotated(self, matrix: Tensor, transpose: bool) -> Tensor:
        assert self._reflectors is not None
        if self.rank == self.dimension:
            return matrix
        return torch.ormqr(*self._reflectors, matrix.contiguous(), left=False, transpose=transpose)
