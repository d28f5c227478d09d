"""What each kind of layer contributes to the Jacobian, from its inputs and the gradients in its outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from nsrl.projection.jacobians.blocks import Block, DenseBlock, LinearBlock, Range
from nsrl.projection.jacobians.embedding import EmbeddingBlock
from nsrl.projection.jacobians.patches import is_convolution, patches
from nsrl.projection.jacobians.state import own_state

#: More groups than this, and a convolution's columns are so few that materialising them is cheaper.
GROUPS = 16


@dataclass
class Usage:
    """One call of a layer: its input (detached), its output (in the graph) and the input's version at the call."""

    input: Tensor
    output: Tensor
    version: int
    grad: Tensor | None = None

    @property
    def gradient(self) -> Tensor:
        """Derivative of the seeded outputs in the layer's output, (N, R, *output shape)."""
        assert self.grad is not None, "capture fills this in"
        return self.grad


@dataclass(eq=False)
class Site:
    """A place where parameters act on an input.

    Attributes:
        layer: the module that holds them.
        columns: of the wanted ones, by their local name in the layer.
        names: their full names in the whole module, by their local name.
        build: makes the blocks, once every usage has its gradient.
        usages: the calls, in order.
        lost: whether there were calls that no factor can be made of.
    """

    layer: nn.Module
    columns: dict[str, Range]
    names: dict[str, str]
    build: Callable[[Site], Sequence[Block]]
    usages: list[Usage] = field(default_factory=list)
    lost: bool = False

    def blocks(self) -> list[Block]:
        """The columns that the layer's parameters own, all usages together."""
        return list(self.build(self))

    def without(self, names: frozenset[str]) -> Site | None:
        """The same place for the other parameters; None where none is left."""
        kept = {local: columns for local, columns in self.columns.items() if self.names[local] not in names}
        return replace(self, columns=kept) if kept else None


def find_builder(layer: nn.Module) -> Callable[[Site], Sequence[Block]]:
    """The cheapest builder that is right for a layer; the last resort is `vmap(vjp)` of the layer."""
    if not layer._parameters.keys() <= {"weight", "bias"} or layer._modules:
        return differentiated_blocks  # its weight is made of others (weight norm, parametrizations), or is not all
    if type(layer) is nn.Linear:
        return linear_blocks
    if is_convolution(layer) and layer.groups <= GROUPS:  # type: ignore[operator]
        return convolution_blocks
    if type(layer) is nn.Embedding and layer.max_norm is None:
        return embedding_blocks
    if is_transposed_linear(layer):
        return transposed_linear_blocks
    if isinstance(layer, _NORMS):
        return norm_blocks
    return differentiated_blocks


def shares_columns(layer: nn.Module) -> bool:
    """Whether the layer's blocks find their cross terms with another layer that has the same (tied) weight."""
    return find_builder(layer) in (linear_blocks, embedding_blocks, transposed_linear_blocks)


def is_transposed_linear(layer: nn.Module) -> bool:
    """GPT-2's Conv1D of the transformers library: x @ weight + bias with weight (d_in, d_out)."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") and getattr(layer, "weight", None) is not None


def linear_blocks(site: Site, transposed: bool = False) -> Sequence[Block]:
    """One factored block; positions are whatever lies between samples and features, and repeated usages."""
    inputs = torch.cat([_positions(usage.input, 1) for usage in site.usages], 1)
    grads = torch.cat([_positions(usage.gradient, 2) for usage in site.usages], 2)
    return [_linear(inputs, grads, site.columns.get("weight"), site.columns.get("bias"), transposed)]


def transposed_linear_blocks(site: Site) -> Sequence[Block]:
    """As `linear_blocks`, for a weight stored as (d_in, d_out)."""
    return linear_blocks(site, transposed=True)


def convolution_blocks(site: Site) -> Sequence[Block]:
    """One factored block a group, over patches."""
    layer = site.layer
    assert is_convolution(layer)
    groups: int = layer.groups  # type: ignore[assignment]
    inputs = torch.cat([patches(layer, usage.input) for usage in site.usages], 1)  # type: ignore[arg-type]
    # (N, R, channels, *space) -> (N, R, positions, groups, channels of a group)
    grads = torch.cat([usage.gradient.flatten(3).transpose(2, 3) for usage in site.usages], 2)
    grads = grads.unflatten(-1, (groups, -1))
    ranges = {name: _split(columns, groups) for name, columns in site.columns.items()}
    return [
        _linear(inputs[:, :, group], grads[..., group, :],
                ranges["weight"][group] if "weight" in ranges else None,
                ranges["bias"][group] if "bias" in ranges else None)
        for group in range(groups)
    ]  # fmt: skip


def embedding_blocks(site: Site) -> Sequence[Block]:
    """One sparse block; gradients at padding are nobody's."""
    layer = site.layer
    assert isinstance(layer, nn.Embedding)
    samples = site.usages[0].input.shape[0]
    indices = torch.cat([usage.input.reshape(samples, -1) for usage in site.usages], 1)
    grads = torch.cat([_positions(usage.gradient, 2) for usage in site.usages], 2)
    if layer.padding_idx is not None:
        grads = grads * (indices != layer.padding_idx).to(grads.dtype)[:, None, :, None]
    return [EmbeddingBlock(indices, grads, site.columns["weight"], layer.num_embeddings)]


_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)


def norm_blocks(site: Site) -> Sequence[Block]:
    """Scale and shift of a normalisation: its output is linear in both."""
    layer = site.layer
    if type(layer) not in (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return differentiated_blocks(site)
    totals: dict[str, Tensor] = {}
    for usage in site.usages:
        grad = usage.gradient
        if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
            # (N, R, *positions, *normalised)
            kept = grad.dim() - len(layer.normalized_shape)
            summed = tuple(range(2, kept))
        else:
            # (N, R, channels, *positions)
            summed = tuple(range(3, grad.dim()))
        shapes = {"weight": grad * _normalised(layer, usage.input).unsqueeze(1), "bias": grad}
        for name in site.columns:
            value = shapes[name].sum(summed) if summed else shapes[name]
            totals[name] = totals[name] + value if name in totals else value
    return [dense_block(value, site.columns[name]) for name, value in totals.items()]


def dense_block(values: Tensor, columns: Range) -> DenseBlock:
    """Materialised columns of one parameter, from derivatives of shape (N, R, *parameter), a 0-d parameter's too."""
    return DenseBlock(values.reshape(*values.shape[:2], columns[1] - columns[0]), columns)


def _normalised(layer: nn.Module, inputs: Tensor) -> Tensor:
    """What the scale of a normalisation multiplies."""
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(inputs, layer.normalized_shape, eps=layer.eps)
    if isinstance(layer, nn.RMSNorm):
        return F.rms_norm(inputs, layer.normalized_shape, eps=layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(inputs, layer.num_groups, eps=layer.eps)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    return F.batch_norm(inputs, layer.running_mean, layer.running_var, eps=layer.eps)


def differentiated_blocks(site: Site) -> Sequence[Block]:
    """Per-sample rows of any layer, by `vmap(vjp)` of the layer alone, materialised."""
    layer = site.layer
    names = tuple(site.columns)
    constants = {name: value.detach() for name, value in layer.named_parameters()}
    constants |= dict(layer.named_buffers())
    wanted = {name: constants.pop(name) for name in names}

    def pull(sample: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        def call(values: dict[str, Tensor]) -> Tensor:
            return functional_call(layer, constants | values, (sample.unsqueeze(0),)).squeeze(0)

        return vjp(call, wanted)[1](cotangent)[0]

    totals: dict[str, Tensor] = {}
    for usage in site.usages:
        with own_state(layer):
            rows = vmap(vmap(pull, (None, 0)), (0, 0))(usage.input, usage.gradient)
        totals = {name: totals[name] + rows[name] if name in totals else rows[name] for name in names}
    return [dense_block(value, site.columns[name]) for name, value in totals.items()]


def _linear(inputs: Tensor, grads: Tensor, weight: Range | None, bias: Range | None,
            transposed: bool = False) -> LinearBlock:  # fmt: skip
    if bias is not None:
        ones = torch.ones_like(inputs[..., :1])
        inputs = torch.cat([inputs, ones], -1) if weight is not None else ones
    return LinearBlock(inputs, grads, weight, bias, transposed)


def _positions(tensor: Tensor, axis: int) -> Tensor:
    """One axis of positions before the feature axis, whatever lies between the leading axes and it."""
    return tensor.flatten(axis, -2) if tensor.dim() > axis + 1 else tensor.unsqueeze(axis)


def _split(columns: Range, parts: int) -> list[Range]:
    start, stop = columns
    size = (stop - start) // parts
    return [(start + part * size, start + (part + 1) * size) for part in range(parts)]
