"""The null-space projection of layer features as two thin products a layer, in the parameters' own precision.

`Constraint.project` measures a certificate in float64 at every call, which on a language model costs more than the
training step. Here the protected subspaces of a `FeatureConstraint` are taken once as explicit orthonormal matrices, of
the subspace or of its complement, whichever is thinner: 4 d_out d_in min(r, d_in - r) operations a layer.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from nsrl.projection.constraints.features import FeatureConstraint
from nsrl.projection.constraints.kronecker import KroneckerConstraint
from nsrl.projection.jacobians.blocks import Range
from nsrl.projection.jacobians.columns import LayerColumns
from nsrl.projection.precision import full_precision


@dataclass(frozen=True)
class ThinLayer:
    """The protected subspace of one layer.

    Attributes:
        layer: where its matrix lies in the flat vector.
        basis: orthonormal columns, shape (d_in, q).
        inside: the basis spans the protected subspace; else its complement.
        outputs: where output directions are chosen too (Kronecker factors): orthonormal columns, shape (d_out, s).
        outputs_inside: those span the protected output directions; else their complement.
    """

    layer: LayerColumns
    basis: Tensor
    inside: bool
    outputs: Tensor | None = None
    outputs_inside: bool = True

    def left(self, matrix: Tensor) -> Tensor:
        """What of a displacement (d_out, d_in) is left; a new tensor."""
        along = (matrix @ self.basis) @ self.basis.T
        if self.outputs is None:
            return torch.sub(matrix, along, out=along) if self.inside else along
        if not self.inside:
            along = torch.sub(matrix, along, out=along)
        both = self.outputs @ (self.outputs.T @ along)
        if not self.outputs_inside:
            both = torch.sub(along, both, out=both)
        return torch.sub(matrix, both, out=both)


class ThinProjection:
    """What of a displacement a protected subspace leaves, layer by layer, in one pass.

    Args:
        layers: the protected subspaces.
        width: P.
        held: columns in which nothing may move at all, as start and stop.
    """

    def __init__(self, layers: Sequence[ThinLayer], width: int, held: Sequence[tuple[int, int]] = ()):
        self.layers = tuple(layers)
        self.width = width
        self.held = tuple(held)

    @classmethod
    def of(
        cls, constraint: FeatureConstraint, precision: torch.dtype = torch.float32, hold_uncovered: bool = False
    ) -> ThinProjection:
        """Of what a constraint has consolidated.

        Args:
            constraint: the features.
            precision: of the bases and of the products. The leakage is a few units in the last place of it.
            hold_uncovered: let parameters that no layer's features protect not move at all.
        """
        layers = [
            ThinLayer(layer, basis.to(precision), inside)
            for layer, basis, inside in ((layer, *span.thin()) for layer, span in constraint.protected_spans)
            if span_matters(basis, inside)
        ]
        held = [constraint.columns[name] for name in constraint.uncovered] if hold_uncovered else []
        return cls(layers, constraint.width, held)

    @classmethod
    def of_factors(
        cls,
        constraint: KroneckerConstraint,
        share_in: float = 1.0,
        share_out: float = 1.0,
        precision: torch.dtype = torch.float32,
        hold_uncovered: bool = False,
    ) -> ThinProjection:
        """Of the Kronecker factors of a constraint, decomposed one after the other and held on their thinner sides.

        What a layer's matrix D loses is its part in the product of the two protected spans, S S^T D A A^T. With all
        directions above round-off (shares of 1), that is the constraint's own projection under `Hard()`, without its
        certificate, and without a vector of length P in float64.

        Args:
            constraint: the factors.
            share_in: share of the trace of a layer's input factor that is to be protected, by its leading directions.
            share_out: the same of its output factor.
            precision: of bases and products.
            hold_uncovered: let parameters without factors not move at all.

        Raises:
            ValueError: a share outside (0, 1], or a constraint that holds no factors yet.
        """
        for name, share in (("share_in", share_in), ("share_out", share_out)):
            if not 0.0 < share <= 1.0:
                raise ValueError(f"{name} must be above 0 and at most 1, not {share}")
        layers = []
        for layer, inputs, outputs in constraint.leading(share_in, share_out):
            sides = [_thinner(*side, precision) for side in (inputs, outputs)]
            layers.append(ThinLayer(layer, *sides[0], *sides[1]))
        held = [constraint.columns[name] for name in constraint.uncovered] if hold_uncovered else []
        return cls(layers, constraint.width, held)

    @torch.no_grad()
    @full_precision()
    def null(self, vector: Tensor) -> Tensor:
        """The part of a displacement (P,) that changes no output on protected features, shape (P,).

        Raises:
            ValueError: a vector of another length.
        """
        if vector.shape != (self.width,):
            raise ValueError(f"the displacement must have {self.width} entries, not shape {tuple(vector.shape)}")
        out = vector.clone()
        for part in self.layers:
            matrix = part.layer.matrix(vector, part.basis.dtype)
            part.layer.write(part.left(matrix).to(out.dtype), out)
        for start, stop in self.held:
            out[start:stop] = 0.0
        return out

    @torch.no_grad()
    @full_precision()
    def retract(self, parameters: Sequence[Tensor], reference: Tensor) -> float:
        """Project the way of parameters since a reference in place, layer by layer: no vector of length P is made.

        Args:
            parameters: contiguous, in the order of the columns.
            reference: where the way begins, (P,).

        Returns:
            |P d| / |d| of the way d in the layers that are protected; 1 where it is zero.

        Raises:
            ValueError: parameters or a reference of another size.
        """
        flats = [p.detach().view(-1) for p in parameters]
        starts = [0, *accumulate(len(flat) for flat in flats)]
        if starts[-1] != self.width or reference.shape != (self.width,):
            raise ValueError(f"the parameters and their reference must have {self.width} entries, not {starts[-1]}")

        def view(columns: Range) -> Tensor:
            index = bisect_right(starts, columns[0]) - 1
            return flats[index][columns[0] - starts[index] : columns[1] - starts[index]]

        before = after = 0.0
        for part in self.layers:
            held = [columns for columns in (part.layer.weight, part.layer.bias) if columns is not None]
            ways = [view(columns) - reference[slice(*columns)] for columns in held]
            ends = [0, *accumulate(len(way) for way in ways)]
            local = _moved_to_the_front(part.layer, ends)
            matrix = local.matrix(ways[0] if len(ways) == 1 else torch.cat(ways), part.basis.dtype)
            before += float(matrix.norm()) ** 2
            projected = part.left(matrix)
            after += float(projected.norm()) ** 2
            out = ways[0].new_empty(ends[-1])
            local.write(projected.to(out.dtype), out)
            for columns, piece in zip(held, out.split([len(way) for way in ways]), strict=True):
                torch.add(reference[slice(*columns)], piece, out=view(columns))
        for columns in self.held:
            place, begin = view(columns), reference[slice(*columns)]
            before += float((place - begin).norm()) ** 2
            place.copy_(begin)
        return math.sqrt(after / before) if before > 0.0 else 1.0

    @property
    def rank(self) -> int:
        """Protected directions, those of every output neuron counted, and entries held."""
        return sum(_rank(part) for part in self.layers) + sum(b - a for a, b in self.held)

    def nbytes(self) -> int:
        """Memory held, in bytes."""
        tensors = [t for part in self.layers for t in (part.basis, part.outputs) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    def dense_nbytes(self) -> int:
        """What one dense d_in x d_in projector a layer, in the same precision, would hold."""
        return sum(len(part.basis) ** 2 * part.basis.element_size() for part in self.layers)


def span_matters(basis: Tensor, inside: bool) -> bool:
    """Whether anything is protected at all: an empty subspace leaves every displacement as it is."""
    return bool(basis.shape[1]) or not inside


def _moved_to_the_front(layer: LayerColumns, ends: Sequence[int]) -> LayerColumns:
    """A layer's columns where its parts alone make up the vector."""
    weight = None if layer.weight is None else (0, ends[1])
    bias = None if layer.bias is None else (ends[-2], ends[-1])
    return replace(layer, weight=weight, bias=bias)


def _rank(part: ThinLayer) -> int:
    inputs = part.basis.shape[1] if part.inside else len(part.basis) - part.basis.shape[1]
    if part.outputs is None:
        return inputs * part.layer.width_out
    return inputs * (part.outputs.shape[1] if part.outputs_inside else len(part.outputs) - part.outputs.shape[1])


def _thinner(vectors: Tensor, rank: int, precision: torch.dtype) -> tuple[Tensor, bool]:
    """The protected ones of an orthonormal basis of all directions, or the others, whichever are fewer.

    Args:
        vectors: all, ascending, shape (d, d).
        rank: the last ones are protected.
        precision: of the result.
    """
    free = len(vectors) - rank
    inside = rank <= free
    return (vectors[:, free:] if inside else vectors[:, :free]).to(precision, copy=True), inside
