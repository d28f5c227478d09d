"""The factored Jacobian: the one data structure that projection, NTK analysis and editing are written on.

`J` has one row per sample and output (sample-major, n * R + o) and one column per trainable parameter entry (in
`named_parameters()` order). It is never materialised: a linear layer keeps its inputs A and output gradients G, and

    matvec   (J v)[n,o]  = sum_t <G[n,o,t], V A[n,t]>
    rmatvec  J^T u       = sum_{n,o,t} u[n,o] G[n,o,t] A[n,t]^T
    gram     K[no,mp]    = sum_{t,t'} <A[n,t],A[m,t']> <G[n,o,t],G[m,p,t']>      (the empirical neural tangent kernel)
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from nsrl.projection.jacobians.blocks import Block, Range
from nsrl.projection.jacobians.capture import JacobianError
from nsrl.projection.precision import full_precision

#: Numbers that a chunk of dense rows may hold.
CHUNK = 2**23


class Jacobian(Protocol):
    """What the solvers need: a shape and four products."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def matvec(self, vector: Tensor) -> Tensor: ...

    def rmatvec(self, rows: Tensor) -> Tensor: ...

    def gram(self) -> Tensor: ...

    def scaled(self, scale: Tensor) -> tuple[Jacobian, Tensor]: ...


class FactoredJacobian:
    """Output Jacobian of a module at one batch, kept as per-layer factors.

    Attributes:
        shape: (k, P) with k = samples * rows per sample.
        names: the parameters that own the columns, in order.
        outputs: the module's outputs at the linearisation point, (N, O), detached.
        recomputed: parameters whose factors disagreed with autograd and were recomputed densely.
    """

    recomputed: tuple[str, ...] = ()
    SWEEPS = 20

    def __init__(
        self, blocks: Sequence[Block], shape: tuple[int, int], rows: int, names: tuple[str, ...], outputs: Tensor
    ):
        self.blocks = tuple(blocks)
        self.shape = shape
        self.names = names
        self.outputs = outputs
        self._rows = rows

    def matvec(self, vector: Tensor) -> Tensor:
        """J v for v of shape (P,): shape (k,)."""
        self._check(vector, self.shape[1], "vector")
        vector = vector.to(self.outputs)
        total = self.outputs.new_zeros(self.shape[0] // self._rows, self._rows)
        with self._exactly():
            for block in self.blocks:
                total += block.matvec(vector)
        return total.flatten()

    def rmatvec(self, rows: Tensor) -> Tensor:
        """J^T u for u of shape (k,): shape (P,)."""
        self._check(rows, self.shape[0], "rows")
        out = self.outputs.new_zeros(self.shape[1])
        per_sample = rows.to(self.outputs).view(-1, self._rows)
        with self._exactly():
            for block in self.blocks:
                block.rmatvec_into(per_sample, out)
        return out

    def matmat(self, vectors: Tensor) -> Tensor:
        """J V for V of shape (P, c): shape (k, c)."""
        return torch.stack([self.matvec(vector) for vector in vectors.T], 1)

    def rmatmat(self, rows: Tensor) -> Tensor:
        """J^T U for U of shape (k, c): shape (P, c)."""
        return torch.stack([self.rmatvec(column) for column in rows.T], 1)

    @full_precision()
    def gram(self, precision: torch.dtype = torch.float64) -> Tensor:
        """K = J J^T, shape (k, k), symmetric to the last bit.

        Args:
            precision: of the products. In float64, the default, K carries the condition number of float32 factors; in
                float32 it costs half, and eigenvalues below 1e-7 of the largest are noise (enough to look at a kernel,
                not to project).
        """
        gram = self.outputs.new_zeros(self.shape[0], self.shape[0], dtype=precision)
        for index, block in enumerate(self.blocks):
            block.add_gram(gram)
            for partner in self.blocks[:index]:
                product = block.cross_gram(partner, precision)
                if product is not None:
                    gram += product + product.T
        return gram

    @full_precision()
    def cross_gram(self, other: FactoredJacobian | StackedJacobian, precision: torch.dtype = torch.float64) -> Tensor:
        """J J'^T against another batch of the same module, shape (k, k').

        Raises:
            JacobianError: the two are over other parameters.
        """
        if isinstance(other, StackedJacobian):
            return torch.cat([self.cross_gram(part, precision) for part in other.parts], 1)
        if self.names != other.names or self.shape[1] != other.shape[1]:
            raise JacobianError("cross_gram needs two Jacobians over the same parameters")
        gram = self.outputs.new_zeros(self.shape[0], other.shape[0], dtype=precision)
        for block in self.blocks:
            for partner in other.blocks:
                product = block.cross_gram(partner, precision)
                if product is not None:
                    gram += product
        return gram

    def column_squares(self) -> Tensor:
        """Diagonal of J^T J, shape (P,), float64: squared norms of the columns."""
        out = self.outputs.new_zeros(self.shape[1], dtype=torch.float64)
        for block in self.blocks:
            block.column_squares_into(out)
        for columns in self._tied():
            # Tied parameters: the parts add up before they are squared.
            parts = [block.materialised(columns) for block in self.blocks]
            total = torch.stack([part for part in parts if part is not None]).double().sum(0)
            out[slice(*columns)] = total.square().sum(0)
        return out

    def dense(self) -> Tensor:
        """The materialised Jacobian, shape (k, P). For tests and small models."""
        out = self.outputs.new_zeros(self.shape)
        for block in self.blocks:
            block.dense_into(out)
        return out

    def scaled(self, scale: Tensor) -> tuple[FactoredJacobian, Tensor]:
        """J diag(s) with s the closest scale that keeps the factored form, and s itself, shape (P,).

        Linear layers take the rank-one (row x column) geometric fit of `scale`; dense blocks take it exactly.
        """
        fitted = scale.to(self.outputs).clone()
        # Layers that share a tied weight must agree on its scale: each refits what the other fitted (a contraction).
        for _ in range(self.SWEEPS if self._tied() else 1):
            before = fitted.clone()
            for block in self.blocks:
                block.fitted_scale(fitted.clone(), fitted)
            if torch.equal(before, fitted):
                break
        blocks = [block.scaled(fitted) for block in self.blocks]
        return FactoredJacobian(blocks, self.shape, self._rows, self.names, self.outputs), fitted

    def nbytes(self) -> int:
        """Memory held by the factors, in bytes."""
        tensors = [t for block in self.blocks for t in vars(block).values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def _exactly(self) -> AbstractContextManager[None]:
        # TF32 is a matter of CUDA devices; elsewhere the two products stay as light as they are.
        return full_precision() if self.outputs.is_cuda else nullcontext()

    def _tied(self) -> list[Range]:
        """Columns that more than one block has a part of."""
        owners = Counter(columns for block in self.blocks for columns in block.owned)
        return [columns for columns, count in owners.items() if count > 1]

    def _check(self, vector: Tensor, length: int, what: str) -> None:
        if vector.shape != (length,):
            raise JacobianError(f"the {what} must have shape ({length},), not {tuple(vector.shape)}")


class StackedJacobian:
    """Jacobians over the same parameters, one below the other (several tasks, or an extra group of rows).

    Raises:
        JacobianError: no parts, or parts over different parameters.
    """

    def __init__(self, parts: Sequence[FactoredJacobian]):
        self.parts = tuple(parts)
        if not self.parts or any(part.names != self.parts[0].names for part in self.parts):
            raise JacobianError("a stacked Jacobian needs one or more parts over the same parameters")
        self.shape = (sum(part.shape[0] for part in self.parts), self.parts[0].shape[1])

    def matvec(self, vector: Tensor) -> Tensor:
        """J v, shape (k,)."""
        return torch.cat([part.matvec(vector) for part in self.parts])

    def rmatvec(self, rows: Tensor) -> Tensor:
        """J^T u, shape (P,)."""
        return torch.stack([part.rmatvec(piece) for part, piece in self._pieces(rows)]).sum(0)

    def matmat(self, vectors: Tensor) -> Tensor:
        """J V, shape (k, c)."""
        return torch.cat([part.matmat(vectors) for part in self.parts])

    def rmatmat(self, rows: Tensor) -> Tensor:
        """J^T U, shape (P, c)."""
        return torch.stack([part.rmatmat(piece) for part, piece in self._pieces(rows)]).sum(0)

    def gram(self, precision: torch.dtype = torch.float64) -> Tensor:
        """K = J J^T, shape (k, k), symmetric to the last bit."""
        grid: list[list[Tensor]] = [[] for _ in self.parts]
        for row, part in enumerate(self.parts):
            grid[row] = [grid[column][row].T for column in range(row)] + [part.gram(precision)]
            grid[row] += [part.cross_gram(other, precision) for other in self.parts[row + 1 :]]
        return torch.cat([torch.cat(blocks, 1) for blocks in grid])

    def cross_gram(self, other: FactoredJacobian | StackedJacobian, precision: torch.dtype = torch.float64) -> Tensor:
        """J J'^T, shape (k, k')."""
        others = other.parts if isinstance(other, StackedJacobian) else (other,)
        return torch.cat([torch.cat([part.cross_gram(o, precision) for o in others], 1) for part in self.parts])

    def column_squares(self) -> Tensor:
        """Diagonal of J^T J, shape (P,), float64."""
        return torch.stack([part.column_squares() for part in self.parts]).sum(0)

    def dense(self) -> Tensor:
        """The materialised Jacobian, shape (k, P)."""
        return torch.cat([part.dense() for part in self.parts])

    def scaled(self, scale: Tensor) -> tuple[StackedJacobian, Tensor]:
        """As `FactoredJacobian.scaled`, with one fit for all parts.

        A layer may be factored in one part and dense in another. The fit of a fit is itself, also on some of its
        columns, so two sweeps over the parts agree whatever their order.
        """
        fitted = scale
        for _ in range(2):
            for part in self.parts:
                _, fitted = part.scaled(fitted)
        return StackedJacobian([part.scaled(fitted)[0] for part in self.parts]), fitted

    def nbytes(self) -> int:
        """Memory held by the factors, in bytes."""
        return sum(part.nbytes() for part in self.parts)

    def _pieces(self, rows: Tensor) -> list[tuple[FactoredJacobian, Tensor]]:
        return list(zip(self.parts, rows.split([part.shape[0] for part in self.parts]), strict=True))


@runtime_checkable
class Sharded(Protocol):
    """The columns of one process, which are an ordinary Jacobian by themselves.

    Attributes:
        local: that Jacobian.
    """

    local: FactoredJacobian | StackedJacobian


def is_whole(jacobian: Jacobian) -> bool:
    """Whether the factors of all columns are here, so that rows can be formed and J^T J is known."""
    return isinstance(jacobian, FactoredJacobian | StackedJacobian)


def storage(jacobian: Jacobian) -> tuple[torch.dtype, torch.device]:
    """Precision and place of the factors."""
    held: Any = jacobian.local if isinstance(jacobian, Sharded) else jacobian
    held = held.parts[0] if isinstance(held, StackedJacobian) else held
    numbers = held.outputs if isinstance(held, FactoredJacobian) else held.rmatvec(torch.zeros(held.shape[0]))
    return numbers.dtype, numbers.device


def doubled(jacobian: Jacobian) -> Jacobian:
    """The Jacobian with its factors in float64, so that products have float64 round-off, for twice the memory."""
    if isinstance(jacobian, Sharded):
        result = copy.copy(jacobian)
        result.local = _each(jacobian.local, _double)
        return result
    return _each(jacobian, _double) if isinstance(jacobian, FactoredJacobian | StackedJacobian) else jacobian


def row_chunks(jacobian: Jacobian, entries: int = CHUNK) -> Iterator[Tensor]:
    """The rows of J in order, some at a time.

    Args:
        jacobian: a `FactoredJacobian` or `StackedJacobian`.
        entries: how many numbers a chunk may hold (never less than the rows of one sample).

    Yields:
        Dense rows, shape (c, P), float64.

    Raises:
        ValueError: another kind of Jacobian.
    """
    for part in jacobian.parts if isinstance(jacobian, StackedJacobian) else (jacobian,):
        if not isinstance(part, FactoredJacobian):
            raise ValueError(f"a {type(part).__name__} does not hold the factors of all columns; solve it by 'dual'")
        samples = part.outputs.shape[0]
        step = max(1, entries * samples // max(1, part.shape[0] * part.shape[1]))
        for start in range(0, samples, step):
            yield _mapped(part, partial(_some, start=start, stop=start + step)).dense().double()


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _some(tensor: Tensor, start: int, stop: int) -> Tensor:
    return tensor[start:stop]


def _each(jacobian: FactoredJacobian | StackedJacobian, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(jacobian, StackedJacobian):
        return StackedJacobian([_mapped(part, change) for part in jacobian.parts])
    return _mapped(jacobian, change)


def _mapped(jacobian: FactoredJacobian, change: Callable[[Tensor], Tensor]) -> FactoredJacobian:
    outputs = change(jacobian.outputs)
    per_sample = jacobian.shape[0] // max(1, jacobian.outputs.shape[0])
    blocks: list[Any] = []
    for block in jacobian.blocks:
        held: Any = block
        values = {field.name: getattr(held, field.name) for field in fields(held)}
        blocks.append(replace(held, **{name: change(v) for name, v in values.items() if isinstance(v, Tensor)}))
    shape = (outputs.shape[0] * per_sample, jacobian.shape[1])
    return FactoredJacobian(blocks, shape, per_sample, jacobian.names, outputs)
