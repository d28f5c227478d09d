"""Kronecker factors of the Gauss-Newton matrix as a constraint: one A (x) S a linear layer (K-FAC)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nsrl.projection.constraints.constraint import Constraint, Eigenspace
from nsrl.projection.jacobians.blocks import LinearBlock, Range, overlap
from nsrl.projection.jacobians.columns import LayerColumns
from nsrl.projection.jacobians.factored import FactoredJacobian
from nsrl.projection.solvers.spectrum import tolerance


@dataclass
class Factors:
    """The two moments of one layer.

    Attributes:
        layer: where the layer lies in the flat vector.
        inputs: sum of a a^T over samples and positions, shape (d_in, d_in), float64.
        grads: sum of g g^T over samples, whitened outputs and positions, shape (d_out, d_out), float64.
        count: number of samples and positions; F of the layer is grads (x) inputs / count.
    """

    layer: LayerColumns
    inputs: Tensor
    grads: Tensor
    count: int


class KroneckerConstraint(Constraint):
    """F = blockdiag(S_l (x) A_l): A the second moment of a layer's inputs, S that of its whitened output gradients.

    Positions (tokens, patches, repeated use) count as samples of their own, the "expand" convention: with M samples and
    positions A = 1/M sum a a^T and S = sum g g^T, over rows scaled by the caller. It is exact for one sample and
    position, or when all inputs of a layer agree; in general it replaces the mean of a Kronecker product by the product
    of means. Its null space lies within that of the rows themselves, hence of the full Jacobian, and the null space of
    the input factors (the layer features) lies within it. Martens & Grosse, arXiv 1503.05671; Eschenhagen et al.,
    arXiv 2311.00636 for expand and reduce.

    `update` pools batches of one task. `merged` joins tasks by adding their factors, an upper bound of the sum:
    S_1 (x) A_1 + S_2 (x) A_2 <= (S_1 + S_2) (x) (A_1 + A_2), so it protects too much, never too little.

    Args:
        columns: columns of the parameters by name (`parameter_columns`).
        passes: projection passes.
    """

    def __init__(self, columns: Mapping[str, Range], passes: int = 2):
        super().__init__(columns, passes)
        self._factors: dict[tuple[Range | None, Range | None], Factors] = {}
        self._refused: set[Range] = set()
        self._storage = torch.float64
        self._merged = False
        self._decomposed: list[tuple[LayerColumns, Tensor, Tensor, Tensor]] | None = None

    def update(self, jacobian: FactoredJacobian) -> None:
        """Add the factors of a batch, all of whose rows carry the same scale.

        Raises:
            ValueError: other columns, NaN or infinite entries, or a merged constraint: pooling would dilute its bound.
        """
        if jacobian.shape[1] != self.width:
            raise ValueError(f"the Jacobian has {jacobian.shape[1]} columns, the constraint {self.width}")
        if self._merged:
            raise ValueError("a merged constraint cannot be updated; update the constraint of a task, then merge it")
        self._decomposed = None
        self._storage = max(self._storage, jacobian.outputs.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        for block in jacobian.blocks:
            if isinstance(block, LinearBlock):
                self._add(block)
            else:
                self._refused.update(block.owned)
        self._refused |= _repeated(columns for block in jacobian.blocks for columns in block.owned)

    def add_layer(self, name: str, inputs: Tensor, grads: Tensor) -> None:
        """Add the moments of one linear layer on a batch: what a batch needs of memory is then one layer's.

        The layer has to be what a `torch.nn.Linear` is, used once a sample; `update` looks that up, this does not.

        Args:
            name: of the layer, whose weight and bias have columns.
            inputs: M samples and positions, shape (M, d_in), without the constant of a bias.
            grads: whitened output gradients, O of each, scaled as rows are, shape (M, O, d_out).

        Raises:
            ValueError: no such layer, other sizes than its own, NaN or infinite entries, or a merged constraint.
        """
        if self._merged:
            raise ValueError("a merged constraint cannot be updated; update the constraint of a task, then merge it")
        weight, bias = (self.columns.get(f"{name}.{part}") for part in ("weight", "bias"))
        if weight is None:
            raise ValueError(f"{name} has no weight among the columns of the constraint")
        if grads.shape[:1] != inputs.shape[:1] or inputs.shape[1] * grads.shape[-1] != weight[1] - weight[0]:
            raise ValueError(
                f"{name} has {weight[1] - weight[0]} weights, which inputs {tuple(inputs.shape)} and gradients "
                f"{tuple(grads.shape)} do not fit"
            )
        self._decomposed = None
        if bias is not None:
            inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
        self._storage = max(self._storage, inputs.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        self._add(LinearBlock(inputs.unsqueeze(1), grads.unsqueeze(2), weight, bias))

    def merged(self, other: KroneckerConstraint) -> KroneckerConstraint:
        """The sum of the factors, layer by layer: an upper bound of the sum of the two quadratic forms.

        Raises:
            ValueError: they are over other parameters.
        """
        if other.columns != self.columns:
            raise ValueError("only constraints over the same parameters can be merged")
        result = KroneckerConstraint(self.columns, self.passes)
        result._merged = True
        result._refused = self._refused | other._refused
        result._storage = max(self._storage, other._storage, key=lambda dtype: torch.finfo(dtype).eps)
        for factors in (*self._factors.values(), *other._factors.values()):
            key = (factors.layer.weight, factors.layer.bias)
            mean = factors.inputs / factors.count
            if key in result._factors:
                result._factors[key].inputs += mean
                result._factors[key].grads += factors.grads
            else:
                result._factors[key] = Factors(factors.layer, mean, factors.grads.clone(), 1)
        return result

    @property
    def held(self) -> list[Factors]:
        """The factors of layers whose columns nothing else shares."""
        # Columns with a second block in a batch, or other company in another batch, have no single pair of factors.
        refused = self._refused | _repeated(c for key in self._factors for c in key if c is not None)
        # A layer in pieces (groups of a convolution) may have been one dense block in another batch.
        return [
            factors
            for key, factors in self._factors.items()
            if not any(overlap(mine, theirs) for mine in key if mine is not None for theirs in refused)
        ]

    @property
    def uncovered(self) -> tuple[str, ...]:
        """Parameters without a pair of factors: norm scales, embeddings, free parameters, tied weights."""
        held = [c for factors in self.held for c in (factors.layer.weight, factors.layer.bias) if c is not None]
        return tuple(
            name for name, (start, stop) in self.columns.items() if not any(a >= start and b <= stop for a, b in held)
        )

    @property
    def eigenspaces(self) -> tuple[Eigenspace, ...]:
        """One a layer: the products of the eigenvalues of S and A, laid out (rank S, rank A)."""
        return tuple(Eigenspace(layer.name, values.flatten(), layer.dimension) for layer, values, _, _ in self._eigen())

    def leading(
        self, share_in: float = 1.0, share_out: float = 1.0
    ) -> Iterator[tuple[LayerColumns, tuple[Tensor, int], tuple[Tensor, int]]]:
        """Layer by layer, the eigenvectors of A (d_in, d_in) and of S (d_out, d_out), ascending, and how many lead.

        Nothing of it is kept: what is needed at a time is one layer's.

        Args:
            share_in: of the trace of A that the leading directions carry; 1 takes all above round-off.
            share_out: the same of S.

        Raises:
            ValueError: the constraint holds no factors yet.
        """
        if not self.held:
            raise ValueError("the constraint holds no factors; call update with the Jacobian of a net of linear layers")
        for factors in self.held:
            sides = []
            for moment, share in ((factors.inputs / factors.count, share_in), (factors.grads, share_out)):
                values, vectors = torch.linalg.eigh(moment)
                real = int((values > tolerance(len(values), self._storage) * values[-1].clamp_min(0.0)).sum())
                carried = values.flip(0)[:real].cumsum(0)
                needed = real if share >= 1.0 or not real else int((carried < share * carried[-1]).sum()) + 1
                sides.append((vectors, min(needed, real)))
            yield factors.layer, sides[0], sides[1]

    def components(self, vector: Tensor) -> Tensor:
        """Q_S^T W Q_A, flat, (r,), for the part W of v in every layer."""
        return torch.cat([(s.T @ layer.matrix(vector) @ a).flatten() for layer, _, a, s in self._eigen()])

    def combine(self, components: Tensor) -> Tensor:
        """Q_S C Q_A^T in every layer, zero elsewhere, flat, (P,)."""
        out = components.new_zeros(self.width)
        start = 0
        for layer, values, a, s in self._eigen():
            part = components[start : start + values.numel()].view(values.shape)
            layer.write(s @ part @ a.T, out)
            start += values.numel()
        return out

    def nbytes(self) -> int:
        """Factors and, once used, their eigenvectors."""
        tensors = [t for factors in self._factors.values() for t in (factors.inputs, factors.grads)]
        tensors += [t for _, *parts in self._decomposed or [] for t in parts]
        return sum(t.numel() * t.element_size() for t in tensors)

    def _add(self, block: LinearBlock) -> None:
        key = (block.weight, block.bias)
        inputs = block.inputs.flatten(0, 1).double()
        grads = block.grads.flatten(0, 2).double()
        moments = inputs.T @ inputs, grads.T @ grads
        if not all(bool(torch.isfinite(moment).all()) for moment in moments):
            raise ValueError(f"the factors of {self._name(key)} have NaN or infinite entries; the model has diverged")
        if key not in self._factors:
            layer = LayerColumns(self._name(key), grads.shape[1], block.weight, block.bias, block.transposed)
            self._factors[key] = Factors(layer, *moments, len(inputs))
            return
        factors = self._factors[key]
        factors.inputs += moments[0]
        factors.grads += moments[1]
        factors.count += len(inputs)

    def _name(self, key: tuple[Range | None, Range | None]) -> str:
        start, stop = key[0] or key[1] or (0, 0)
        for name, (first, last) in self.columns.items():
            if first <= start and stop <= last:
                layer = name.rpartition(".")[0] or name
                return layer if (first, last) == (start, stop) else f"{layer}[{(start - first) // (stop - start)}]"
        raise ValueError(f"columns {start} to {stop} belong to no parameter; pass the columns that were linearised")

    def _eigen(self) -> list[tuple[LayerColumns, Tensor, Tensor, Tensor]]:
        """Layer, eigenvalues (rank S, rank A), Q_A (d_in, rank A) and Q_S (d_out, rank S); decomposed once."""
        held = self.held
        if not held:
            raise ValueError("the constraint holds no factors; call update with the Jacobian of a net of linear layers")
        if self._decomposed is None:
            self._decomposed = []
            for factors in held:
                inputs, a = _eigen(factors.inputs / factors.count, self._storage)
                grads, s = _eigen(factors.grads, self._storage)
                self._decomposed.append((factors.layer, torch.outer(grads, inputs), a, s))
        return self._decomposed


def _repeated(columns: Iterable[Range]) -> set[Range]:
    return {owned for owned, count in Counter(columns).items() if count > 1}


def _eigen(moment: Tensor, storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """Eigenvalues above round-off, descending, and their vectors."""
    values, vectors = torch.linalg.eigh(moment)
    real = values > tolerance(len(values), storage) * values[-1].clamp_min(0.0)
    return values[real].flip(0), vectors[:, real].flip(1)
