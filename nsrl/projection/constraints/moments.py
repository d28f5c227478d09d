"""The input moments of one layer: a second moment that accumulates, and a protected subspace that only grows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsrl.projection.constraints.feature_moments import Subspace
from nsrl.projection.constraints.filters import Hard
from nsrl.projection.jacobians.columns import LayerColumns
from nsrl.projection.solvers.spectrum import tolerance

#: Feature rows that are converted to float64 at a time.
CHUNK = 8192


@dataclass
class LayerMoments:
    """What is known of the inputs of one layer (one group of a convolution).

    Attributes:
        layer: where the layer lies in the flat vector.
        protected: span of the features of consolidated tasks.
        held: trace of the second moments on the protected subspace, over all tasks.
        lost: share of the last consolidated task's trace that was left unprotected.
        moment: sum of x x^T of the task at hand, shape (d, d), float64; None when there is no task at hand.
        count: number of features in it.
    """

    layer: LayerColumns
    protected: Subspace
    held: float = 0.0
    lost: float = 0.0
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
        self.lost = float(residual[~chosen].sum() / values.sum()) if values.numel() else 0.0
        self.held += held + float(residual[chosen].sum())
        self.protected = self.protected.extended(vectors[:, chosen])
        self.moment, self.count, self.eigen = None, 0, None
        return int(chosen.sum())
