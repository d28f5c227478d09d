"""The pieces of a factored Jacobian: one block a layer, a handful of operations a block.

Rows are indexed by (n, o): sample n of N, row o of R (outputs, or whitened outputs); columns are the entries of the
flattened parameters. A block owns some columns and never materialises its part of the Jacobian unless it is dense.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from nsrl.projection.jacobians import gram as products

#: Start and stop of a parameter in the flat vector.
Range = tuple[int, int]


class Block(Protocol):
    """The columns of one layer. `rows` = (N, R)."""

    @property
    def rows(self) -> tuple[int, int]: ...

    @property
    def owned(self) -> tuple[Range, ...]:
        """The parameters, by their columns, that the block has a part of."""
        ...

    def matvec(self, vector: Tensor) -> Tensor:
        """Rows times the full flat vector (P,): shape (N, R)."""
        ...

    def rmatvec_into(self, rows: Tensor, out: Tensor) -> None:
        """Add the transposed product with `rows` (N, R) to the flat vector `out` (P,)."""
        ...

    def add_gram(self, out: Tensor) -> None:
        """Add the inner products of the block's rows to `out` (N R, N R), in its precision and exactly symmetric."""
        ...

    def cross_gram(self, other: Block, precision: torch.dtype) -> Tensor | None:
        """Inner products with the rows of another block, (N R, M S); None when no column is shared."""
        ...

    def dense_into(self, out: Tensor) -> None:
        """Add the block's columns to the dense Jacobian `out` (N R, P)."""
        ...

    def materialised(self, columns: Range) -> Tensor | None:
        """The columns of one parameter, (N R, p), in the order of the parameter; None when the block has them not."""
        ...

    def column_squares_into(self, out: Tensor) -> None:
        """Add the squared norms of the block's columns to the flat float64 vector `out` (P,)."""
        ...

    def scaled(self, scale: Tensor) -> Block:
        """The block with column j multiplied by scale[j] (an approximation where the block says so)."""
        ...

    def fitted_scale(self, scale: Tensor, out: Tensor) -> None:
        """Write the scale that `scaled` really applies into the flat vector `out`."""
        ...

    def multiplied(self, factor: float) -> Block:
        """The block with every row multiplied by a number."""
        ...


@dataclass(frozen=True)
class LinearBlock:
    """A linear layer: row (n, o) is the sum over positions t of the outer product G[n,o,t] A[n,t]^T.

    Attributes:
        inputs: A, shape (N, T, d_in), with a constant one appended when the bias is trainable; shared by all rows
            of a sample.
        grads: G, shape (N, R, T, d_out), derivative of the (whitened) outputs in the layer's outputs.
        weight: columns of the weight, as start and stop, or None when the weight is frozen.
        bias: columns of the bias, or None.
        transposed: the weight is stored as (d_in, d_out), as in GPT-2's Conv1D, not as (d_out, d_in).
    """

    inputs: Tensor
    grads: Tensor
    weight: Range | None
    bias: Range | None
    transposed: bool = False

    @property
    def rows(self) -> tuple[int, int]:
        return self.grads.shape[0], self.grads.shape[1]

    @property
    def owned(self) -> tuple[Range, ...]:
        return tuple(columns for columns in (self.weight, self.bias) if columns is not None)

    def matvec(self, vector: Tensor) -> Tensor:
        moved = self.inputs @ self._matrix(vector).T
        # Not bmm: with one column BLAS takes six times as long as multiply and sum.
        return (self.grads * moved.unsqueeze(1)).flatten(2).sum(-1)

    def rmatvec_into(self, rows: Tensor, out: Tensor) -> None:
        if self.inputs.shape[1] == 1:
            pulled = torch.bmm(rows.unsqueeze(1), self.grads[:, :, 0]).squeeze(1)
        else:
            pulled = torch.einsum("no,notd->ntd", rows, self.grads).flatten(0, 1)
        inputs = self.inputs.flatten(0, 1)
        if self.weight is not None:
            features = inputs if self.bias is None else inputs[:, :-1]
            width_out, width_in = pulled.shape[1], features.shape[1]
            # Accumulated in place: a temporary of the weight's size would cost as much as the product.
            if self.transposed:
                out[slice(*self.weight)].view(width_in, width_out).addmm_(features.T, pulled)
            else:
                out[slice(*self.weight)].view(width_out, width_in).addmm_(pulled.T, features)
        if self.bias is not None:
            out[slice(*self.bias)].addmv_(pulled.T, inputs[:, -1])

    def add_gram(self, out: Tensor) -> None:
        products.add_gram(self.inputs, self.grads, out)

    def cross_gram(self, other: Block, precision: torch.dtype) -> Tensor | None:
        if not isinstance(other, LinearBlock):
            transposed = other.cross_gram(self, precision)
            return None if transposed is None else transposed.T
        weight, bias = self.weight == other.weight, self.bias == other.bias
        if not (weight and bias):
            ours, theirs = self._restricted(weight, bias), other._restricted(weight, bias)
            return None if ours is None or theirs is None else ours.cross_gram(theirs, precision)
        if self.weight is not None and self.transposed != other.transposed:
            return self._across_layouts(other, precision)
        return products.cross_gram(self.inputs, self.grads, other.inputs, other.grads, precision)

    def dense_into(self, out: Tensor) -> None:
        for columns in self.owned:
            values = self.materialised(columns)
            assert values is not None
            out[:, slice(*columns)] += values

    def materialised(self, columns: Range) -> Tensor | None:
        if columns == self.bias:
            return torch.einsum("notd,nt->nod", self.grads, self.inputs[..., -1]).flatten(0, 1)
        if columns != self.weight:
            return None
        inputs = self.inputs if self.bias is None else self.inputs[..., :-1]
        matrices = products.matrices(inputs, self.grads)
        return (matrices.transpose(1, 2) if self.transposed else matrices).flatten(1)

    def column_squares_into(self, out: Tensor) -> None:
        squares = products.squares(self.inputs, self.grads)
        for view, part in self._parts(squares, out):
            view.add_(part)

    def scaled(self, scale: Tensor) -> LinearBlock:
        """Scales columns by the rank-one geometric fit of `scale` (row factor x column factor).

        An elementwise scale would destroy the outer-product form. Any positive scale gives a valid projection, so the
        fit costs optimality in the optimizer's metric, never the constraint.
        """
        row, column = self._rank_one(scale)
        return replace(self, inputs=self.inputs * column, grads=self.grads * row)

    def fitted_scale(self, scale: Tensor, out: Tensor) -> None:
        for view, part in self._parts(torch.outer(*self._rank_one(scale)), out):
            view.copy_(part)

    def multiplied(self, factor: float) -> LinearBlock:
        return replace(self, grads=self.grads * factor)

    def _rank_one(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        log = self._matrix(scale).clamp_min(1e-30).log()
        mean = log.mean()
        return (log.mean(1) - mean / 2).exp(), (log.mean(0) - mean / 2).exp()

    def _across_layouts(self, other: LinearBlock, precision: torch.dtype) -> Tensor:
        """A weight used as it is by one layer and transposed by another."""
        assert self.weight is not None
        ours, theirs = self.materialised(self.weight), other.materialised(self.weight)
        assert ours is not None and theirs is not None
        gram = ours.to(precision) @ theirs.to(precision).T
        if self.bias is not None:
            beside, other_beside = self._restricted(False, True), other._restricted(False, True)
            assert beside is not None and other_beside is not None
            part = beside.cross_gram(other_beside, precision)
            assert part is not None
            gram += part
        return gram

    def _restricted(self, weight: bool, bias: bool) -> LinearBlock | None:
        """The block of only those of its columns; None when none is left."""
        weight, bias = weight and self.weight is not None, bias and self.bias is not None
        if not (weight or bias):
            return None
        width = self.inputs.shape[-1] - (self.bias is not None)
        inputs = self.inputs if weight and bias else self.inputs[..., :width] if weight else self.inputs[..., -1:]
        return replace(self, inputs=inputs, weight=self.weight if weight else None, bias=self.bias if bias else None)

    def _matrix(self, vector: Tensor) -> Tensor:
        """The layer's part of a flat vector as a (d_out, d_in) matrix, bias in the last column."""
        width_out = self.grads.shape[-1]
        parts = []
        if self.weight is not None:
            flat = vector[slice(*self.weight)]
            parts.append(flat.view(-1, width_out).T if self.transposed else flat.view(width_out, -1))
        if self.bias is not None:
            parts.append(vector[slice(*self.bias)].view(width_out, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _parts(self, matrix: Tensor, out: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Pairs (view of the flat vector `out`, part of a (d_out, d_in) matrix that belongs there)."""
        width = matrix.shape[1] - (self.bias is not None)
        pairs = []
        if self.weight is not None:
            stored = matrix[:, :width].T if self.transposed else matrix[:, :width]
            pairs.append((out[slice(*self.weight)].view(stored.shape), stored))
        if self.bias is not None:
            pairs.append((out[slice(*self.bias)], matrix[:, -1]))
        return pairs


@dataclass(frozen=True)
class DenseBlock:
    """Materialised columns: norm scales, free parameters, modules without a factored form.

    Attributes:
        values: shape (N, R, p).
        columns: start and stop in the flat parameter vector.
    """

    values: Tensor
    columns: Range

    @property
    def rows(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def owned(self) -> tuple[Range, ...]:
        return (self.columns,)

    def matvec(self, vector: Tensor) -> Tensor:
        return self.values @ vector[slice(*self.columns)]

    def rmatvec_into(self, rows: Tensor, out: Tensor) -> None:
        out[slice(*self.columns)].add_(rows.flatten() @ self.values.flatten(0, 1))

    def add_gram(self, out: Tensor) -> None:
        products.add_row_gram(self.values.flatten(0, 1), out)

    def cross_gram(self, other: Block, precision: torch.dtype) -> Tensor | None:
        # The other may hold these columns in pieces (groups of a convolution, thirds of an attention's projection).
        total: Tensor | None = None
        for columns in other.owned:
            if not overlap(self.columns, columns):
                continue
            shared = max(self.columns[0], columns[0]), min(self.columns[1], columns[1])
            whole = other.materialised(columns)
            assert whole is not None
            ours, theirs = _part(self.values.flatten(0, 1), self.columns, shared), _part(whole, columns, shared)
            product = ours.to(precision) @ theirs.to(precision).T
            total = product if total is None else total + product
        return total

    def dense_into(self, out: Tensor) -> None:
        out[:, slice(*self.columns)] += self.values.flatten(0, 1)

    def materialised(self, columns: Range) -> Tensor | None:
        return self.values.flatten(0, 1) if columns == self.columns else None

    def column_squares_into(self, out: Tensor) -> None:
        out[slice(*self.columns)] += self.values.flatten(0, 1).double().square().sum(0)

    def scaled(self, scale: Tensor) -> DenseBlock:
        return replace(self, values=self.values * scale[slice(*self.columns)])

    def fitted_scale(self, scale: Tensor, out: Tensor) -> None:
        out[slice(*self.columns)] = scale[slice(*self.columns)]

    def multiplied(self, factor: float) -> DenseBlock:
        return replace(self, values=self.values * factor)


def overlap(one: Range, other: Range) -> bool:
    """Whether two ranges of columns have some in common."""
    return max(one[0], other[0]) < min(one[1], other[1])


def _part(matrix: Tensor, held: Range, wanted: Range) -> Tensor:
    """The wanted columns of a matrix that holds a range of them."""
    return matrix[:, wanted[0] - held[0] : wanted[1] - held[0]]


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
