"""The factored Jacobian: the one data structure that projection, NTK analysis and editing are written on.

`J` has one row per sample and output (sample-major, n * R + o) and one column per trainable parameter entry (in
`named_parameters()` order). It is never materialised: a linear layer keeps its inputs A and output gradients G, and

    matvec   (J v)[n,o]  = sum_t <G[n,o,t], V A[n,t]>
    rmatvec  J^T u       = sum_{n,o,t} u[n,o] G[n,o,t] A[n,t]^T
    gram     K[no,mp]    = sum_{t,t'} <A[n,t],A[m,t']> <G[n,o,t],G[m,p,t']>      (the empirical neural tangent kernel)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nsrl.projection.blocks import Block, Range
from nsrl.projection.capture import JacobianError, capture_blocks, refuse_sample_mixing
from nsrl.projection.fallback import Forward


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

    def __init__(self, blocks: Sequence[Block], shape: tuple[int, int], rows: int, names: tuple[str, ...],
                 outputs: Tensor):  # fmt: skip
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
        for block in self.blocks:
            total += block.matvec(vector)
        return total.flatten()

    def rmatvec(self, rows: Tensor) -> Tensor:
        """J^T u for u of shape (k,): shape (P,)."""
        self._check(rows, self.shape[0], "rows")
        out = self.outputs.new_zeros(self.shape[1])
        per_sample = rows.to(self.outputs).view(-1, self._rows)
        for block in self.blocks:
            block.rmatvec_into(per_sample, out)
        return out

    def matmat(self, vectors: Tensor) -> Tensor:
        """J V for V of shape (P, c): shape (k, c)."""
        return torch.stack([self.matvec(vector) for vector in vectors.T], 1)

    def rmatmat(self, rows: Tensor) -> Tensor:
        """J^T U for U of shape (k, c): shape (P, c)."""
        return torch.stack([self.rmatvec(column) for column in rows.T], 1)

    def gram(self, precision: torch.dtype = torch.float64) -> Tensor:
        """K = J J^T, shape (k, k), symmetric to the last bit.

        Args:
            precision: of the products. In float64, the default, K carries the condition number of float32 factors; in
                float32 it costs half, and eigenvalues below 1e-7 of the largest are noise (enough to look at a kernel,
                not to project).
        """
        gram = self.outputs.new_zeros(self.shape[0], self.shape[0], dtype=precision)
        for index, block in enumerate(self.blocks):
            gram += block.gram(precision)
            for partner in self.blocks[:index]:
                product = block.cross_gram(partner, precision)
                if product is not None:
                    gram += product + product.T
        return gram

    def cross_gram(self, other: FactoredJacobian, precision: torch.dtype = torch.float64) -> Tensor:
        """J J'^T against another batch of the same module, shape (k, k')."""
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

    def _tied(self) -> list[Range]:
        """Columns that more than one block has a part of."""
        owners = Counter(columns for block in self.blocks for columns in block.owned)
        return [columns for columns, count in owners.items() if count > 1]

    def _check(self, vector: Tensor, length: int, what: str) -> None:
        if vector.shape != (length,):
            raise JacobianError(f"the {what} must have shape ({length},), not {tuple(vector.shape)}")


class StackedJacobian:
    """Jacobians over the same parameters, one below the other (several tasks, or an extra group of rows)."""

    def __init__(self, parts: Sequence[FactoredJacobian]):
        self.parts = tuple(parts)
        self.shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])

    def matvec(self, vector: Tensor) -> Tensor:
        """J v, shape (k,)."""
        return torch.cat([part.matvec(vector) for part in self.parts])

    def rmatvec(self, rows: Tensor) -> Tensor:
        """J^T u, shape (P,)."""
        pieces = rows.split([part.shape[0] for part in self.parts])
        return torch.stack([part.rmatvec(piece) for part, piece in zip(self.parts, pieces, strict=True)]).sum(0)

    def gram(self) -> Tensor:
        """K = J J^T, shape (k, k), float64."""
        return torch.cat([torch.cat([a.cross_gram(b) for b in self.parts], 1) for a in self.parts], 0)

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


def jacobian(
    module: nn.Module,
    inputs: Any,
    *,
    forward: Forward | None = None,
    parameters: Iterable[str] | None = None,
    seed: Callable[[Tensor], Tensor] | None = None,
    scale: float = 1.0,
    check: bool = True,
    dense: Iterable[str] = (),
) -> FactoredJacobian:
    """Linearise a module's outputs at a batch.

    Args:
        module: any `nn.Module` whose output rows depend on their own sample only.
        inputs: what the module is called with: a tensor with the samples first, or, when `forward` is given, any
            (nested) container of such tensors.
        forward: function (module, inputs) -> outputs of shape (N, O); default `module(inputs)`.
        parameters: names of the parameters that own columns; default all trainable ones. The order is that of
            `named_parameters()` in any case.
        seed: function from the outputs (N, O) to S (N, R, O): rows become S dz/dtheta (a metric's whitening).
            Default: the identity, so that rows are the raw output derivatives.
        scale: factor on every row (1 / sqrt(N) turns the Gram into a mean over samples).
        check: evaluate twice to refuse randomness, and compare one random product with autograd; parameters whose
            factors disagree (used outside their own layer) are recomputed densely.
        dense: parameters known to be used outside their own layer; with check=False, what an earlier checked call
            left in `recomputed`.

    Returns:
        A `FactoredJacobian` of shape (N * R, P).

    Raises:
        JacobianError: batch-norm or dropout in train mode, random outputs, in-place damage, no parameters.
    """
    forward = forward or (lambda module, inputs: module(inputs))
    columns, names = _columns(module, parameters)
    width = sum(stop - start for start, stop in columns.values())
    refuse_sample_mixing(module)
    known = frozenset(dense)
    blocks, outputs, seeds = capture_blocks(module, inputs, forward, columns, seed, known)
    shape = (outputs.shape[0] * seeds.shape[1], width)
    result = FactoredJacobian(blocks, shape, seeds.shape[1], names, outputs.detach())
    if check:
        _refuse_randomness(module, inputs, forward, outputs)
        wrong = _mismatches(module, result, outputs, seeds, columns)
        if wrong:
            known |= frozenset(wrong)
            blocks, outputs, seeds = capture_blocks(module, inputs, forward, columns, seed, known)
            result = FactoredJacobian(blocks, shape, seeds.shape[1], names, outputs.detach())
            wrong = _mismatches(module, result, outputs, seeds, columns)
            if wrong:
                raise JacobianError(
                    f"the per-sample Jacobian of {', '.join(wrong)} does not add up to the gradient: the output of a "
                    "sample seems to depend on other samples of the batch"
                )
    if scale != 1.0:
        result = FactoredJacobian(
            [block.multiplied(scale) for block in result.blocks], shape, seeds.shape[1], names, result.outputs
        )
    result.recomputed = tuple(sorted(known))
    return result


def _columns(module: nn.Module, parameters: Iterable[str] | None) -> tuple[dict[str, Range], tuple[str, ...]]:
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    wanted = set(trainable) if parameters is None else set(parameters)
    unknown = wanted - set(trainable)
    if unknown:
        raise JacobianError(f"{', '.join(sorted(unknown))}: no trainable parameter of the module has this name")
    if not wanted:
        raise JacobianError("the module has no trainable parameter to linearise in")
    columns, start = {}, 0
    for name, parameter in trainable.items():
        if name in wanted:
            columns[name] = (start, start + parameter.numel())
            start += parameter.numel()
    return columns, tuple(columns)


def _refuse_randomness(module: nn.Module, inputs: Any, forward: Forward, outputs: Tensor) -> None:
    with torch.no_grad():
        again = forward(module, inputs)
    if not torch.allclose(again, outputs, rtol=1e-4, atol=1e-6):
        raise JacobianError("two evaluations of the module differ: it is random; switch its noise off first")


def _mismatches(
    module: nn.Module, result: FactoredJacobian, outputs: Tensor, seeds: Tensor, columns: dict[str, Range]
) -> list[str]:
    """Parameters whose part of J^T u differs from autograd's for a fixed pseudo-random u."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(result.shape[0], generator=generator).to(outputs)
    cotangent = torch.einsum("nr,nro->no", rows.view(outputs.shape[0], -1), seeds)
    named = dict(module.named_parameters())
    grads = torch.autograd.grad(outputs, [named[n] for n in columns], cotangent, retain_graph=True, allow_unused=True)
    ours = result.rmatvec(rows)
    tolerance = 1e-3 if outputs.dtype != torch.float64 else 1e-8
    largest = max((float(grad.norm()) for grad in grads if grad is not None), default=0.0)
    wrong = []
    for (name, (start, stop)), grad in zip(columns.items(), grads, strict=True):
        expected = torch.zeros(stop - start).to(ours) if grad is None else grad.flatten()
        if float((ours[start:stop] - expected).norm()) > tolerance * max(float(expected.norm()), 1e-3 * largest, 1e-12):
            wrong.append(name)
    return wrong
