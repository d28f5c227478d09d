"""A growing subspace of R^d, stored through whichever is thinner: an orthonormal basis of it or of its complement."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsrl.projection.constraints.filters import Hard
from nsrl.projection.jacobians.columns import LayerColumns
from nsrl.projection.solvers.spectrum import tolerance


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

    def thin(self) -> tuple[Tensor, bool]:
        """What is held as an orthonormal matrix (d, min(r, d - r)), and whether it spans the subspace.

        If it does not, it spans the complement.
        """
        if self._basis is not None:
            return self._basis, True
        assert self._reflectors is not None
        beyond = torch.eye(self.dimension, dtype=torch.float64, device=self._device)[:, : self.dimension - self.rank]
        return torch.ormqr(*self._reflectors, beyond.contiguous()) if beyond.numel() else beyond, False

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


#: Feature rows that are converted to float64 at a time.
CHUNK = 8192


@dataclass
class LayerMoments:
    """What is known of the inputs of one layer (one group of a convolution).

    Attributes:
        layer: where the layer lies in the flat vector.
        protected: span of the features of consolidated tasks.
        held: trace of the second moments on the protected subspace, over all tasks.
        moment: sum of x x^T of the task at hand, shape (d, d), float64; None when there is no task at hand.
        count: number of features in it.
    """

    layer: LayerColumns
    protected: Subspace
    held: float = 0.0
    moment: Tensor | None = None
    count: int = 0
    # eigenvalues and eigenvectors (d, q) of the residual moment
    eigen: tuple[Tensor, Tensor] | None = None

    def add(self, rows: Tensor) -> None:
        """Add features (M, d_in without the constant) to the moment of the task at hand.

        Raises:
            ValueError: NaN or infinite features.
        """
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"the inputs of {self.layer.name} have NaN or infinite entries; the model has diverged")
        self.eigen = None
        width = self.layer.width_in
        if self.moment is None:
            self.moment = torch.zeros(width, width, dtype=torch.float64, device=rows.device)
        for piece in rows.split(CHUNK):
            features = piece.double()
            if self.layer.bias is not None:
                features = torch.cat([features[:, : width - 1], torch.ones_like(features[:, :1])], 1)
            self.moment.addmm_(features.T, features)
        self.count += len(rows)

    def restore(self, moment: Tensor, count: int) -> None:
        """Take over a sum of outer products (d_in, d_in) of `count` rows that was held elsewhere.

        Raises:
            ValueError: another shape, NaN or infinite entries, or no rows.
        """
        width = self.layer.width_in
        if moment.shape != (width, width) or not bool(torch.isfinite(moment).all()) or count < 1:
            raise ValueError(f"{self.layer.name} needs a finite {width} x {width} moment of at least one row")
        self.moment, self.count, self.eigen = moment.double(), count, None

    def residual(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues, descending and above round-off, and vectors (d, q) of (I - Q Q^T) C (I - Q Q^T)."""
        if self.eigen is None:
            if self.moment is None:
                empty = self.protected.basis()[:, :0]
                self.eigen = empty[0], empty
                return self.eigen
            mean = self.moment / max(self.count, 1)
            rest = self.protected.without(self.protected.without(mean).T)
            values, vectors = torch.linalg.eigh((rest + rest.T) / 2)
            # round-off of the whole moment, not of what is left of it: a task seen before leaves noise only
            real = values > tolerance(len(values), torch.float64) * mean.norm()
            self.eigen = values[real].flip(0), vectors[:, real].flip(1)
        return self.eigen

    def held_now(self) -> float:
        """Trace of the task at hand's moment on the protected subspace."""
        if self.moment is None or not self.protected.rank:
            return 0.0
        inside = self.protected.coordinates(self.protected.coordinates(self.moment).T)
        return float(inside.trace()) / max(self.count, 1)

    def values(self, held: float) -> tuple[Tensor, Tensor]:
        """Eigenvalues of protected and residual directions, and the mask of the protected ones."""
        residual = self.residual()[0]
        rank = self.protected.rank
        shared = residual.new_full((rank,), held / rank if rank else 0.0)
        mask = torch.arange(rank + len(residual), device=residual.device) < rank
        return torch.cat([shared, residual]), mask

    def consolidate(self, filter: Hard) -> int:
        """Protect directions of the residual; forget the moment."""
        held = self.held_now()
        values, mask = self.values(held)
        chosen = filter.removed(values, None, mask).bool()[self.protected.rank :]
        residual, vectors = self.residual()
        self.held += held + float(residual[chosen].sum())
        self.protected = self.protected.extended(vectors[:, chosen])
        self.moment, self.count, self.eigen = None, 0, None
        return int(chosen.sum())
