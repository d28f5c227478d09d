"""The block of an embedding: its rows touch only the vectors that a sample looked up."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nsrl.projection.jacobians.blocks import Block, LinearBlock, Range


@dataclass(frozen=True)
class EmbeddingBlock:
    """An embedding table: row (n, o) adds G[n,o,t] to the vector that position t of sample n looked up.

    Attributes:
        indices: shape (N, T), integer.
        grads: G, shape (N, R, T, d), zero at padding.
        weight: columns of the table, as start and stop.
        count: number of vectors in the table.
    """

    indices: Tensor
    grads: Tensor
    weight: Range
    count: int

    @property
    def rows(self) -> tuple[int, int]:
        return self.grads.shape[0], self.grads.shape[1]

    @property
    def owned(self) -> tuple[Range, ...]:
        return (self.weight,)

    def matvec(self, vector: Tensor) -> Tensor:
        return torch.einsum("notd,ntd->no", self.grads, self._table(vector)[self.indices])

    def rmatvec_into(self, rows: Tensor, out: Tensor) -> None:
        pulled = torch.einsum("no,notd->ntd", rows, self.grads)
        self._table(out).index_add_(0, self.indices.flatten(), pulled.flatten(0, 1))

    def add_gram(self, out: Tensor) -> None:
        gram = self._against_embedding(self, out.dtype)
        out += (gram + gram.T) / 2

    def cross_gram(self, other: Block, precision: torch.dtype) -> Tensor | None:
        if self.weight not in other.owned:
            return None
        if isinstance(other, EmbeddingBlock):
            return self._against_embedding(other, precision)
        if isinstance(other, LinearBlock) and not other.transposed:
            return self._against_linear(other, precision)
        ours, theirs = self.materialised(self.weight), other.materialised(self.weight)
        assert ours is not None and theirs is not None
        return ours.to(precision) @ theirs.to(precision).T

    def dense_into(self, out: Tensor) -> None:
        values = self.materialised(self.weight)
        assert values is not None
        out[:, slice(*self.weight)] += values

    def materialised(self, columns: Range) -> Tensor | None:
        if columns != self.weight:
            return None
        samples, rows, positions, width = self.grads.shape
        values = self.grads.new_zeros(samples, rows, self.count, width)
        spread = self.indices.view(samples, 1, positions, 1).expand_as(self.grads)
        return values.scatter_add_(2, spread, self.grads).flatten(2).flatten(0, 1)

    def column_squares_into(self, out: Tensor) -> None:
        table = self._table(out)
        for indices, grads in zip(self.indices, self.grads.double(), strict=True):
            used, where = indices.unique(return_inverse=True)
            summed = grads.new_zeros(grads.shape[0], len(used), grads.shape[-1]).index_add_(1, where, grads)
            table[used] += summed.square().sum(0)

    def scaled(self, scale: Tensor) -> EmbeddingBlock:
        return replace(self, grads=self.grads * self._table(scale)[self.indices].unsqueeze(1))

    def fitted_scale(self, scale: Tensor, out: Tensor) -> None:
        out[slice(*self.weight)] = scale[slice(*self.weight)]

    def multiplied(self, factor: float) -> EmbeddingBlock:
        return replace(self, grads=self.grads * factor)

    def _table(self, vector: Tensor) -> Tensor:
        return vector[slice(*self.weight)].view(self.count, -1)

    def _against_embedding(self, other: EmbeddingBlock, precision: torch.dtype) -> Tensor:
        """Vector by vector: only samples that looked it up meet."""
        (n, r), (m, s) = self.rows, other.rows
        out = self.grads.new_zeros(n, r, m, s, dtype=precision)
        for index in self.indices.unique():
            mine, ours = self._looked_up(index, precision)
            yours, theirs = (mine, ours) if other is self else other._looked_up(index, precision)
            if len(yours):
                product = (ours.flatten(0, 1) @ theirs.flatten(0, 1).T).view(len(mine), r, len(yours), s)
                out[mine.unsqueeze(1), :, yours] += product.permute(0, 2, 1, 3)
        return out.view(n * r, m * s)

    def _looked_up(self, index: Tensor, precision: torch.dtype) -> tuple[Tensor, Tensor]:
        """Samples that looked a vector up, (n,), and the sums of their gradients there, (n, R, d)."""
        hits = self.indices == index
        samples = hits.any(1).nonzero().squeeze(1)
        weights = hits[samples].to(precision)
        return samples, torch.einsum("notd,nt->nod", self.grads[samples].to(precision), weights)

    def _against_linear(self, other: LinearBlock, precision: torch.dtype) -> Tensor:
        """The table is also the weight of a linear layer (a tied head): only the looked-up outputs of it count."""
        used, where = self.indices.unique(return_inverse=True)
        samples, rows, positions, width = self.grads.shape
        ours = self.grads.new_zeros(samples, rows, len(used), width)
        ours.scatter_add_(2, where.view(samples, 1, positions, 1).expand_as(self.grads), self.grads)
        inputs = other.inputs if other.bias is None else other.inputs[..., :-1]
        theirs = torch.einsum("msuv,mui->msvi", other.grads[..., used], inputs)
        return ours.flatten(2).flatten(0, 1).to(precision) @ theirs.flatten(2).flatten(0, 1).to(precision).T
