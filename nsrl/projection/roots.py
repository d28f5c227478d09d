"""Factors S of a KL's Hessian in the outputs, S^T S = H for every state, known by their products.

A softmax over O choices has O - 1 rows of O numbers a state. For few choices they are kept as they are. For many the
products are made from the probabilities alone, in O(O) a state: chess has 4,672 choices, whose rows would be 22 million
numbers a state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

#: Outputs of a state up to which its rows are kept as they are.
KEPT = 64

#: Random directions a state that stand for its rows in Kronecker factors, which only have to be roughly right.
SKETCHED = 8


class Root(Protocol):
    """S, of one matrix (R, O) for each of N states."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, R, O)."""
        ...

    @property
    def sizes_of_rows(self) -> Tensor:
        """What ranks the rows of each state by their norm, shape (N, R)."""
        ...

    def apply(self, outputs: Tensor) -> Tensor:
        """S z, shape (N, R), for z of shape (N, O)."""
        ...

    def transpose(self, rows: Tensor) -> Tensor:
        """S^T u, shape (N, O), for u of shape (N, R)."""
        ...

    def times(self, factors: Tensor | None) -> Root:
        """Rows of state n multiplied by its factor, (N,); None multiplies by nothing."""
        ...

    def divided(self, by: float) -> Root:
        """All rows divided by a number."""
        ...

    def sampled(self, every: int) -> Tensor:
        """Rows of every so many states, or as many random combinations as do, (n, r, O): S'^T S' = H on average."""
        ...


@dataclass(frozen=True)
class DenseRoot:
    """Rows as they are.

    Attributes:
        rows: shape (N, R, O).
    """

    rows: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """See `Root`."""
        n, r, o = self.rows.shape
        return n, r, o

    @property
    def sizes_of_rows(self) -> Tensor:
        """See `Root`: (N, R)."""
        return self.rows.square().sum(2)

    def apply(self, outputs: Tensor) -> Tensor:
        """See `Root`: (N, R)."""
        return torch.einsum("nro,no->nr", self.rows, outputs)

    def transpose(self, rows: Tensor) -> Tensor:
        """See `Root`: (N, O)."""
        return torch.einsum("nro,nr->no", self.rows, rows)

    def times(self, factors: Tensor | None) -> DenseRoot:
        """See `Root`."""
        return self if factors is None else DenseRoot(self.rows * factors.to(self.rows).view(-1, 1, 1))

    def divided(self, by: float) -> DenseRoot:
        """See `Root`."""
        return DenseRoot(self.rows / by)

    def sampled(self, every: int) -> Tensor:
        """See `Root`: (n, r, O)."""
        return self.rows[::every]


@dataclass(frozen=True)
class SoftmaxRoot:
    """diag(q) (I - q q^T) diag(q) of independent softmax heads, q^2 = p, by a Householder reflection of each.

    Row r of a head is q_r (e_r - q_0 e_0 - (q_c^2)_c / (1 + q_0)) for its choices after the first, as
    `nsrl.projection.metrics.Categorical.seeds` has them.

    Attributes:
        roots: q, shape (N, O).
        sizes: choices of each head.
        factors: of each state's rows, shape (N, 1).
        valid: columns that count, (N, O) bool; None for all.
    """

    roots: Tensor
    sizes: tuple[int, ...]
    factors: Tensor
    valid: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """See `Root`."""
        n, o = self.roots.shape
        return n, o - len(self.sizes), o

    @property
    def sizes_of_rows(self) -> Tensor:
        """See `Root`: (N, R)."""
        return torch.cat([q[:, 1:] for q in self.roots.split(self.sizes, 1)], 1)

    def apply(self, outputs: Tensor) -> Tensor:
        """See `Root`: (N, R)."""
        if self.valid is not None:
            outputs = outputs * self.valid
        parts = []
        for q, z in zip(self.roots.split(self.sizes, 1), outputs.split(self.sizes, 1), strict=True):
            first, others = q[:, :1], q[:, 1:]
            mean = (others.square() * z[:, 1:]).sum(1, keepdim=True) / (1.0 + first)
            parts.append(others * (z[:, 1:] - first * z[:, :1] - mean))
        return self.factors * torch.cat(parts, 1)

    def transpose(self, rows: Tensor) -> Tensor:
        """See `Root`: (N, O)."""
        parts = []
        heads = (rows * self.factors).split([size - 1 for size in self.sizes], 1)
        for q, u in zip(self.roots.split(self.sizes, 1), heads, strict=True):
            first, others = q[:, :1], q[:, 1:]
            pulled = (others * u).sum(1, keepdim=True)
            parts += [-first * pulled, others * u - others.square() * (pulled / (1.0 + first))]
        whole = torch.cat(parts, 1)
        return whole if self.valid is None else whole * self.valid

    def times(self, factors: Tensor | None) -> SoftmaxRoot:
        """See `Root`."""
        return self if factors is None else replace(self, factors=self.factors * factors.to(self.factors).view(-1, 1))

    def divided(self, by: float) -> SoftmaxRoot:
        """See `Root`."""
        return replace(self, factors=self.factors / by)

    def sampled(self, every: int) -> Tensor:
        """See `Root`: (n, r, O)."""
        valid = None if self.valid is None else self.valid[::every]
        few = replace(self, roots=self.roots[::every], factors=self.factors[::every], valid=valid)
        return _sketch(few)


@dataclass(frozen=True)
class DiagonalRoot:
    """A diagonal matrix for each state.

    Attributes:
        diagonal: shape (N, O).
    """

    diagonal: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """See `Root`."""
        n, o = self.diagonal.shape
        return n, o, o

    @property
    def sizes_of_rows(self) -> Tensor:
        """See `Root`: (N, R)."""
        return self.diagonal.abs()

    def apply(self, outputs: Tensor) -> Tensor:
        """See `Root`: (N, R)."""
        return self.diagonal * outputs

    def transpose(self, rows: Tensor) -> Tensor:
        """See `Root`: (N, O)."""
        return self.diagonal * rows

    def times(self, factors: Tensor | None) -> DiagonalRoot:
        """See `Root`."""
        return self if factors is None else DiagonalRoot(self.diagonal * factors.to(self.diagonal).view(-1, 1))

    def divided(self, by: float) -> DiagonalRoot:
        """See `Root`."""
        return DiagonalRoot(self.diagonal / by)

    def sampled(self, every: int) -> Tensor:
        """See `Root`: (n, r, O)."""
        return _sketch(DiagonalRoot(self.diagonal[::every]))


def largest_rows(root: Root, count: int) -> tuple[Tensor, Tensor]:
    """The `count` rows of each state of largest norm, (N, count, O), and which they are, (N, count).

    Without the others, what is learnt of J from its rows (rank, eigenvalues) is a lower bound, for they interlace.
    """
    sizes = root.sizes_of_rows
    chosen = sizes.topk(min(count, root.shape[1]), dim=1).indices
    found = [
        root.transpose(torch.zeros_like(sizes).scatter_(1, column.unsqueeze(1), 1.0)) for column in chosen.unbind(1)
    ]
    return torch.stack(found, 1), chosen


def _sketch(root: Root) -> Tensor:
    """S^T u for random signs u: on average their sum of (S^T u) (S^T u)^T is S^T S, shape (N, SKETCHED, O)."""
    sizes = root.sizes_of_rows
    generator = torch.Generator().manual_seed(0)  # the global one is the user's
    found = []
    for _ in range(SKETCHED):
        signs = torch.randint(0, 2, sizes.shape, generator=generator, dtype=torch.int8).to(sizes) * 2.0 - 1.0
        found.append(root.transpose(signs / math.sqrt(SKETCHED)))
    return torch.stack(found, 1)
