"""A constraint of given directions: layer bases, and the share of every direction that is removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from nsrl.continual.passes import Rows
from nsrl.projection.constraints.constraint import Constraint, Eigenspace
from nsrl.projection.jacobians.blocks import Range
from nsrl.projection.jacobians.columns import LayerColumns


@dataclass(frozen=True)
class LayerBasis:
    """Input directions of one layer.

    Attributes:
        layer: where its matrix lies in the flat vector.
        basis: U, orthonormal, shape (d_in, r), float64.
        removed: share of each direction that a displacement loses, in [0, 1], shape (r,).
        gain: factor on what is left; 1 but for Adam-NSCL's official code.
    """

    layer: LayerColumns
    basis: Tensor
    removed: Tensor
    gain: float = 1.0


@dataclass(frozen=True)
class AsGiven:
    """The filter that removes what the values say: they are fractions already."""

    joint: ClassVar[bool] = False

    def removed(self, values: Tensor, components: Tensor | None = None, protected: Tensor | None = None) -> Tensor:
        """The values, (r,)."""
        return values


class BasisConstraint(Constraint):
    """dW <- gain * (dW - dW U diag(removed) U^T) in every layer; parameters of no layer are `uncovered`.

    Args:
        columns: see `Constraint`.
        layers: bases.
    """

    def __init__(self, columns: Mapping[str, Range], layers: Sequence[LayerBasis]):
        super().__init__(columns, passes=1)
        self.layers = list(layers)

    @property
    def eigenspaces(self) -> tuple[Eigenspace, ...]:
        """One a layer."""
        return tuple(
            Eigenspace(part.layer.name, part.removed, part.layer.dimension, part.layer.width_out)
            for part in self.layers
        )

    @property
    def uncovered(self) -> tuple[str, ...]:
        """Parameters of no layer."""
        held = [c for part in self.layers for c in (part.layer.weight, part.layer.bias) if c is not None]
        return tuple(
            name for name, (start, stop) in self.columns.items() if not any(a <= start and stop <= b for a, b in held)
        )

    def components(self, vector: Tensor) -> Tensor:
        """W U in every layer, flat, (r,)."""
        pieces = [(part.layer.matrix(vector) @ part.basis).flatten() for part in self.layers]
        return torch.cat(pieces) if pieces else vector.new_zeros(0, dtype=torch.float64)

    def combine(self, components: Tensor) -> Tensor:
        """C U^T in every layer, zero elsewhere, flat, (P,)."""
        out = components.new_zeros(self.width)
        sizes = [part.layer.width_out * part.basis.shape[1] for part in self.layers]
        for part, piece in zip(self.layers, components.split(sizes), strict=True):
            part.layer.write(piece.view(part.layer.width_out, -1) @ part.basis.T, out)
        return out

    def applied(self, displacement: Tensor) -> Tensor:
        """The projected displacement alone, without a certificate, shape (P,)."""
        out = displacement.clone()
        for part in self.layers:
            matrix = part.layer.matrix(displacement)
            kept = matrix - ((matrix @ part.basis) * part.removed) @ part.basis.T
            part.layer.write(part.gain * kept, out)
        return out

    def rows(self, model: nn.Module) -> Rows | None:
        """Projected layer inputs: gradients made with them are projected; None where a layer is no whole linear one.

        They are projected in their own precision. What that leaves of a protected direction is round-off of the step,
        less than the round-off with which weights of that precision take the step up.

        Args:
            model: whose parameters the columns are.
        """
        names = {columns: name for name, columns in self.columns.items()}
        parameters, found = dict(model.named_parameters()), {}
        for part in self.layers:
            layer = part.layer
            if layer.transposed or layer.bias is not None or layer.weight not in names:
                return None
            weight = parameters[names[layer.weight]]
            if weight.shape != (layer.width_out, layer.width_in) or id(weight) in found:
                return None
            basis = part.basis.to(weight)
            found[id(weight)] = (basis * part.removed.to(weight), basis.T.contiguous(), part.gain)

        def projected(layer: nn.Linear, inputs: Tensor) -> Tensor:
            if id(layer.weight) not in found:
                return inputs
            removed, basis, gain = found[id(layer.weight)]
            kept = torch.addmm(inputs, inputs @ removed, basis, alpha=-1.0)
            return kept if gain == 1.0 else kept.mul_(gain)

        return projected

    def nbytes(self) -> int:
        """Bases and shares."""
        tensors = [t for part in self.layers for t in (part.basis, part.removed)]
        return sum(t.numel() * t.element_size() for t in tensors)
