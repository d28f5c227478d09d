"""`nn.MultiheadAttention` keeps its projections out of reach of hooks: while the Jacobian is captured, show them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsrl.projection.jacobians.blocks import Range
from nsrl.projection.jacobians.layers import Site, Usage, linear_blocks


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

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
                need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
                is_causal: bool = False) -> Any:  # fmt: skip
        """What the module computes, with its projections made here instead of inside torch's function."""
        layer = self.layer
        if query.dim() != 3:
            self.lost.update(self.names.values())
            return type(layer).forward(layer, query, key, value, key_padding_mask, need_weights, attn_mask,
                                       average_attn_weights, is_causal)  # fmt: skip
        if not layer.batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        queries, keys, values = (tensor.transpose(0, 1) for tensor in self._project(query, key, value))
        # Identity weights leave torch nothing to project: heads, masks and softmax stay its own.
        eye = torch.eye(layer.embed_dim, dtype=queries.dtype, device=queries.device)
        attended, weights = F.multi_head_attention_forward(
            queries, keys, values, layer.embed_dim, layer.num_heads, None, None, layer.bias_k, layer.bias_v,
            layer.add_zero_attn, layer.dropout, eye, None, training=layer.training, key_padding_mask=key_padding_mask,
            need_weights=need_weights, attn_mask=attn_mask, use_separate_proj_weight=True, q_proj_weight=eye,
            k_proj_weight=eye, v_proj_weight=eye, average_attn_weights=average_attn_weights, is_causal=is_causal,
        )  # fmt: skip
        out = self._linear(attended.transpose(0, 1), "out_proj.weight", "out_proj.bias", 0, layer.embed_dim)
        return (out if layer.batch_first else out.transpose(0, 1)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Query, key and value, each through its own third of the stacked projection or its own matrix."""
        width = self.layer.embed_dim
        stacked = self.layer._qkv_same_embed_dim
        return [
            self._linear(inputs, "in_proj_weight" if stacked else f"{part}_proj_weight", "in_proj_bias",
                         index * width, (index + 1) * width)
            for index, (part, inputs) in enumerate(zip("qkv", (query, key, value), strict=True))
        ]  # fmt: skip

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
