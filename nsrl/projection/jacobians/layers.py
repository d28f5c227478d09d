"""What each kind of layer contributes to the Jacobian, from its inputs and the gradients in its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from nsrl.projection.jacobians.blocks import Block, DenseBlock, EmbeddingBlock, LinearBlock, Range
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
        _linear(
            inputs[:, :, group],
            grads[..., group, :],
            ranges["weight"][group] if "weight" in ranges else None,
            ranges["bias"][group] if "bias" in ranges else None,
        )
        for group in range(groups)
    ]


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


def _linear(
    inputs: Tensor, grads: Tensor, weight: Range | None, bias: Range | None, transposed: bool = False
) -> LinearBlock:
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


class Projections:
    """The linear maps inside one `nn.MultiheadAttention`, as sites of their own.

    Args:
        layer: the attention module.
        columns: of its wanted parameters, by local name ("in_proj_weight", "out_proj.bias", ...).
        names: their full names in the whole module, by local name.

    Attributes:
        sites: the linear maps that were used.
        lost: full names of parameters with uses that no site has.
    """

    def __init__(self, layer: nn.MultiheadAttention, columns: Mapping[str, Range], names: Mapping[str, str]):
        self.layer = layer
        self.columns = dict(columns)
        self.names = dict(names)
        self.sites: dict[tuple[str, int, int], Site] = {}
        self.lost: set[str] = set()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Any:
        """What the module computes, with its projections made here instead of inside torch's function."""
        layer = self.layer
        if query.dim() != 3:
            self.lost.update(self.names.values())
            return type(layer).forward(
                layer, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if not layer.batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        queries, keys, values = (tensor.transpose(0, 1) for tensor in self._project(query, key, value))
        # Identity weights leave torch nothing to project: heads, masks and softmax stay its own.
        eye = torch.eye(layer.embed_dim, dtype=queries.dtype, device=queries.device)
        attended, weights = F.multi_head_attention_forward(
            queries,
            keys,
            values,
            layer.embed_dim,
            layer.num_heads,
            None,
            None,
            layer.bias_k,
            layer.bias_v,
            layer.add_zero_attn,
            layer.dropout,
            eye,
            None,
            training=layer.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=True,
            q_proj_weight=eye,
            k_proj_weight=eye,
            v_proj_weight=eye,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        out = self._linear(attended.transpose(0, 1), "out_proj.weight", "out_proj.bias", 0, layer.embed_dim)
        return (out if layer.batch_first else out.transpose(0, 1)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Query, key and value, each through its own third of the stacked projection or its own matrix."""
        width = self.layer.embed_dim
        stacked = self.layer._qkv_same_embed_dim
        return [
            self._linear(
                inputs,
                "in_proj_weight" if stacked else f"{part}_proj_weight",
                "in_proj_bias",
                index * width,
                (index + 1) * width,
            )
            for index, (part, inputs) in enumerate(zip("qkv", (query, key, value), strict=True))
        ]

    def _linear(self, inputs: Tensor, weight: str, bias: str, start: int, stop: int) -> Tensor:
        """Output features `start` to `stop` of a stacked projection, recorded."""
        matrix, shift = _parameter(self.layer, weight), _parameter(self.layer, bias)
        assert matrix is not None
        whole = matrix.shape[0] == stop - start
        output = F.linear(inputs, matrix if whole else matrix[start:stop], None if shift is None else shift[start:stop])
        columns, names = {}, {}
        if weight in self.columns:
            names["weight"] = self.names[weight]
            first, width = self.columns[weight][0], matrix.shape[1]
            offset = 0 if whole else start
            columns["weight"] = (first + offset * width, first + (offset + stop - start) * width)
        if bias in self.columns and shift is not None:
            names["bias"] = self.names[bias]
            first = self.columns[bias][0]
            columns["bias"] = (first + start, first + stop)
        if columns:
            site = self.sites.setdefault((weight, start, stop), Site(self.layer, columns, names, linear_blocks))
            site.usages.append(Usage(inputs.detach(), output, inputs._version))
        return output


@contextmanager
def shown(attentions: list[Projections]) -> Iterator[None]:
    """While the context lasts, the modules compute through `Projections.forward`."""
    own = [vars(attention.layer).get("forward") for attention in attentions]
    for attention in attentions:
        attention.layer.forward = attention.forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for attention, forward in zip(attentions, own, strict=True):
            del attention.layer.forward
            if forward is not None:
                attention.layer.forward = forward  # type: ignore[method-assign]


def _parameter(layer: nn.Module, name: str) -> Tensor | None:
    owner, _, local = name.rpartition(".")
    return getattr(layer.get_submodule(owner), local)


#: Layers whose weight multiplies patches of the input; transposed convolutions multiply patches of the output.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_convolution(layer: nn.Module) -> bool:
    """Whether `patches` knows the layer: exactly a Conv1d, Conv2d or Conv3d, not a subclass with its own forward."""
    return type(layer) in CONVOLUTIONS


def patches(layer: _ConvNd, inputs: Tensor) -> Tensor:
    """What the weight of a convolution is multiplied with.

    Any dimension, stride, dilation, padding (also "same"), padding mode and number of groups.

    Args:
        layer: a Conv1d, Conv2d or Conv3d.
        inputs: shape (N, channels, *space).

    Returns:
        Shape (N, T, groups, channels / groups * kernel): one row an output position, in the order of the flattened
        output; entries in the order of the flattened weight of one output channel.
    """
    assert not isinstance(layer, _ConvTransposeNd)
    space = len(layer.kernel_size)
    padded = _pad(layer, inputs)
    for axis, (size, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        reach = dilation * (size - 1) + 1
        padded = padded.unfold(axis, reach, stride)[..., ::dilation]
    # now (N, channels, *output space, *kernel)
    channels = inputs.shape[1] // layer.groups
    split = padded.unflatten(1, (layer.groups, channels))
    order = [0, *range(3, 3 + space), 1, 2, *range(3 + space, 3 + 2 * space)]
    split = split.permute(order)
    return split.flatten(space + 2).flatten(1, space)


def _pad(layer: _ConvNd, inputs: Tensor) -> Tensor:
    if layer.padding_mode != "zeros":
        # What torch itself pads with in the other modes, last axis first.
        return F.pad(inputs, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    if layer.padding == "valid":
        return inputs
    if layer.padding == "same":
        sides: list[int] = []
        for size, dilation in zip(reversed(layer.kernel_size), reversed(layer.dilation), strict=True):
            total = dilation * (size - 1)
            sides += [total // 2, total - total // 2]
        return F.pad(inputs, sides)
    return F.pad(inputs, _both_sides(layer.padding))  # type: ignore[arg-type]


def _both_sides(padding: Sequence[int]) -> list[int]:
    return [side for axis in reversed(padding) for side in (axis, axis)]
