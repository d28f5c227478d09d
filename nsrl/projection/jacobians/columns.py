"""Where parameters and layers lie in the flat parameter vector."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nsrl.projection.jacobians.blocks import Range


@dataclass(frozen=True)
class LayerColumns:
    """Where the matrix of a linear layer, or of one group of a convolution, lies in the flat vector.

    Attributes:
        name: of the layer.
        width_out: d_out.
        weight: columns of the weight, or None when it is not covered.
        bias: columns of the bias, or None; it is the last column of the matrix.
        transposed: the weight is stored as (d_in, d_out).
    """

    name: str
    width_out: int
    weight: Range | None
    bias: Range | None
    transposed: bool = False

    @property
    def dimension(self) -> int:
        """Number of parameters."""
        return sum(stop - start for start, stop in filter(None, (self.weight, self.bias)))

    @property
    def width_in(self) -> int:
        """d_in, with the constant feature of the bias."""
        return self.dimension // self.width_out

    def matrix(self, vector: Tensor, precision: torch.dtype = torch.float64) -> Tensor:
        """The layer's part of a flat vector (P,), shape (d_out, d_in)."""
        parts = []
        if self.weight is not None:
            flat = vector[slice(*self.weight)].to(precision)
            parts.append(flat.view(-1, self.width_out).T if self.transposed else flat.view(self.width_out, -1))
        if self.bias is not None:
            parts.append(vector[slice(*self.bias)].to(precision).unsqueeze(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def write(self, matrix: Tensor, out: Tensor) -> None:
        """Put a (d_out, d_in) matrix into its place in the flat vector `out` (P,)."""
        width = matrix.shape[1] - (self.bias is not None)
        if self.weight is not None:
            weight = matrix[:, :width]
            out[slice(*self.weight)] = (weight.T if self.transposed else weight).flatten()
        if self.bias is not None:
            out[slice(*self.bias)] = matrix[:, -1]


def parameter_columns(module: nn.Module, parameters: Iterable[str] | None = None) -> dict[str, Range]:
    """Start and stop of the trainable parameters in the flat vector, in `named_parameters()` order.

    Args:
        module: owner of the parameters.
        parameters: names of those that own columns; default all trainable ones.

    Raises:
        ValueError: a name that is no trainable parameter of the module, or parameters that lie in pieces on several
            processes.
    """
    sharded = next((name for name, p in module.named_parameters() if hasattr(p, "full_tensor")), None)
    if sharded is not None:
        raise ValueError(
            f"{sharded} is sharded (a DTensor, as of FSDP2), and has no columns of its own here: linearise the module "
            "before fully_shard or while its parts are unsharded, train with DistributedDataParallel, or protect "
            "adapters that are left whole (docs/distributed.md)"
        )
    sizes = {name: p.numel() for name, p in module.named_parameters() if p.requires_grad}
    wanted = set(sizes) if parameters is None else set(parameters)
    if wanted - set(sizes):
        raise ValueError(
            f"{', '.join(sorted(wanted - set(sizes)))}: no trainable parameter of the module has this name"
        )
    columns, start = {}, 0
    for name, size in sizes.items():
        if name in wanted:
            columns[name] = (start, start + size)
            start += size
    return columns
