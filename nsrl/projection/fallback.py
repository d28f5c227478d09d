"""Columns of parameters that no layer can speak for: materialised, through the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from nsrl.projection.blocks import Block, DenseBlock, Range

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


@contextmanager
def own_parameters(module: nn.Module) -> Iterator[None]:
    """After the block every submodule has the parameters that it had before, whatever `functional_call` did.

    It leaves its substitutes behind in submodules that have two names (torch 2.13), as every SB3 policy's features
    extractor has.
    """
    held = [(owner, dict(owner._parameters)) for owner in module.modules()]
    try:
        yield
    finally:
        for owner, own in held:
            owner._parameters.clear()
            owner._parameters.update(own)


def free_blocks(
    module: nn.Module,
    inputs: Any,
    forward: Forward,
    names: list[str],
    columns: Mapping[str, Range],
    seeds: Tensor,
) -> list[Block]:
    """Dense columns for parameters that no hook covers, by `vmap(vjp)` of the whole model."""
    bound = BoundForward(module, forward)
    parameters = dict(module.named_parameters())
    wanted = {f"module.{name}": parameters[name].detach() for name in names}

    def pull(sample: Any, cotangents: Tensor) -> dict[str, Tensor]:
        batch = torch.utils._pytree.tree_map(lambda leaf: leaf.unsqueeze(0), sample)

        def call(values: dict[str, Tensor]) -> Tensor:
            return functional_call(bound, values, (batch,)).squeeze(0)

        back = vjp(call, wanted)[1]
        return vmap(lambda cotangent: back(cotangent)[0])(cotangents)

    with own_parameters(bound):
        rows = vmap(pull)(inputs, seeds)
    return [
        DenseBlock(rows[f"module.{name}"].detach().flatten(2), columns[name])
        for name in names
        if bool(rows[f"module.{name}"].any())
    ]


def row_by_row(
    module: nn.Module, outputs: Tensor, names: list[str], columns: Mapping[str, Range], seeds: Tensor
) -> list[Block]:
    """Dense columns by one backward pass a row: for recurrent layers and whatever else vmap cannot follow."""
    parameters = dict(module.named_parameters())
    wanted = [parameters[name] for name in names]
    samples, rows = seeds.shape[:2]
    values = [outputs.new_zeros(samples, rows, parameter.numel()) for parameter in wanted]
    for sample in range(samples):
        for row in range(rows):
            cotangent = torch.zeros_like(outputs)
            cotangent[sample] = seeds[sample, row]
            grads = torch.autograd.grad(outputs, wanted, cotangent, retain_graph=True)
            for value, grad in zip(values, grads, strict=True):
                value[sample, row] = grad.flatten()
    return [DenseBlock(value, columns[name]) for name, value in zip(names, values, strict=True)]
