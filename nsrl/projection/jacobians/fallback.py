"""Columns of parameters that no layer can speak for: materialised, through the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils import _pytree as pytree

from nsrl.projection.jacobians.blocks import Block, Range
from nsrl.projection.jacobians.layers import dense_block
from nsrl.projection.jacobians.state import own_state

Forward = Callable[[nn.Module, Any], Tensor]


class BoundForward(nn.Module):
    """A module whose forward is a given function of another module: lets `functional_call` swap the parameters.

    The other module's parameters are called `module.NAME` here.
    """

    def __init__(self, module: nn.Module, forward: Forward):
        super().__init__()
        self.module = module
        self.function = forward

    def forward(self, inputs: Any) -> Tensor:
        """Outputs of the function, (N, O)."""
        return self.function(self.module, inputs)


def free_blocks(
    module: nn.Module,
    inputs: Any,
    forward: Forward,
    names: Iterable[str],
    columns: Mapping[str, Range],
    seeds: Tensor,
) -> list[Block]:
    """Dense columns of some parameters, by `vmap(vjp)` of the whole model, which sees one sample at a time."""
    bound = BoundForward(module, forward)
    parameters = dict(module.named_parameters())
    wanted = {f"module.{name}": parameters[name].detach() for name in names}

    def pull(sample: Any, cotangents: Tensor) -> dict[str, Tensor]:
        batch = pytree.tree_map(lambda leaf: leaf.unsqueeze(0), sample)

        def call(values: dict[str, Tensor]) -> Tensor:
            return functional_call(bound, values, (batch,)).squeeze(0)

        back = vjp(call, wanted)[1]
        return vmap(lambda cotangent: back(cotangent)[0])(cotangents)

    with own_state(bound):
        rows = vmap(pull)(inputs, seeds)
    return [dense_block(rows[f"module.{name}"].detach(), columns[name]) for name in names]


def row_by_row(outputs: Tensor, parameters: Sequence[Tensor], columns: Sequence[Range], seeds: Tensor) -> list[Block]:
    """Dense columns of some parameters by one backward pass a row: what autograd says, whatever the model does."""
    samples, rows = seeds.shape[:2]
    values = [outputs.new_zeros(samples, rows, parameter.numel()) for parameter in parameters]
    for sample in range(samples):
        for row in range(rows):
            cotangent = torch.zeros_like(outputs)
            cotangent[sample] = seeds[sample, row]
            grads = torch.autograd.grad(outputs, parameters, cotangent, retain_graph=True)
            for value, grad in zip(values, grads, strict=True):
                value[sample, row] = flat(grad)
    return [dense_block(value, owned) for value, owned in zip(values, columns, strict=True)]


def flat(gradient: Tensor) -> Tensor:
    """A gradient as a vector, (P,); that of a sparse embedding too."""
    return (gradient.to_dense() if gradient.layout != torch.strided else gradient).flatten()
