"""The pieces of a factored Jacobian: one block a layer, four operations a block.

Rows are indexed by (n, o): sample n of N, row o of R (outputs, or whitened outputs); columns are the entries of the
flattened parameters. A block owns some columns and never materialises its part of the Jacobian unless it is dense.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


class Block(Protocol):
    """The columns of one layer. `rows` = (N, R)."""

    @property
    def rows(self) -> tuple[int, int]: ...

    def matvec(self, vector: Tensor) -> Tensor:
        """Rows times the full flat vector (P,): shape (N, R)."""
        ...

    def rmatvec_into(self, rows: Tensor, out: Tensor) -> None:
        """Add the transposed product with `rows` (N, R) to the flat vector `out` (P,)."""
        ...

    def cross_gram(self, other: Block) -> Tensor | None:
        """Inner products with the rows of another block, (N R, M S) in float64; None when no column is shared."""
        ...

    def dense_into(self, out: Tensor) -> None:
        """Write the block's columns into the dense Jacobian `out` (N R, P)."""
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
    """

    inputs: Tensor
    grads: Tensor
    weight: tuple[int, int] | None
    bias: tuple[int, int] | None

    @property
    def rows(self) -> tuple[int, int]:
        return self.grads.shape[0], self.grads.shape[1]

    def matvec(self, vector: Tensor) -> Tensor:
        moved = self.inputs @ self._matrix(vector).T
        if self.inputs.shape[1] == 1:
            return torch.bmm(self.grads[:, :, 0], moved[:, 0].unsqueeze(-1)).squeeze(-1)
        return torch.einsum("notd,ntd->no", self.grads, moved)

    def rmatvec_into(self, rows: Tensor, out: Tensor) -> None:
        if self.inputs.shape[1] == 1:
            pulled = torch.bmm(rows.unsqueeze(1), self.grads[:, :, 0]).squeeze(1)
            matrix = pulled.T @ self.inputs[:, 0]
        else:
            pulled = torch.einsum("no,notd->ntd", rows, self.grads)
            matrix = pulled.flatten(0, 1).T @ self.inputs.flatten(0, 1)
        self._scatter(matrix, out)

    def cross_gram(self, other: Block) -> Tensor | None:
        if isinstance(other, DenseBlock):
            transposed = other.cross_gram(self)
            return None if transposed is None else transposed.T
        if not isinstance(other, LinearBlock):
            return None
        if (self.weight, self.bias) != (other.weight, other.bias):
            weight, bias = self.weight == other.weight, self.bias == other.bias
            ours, theirs = self._restricted(weight, bias), other._restricted(weight, bias)
            return None if ours is None or theirs is None else ours.cross_gram(theirs)
        positions, width_in = self.inputs.shape[1:]
        width_out = self.grads.shape[-1]
        if positions == 1 == other.inputs.shape[1]:
            return self._hadamard(other)
        if positions * other.inputs.shape[1] * (width_in + width_out) < width_in * width_out:
            return self._hadamard_positions(other)
        return self._matrices().flatten(1).double() @ other._matrices().flatten(1).double().T

    def dense_into(self, out: Tensor) -> None:
        matrices = self._matrices()
        if self.weight is not None:
            width = self.inputs.shape[-1] - (self.bias is not None)
            out[:, slice(*self.weight)] += matrices[:, :, :width].flatten(1)
        if self.bias is not None:
            out[:, slice(*self.bias)] += matrices[:, :, -1]

    def scaled(self, scale: Tensor) -> LinearBlock:
        """Scales columns by the rank-one geometric fit of `scale` (row factor x column factor).

        An elementwise scale would destroy the outer-product form. Any positive scale gives a valid projection, so the
        fit costs optimality in the optimizer's metric, never the constraint.
        """
        log = self._matrix(scale).clamp_min(1e-30).log()
        mean = log.mean()
        row, column = (log.mean(1) - mean / 2).exp(), (log.mean(0) - mean / 2).exp()
        return LinearBlock(self.inputs * column, self.grads * row, self.weight, self.bias)

    def fitted_scale(self, scale: Tensor, out: Tensor) -> None:
        log = self._matrix(scale).clamp_min(1e-30).log()
        mean = log.mean()
        fit = torch.outer((log.mean(1) - mean / 2).exp(), (log.mean(0) - mean / 2).exp())
        self._assign(fit, out)

    def multiplied(self, factor: float) -> LinearBlock:
        return replace(self, grads=self.grads * factor)

    def _hadamard(self, other: LinearBlock) -> Tensor:
        (n, r), (m, s) = self.rows, other.rows
        samples = self.inputs[:, 0].double() @ other.inputs[:, 0].double().T
        gram = self.grads[:, :, 0].flatten(0, 1).double() @ other.grads[:, :, 0].flatten(0, 1).double().T
        gram.view(n, r, m, s).mul_(samples.view(n, 1, m, 1))
        return gram

    def _hadamard_positions(self, other: LinearBlock) -> Tensor:
        (n, r), (m, s) = self.rows, other.rows
        t, u = self.inputs.shape[1], other.inputs.shape[1]
        samples = self.inputs.flatten(0, 1).double() @ other.inputs.flatten(0, 1).double().T
        gram = self.grads.flatten(0, 2).double() @ other.grads.flatten(0, 2).double().T
        product = gram.view(n, r, t, m, s, u) * samples.view(n, 1, t, m, 1, u)
        return product.sum((2, 5)).reshape(n * r, m * s)

    def _restricted(self, weight: bool, bias: bool) -> LinearBlock | None:
        """The block of only those of its columns; None when none is left."""
        weight, bias = weight and self.weight is not None, bias and self.bias is not None
        if not (weight or bias):
            return None
        width = self.inputs.shape[-1] - (self.bias is not None)
        inputs = self.inputs if weight and bias else self.inputs[..., :width] if weight else self.inputs[..., -1:]
        return LinearBlock(inputs, self.grads, self.weight if weight else None, self.bias if bias else None)

    def _matrices(self) -> Tensor:
        """The block's rows as matrices, shape (N R, d_out, d_in)."""
        return torch.einsum("notd,nti->nodi", self.grads, self.inputs).flatten(0, 1)

    def _matrix(self, vector: Tensor) -> Tensor:
        """The layer's part of a flat vector as a (d_out, d_in) matrix, bias in the last column."""
        width_out = self.grads.shape[-1]
        parts = []
        if self.weight is not None:
            parts.append(vector[slice(*self.weight)].view(width_out, -1))
        if self.bias is not None:
            parts.append(vector[slice(*self.bias)].view(width_out, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _scatter(self, matrix: Tensor, out: Tensor) -> None:
        if self.weight is not None:
            width = matrix.shape[1] - (self.bias is not None)
            out[slice(*self.weight)].view(-1, width).add_(matrix[:, :width])
        if self.bias is not None:
            out[slice(*self.bias)].add_(matrix[:, -1])

    def _assign(self, matrix: Tensor, out: Tensor) -> None:
        if self.weight is not None:
            width = matrix.shape[1] - (self.bias is not None)
            out[slice(*self.weight)].view(-1, width).copy_(matrix[:, :width])
        if self.bias is not None:
            out[slice(*self.bias)].copy_(matrix[:, -1])


@dataclass(frozen=True)
class DenseBlock:
    """Materialised columns: norm scales, embeddings, free parameters, modules without a factored form.

    Attributes:
        values: shape (N, R, p).
        columns: start and stop in the flat parameter vector.
    """

    values: Tensor
    columns: tuple[int, int]

    @property
    def rows(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def matvec(self, vector: Tensor) -> Tensor:
        return self.values @ vector[slice(*self.columns)]

    def rmatvec_into(self, rows: Tensor, out: Tensor) -> None:
        out[slice(*self.columns)].add_(rows.flatten() @ self.values.flatten(0, 1))

    def cross_gram(self, other: Block) -> Tensor | None:
        if isinstance(other, DenseBlock):
            if self.columns != other.columns:
                return None
            return self.values.flatten(0, 1).double() @ other.values.flatten(0, 1).double().T
        if isinstance(other, LinearBlock):
            return self._against_linear(other)
        return None

    def dense_into(self, out: Tensor) -> None:
        out[:, slice(*self.columns)] += self.values.flatten(0, 1)

    def scaled(self, scale: Tensor) -> DenseBlock:
        return DenseBlock(self.values * scale[slice(*self.columns)], self.columns)

    def fitted_scale(self, scale: Tensor, out: Tensor) -> None:
        out[slice(*self.columns)] = scale[slice(*self.columns)]

    def multiplied(self, factor: float) -> DenseBlock:
        return replace(self, values=self.values * factor)

    def _against_linear(self, other: LinearBlock) -> Tensor | None:
        # Happens only when one of two Jacobians had to fall back to dense columns for a layer.
        owned = [columns for columns in (other.weight, other.bias) if columns is not None]
        if self.columns not in owned:
            return None
        matrices = other._matrices()
        if self.columns == other.bias:
            columns = matrices[:, :, -1]
        else:
            width = other.inputs.shape[-1] - (other.bias is not None)
            columns = matrices[:, :, :width].flatten(1)
        return self.values.flatten(0, 1).double() @ columns.double().T
