"""Passes through a chain of linear layers again and again, in memory that is taken once.

`LayerPasses` allocates, slices and looks up at every batch, which on a small critic's minibatches takes as long as the
matrix products. What is computed is the same here, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nsrl.projection.jacobians.matrix_free import ACTIVATIONS, Activation, Stage

Call = Callable[[], Any]


class ChainWorkspace:
    """What `LayerPasses` computes, of one batch after the other; autograd is to be off around its passes.

    Weights are read where they lie at the time of each pass: they may be moved meanwhile, but not replaced.

    Args:
        stages: a chain as `linear_chain` makes it.
        parameters: those to differentiate in.
        rows: of the largest batch.
        gradients: where to write them, one contiguous tensor a parameter; None for new ones.

    Attributes:
        gradients: one tensor a parameter, of its shape, which passes backwards write into.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        parameters: Sequence[nn.Parameter],
        rows: int,
        gradients: Sequence[Tensor] | None = None,
    ):
        like = stages[0].layer.weight.detach()
        self.gradients = list(gradients or (torch.zeros_like(parameter) for parameter in parameters))
        self._stages = stages
        self._values = [like.new_empty(rows, stage.layer.out_features) for stage in stages]
        self._cotangents = [torch.empty_like(values) for values in self._values]
        self._batches: dict[int, ChainBatch] = {}

    def batch(self, rows: int) -> ChainBatch:
        """The passes of batches of so many rows, no more than the largest; all write over the same memory."""
        if rows not in self._batches:
            values, cotangents = ([whole[:rows] for whole in kind] for kind in (self._values, self._cotangents))
            self._batches[rows] = ChainBatch(self._stages, values, cotangents, self.gradients)
        return self._batches[rows]


class ChainBatch:
    """Passes of so many rows, every view of every tensor made beforehand.

    Args:
        stages: of the chain.
        values: where each of them writes what it returns, (n, width).
        cotangents: where what goes back through it begins, (n, width).
        gradients: by position.

    Attributes:
        cotangents: memory for the u of `pull`, shape (n, O), which writes over it.
    """

    def __init__(
        self, stages: Sequence[Stage], values: Sequence[Tensor], cotangents: Sequence[Tensor], gradients: list[Tensor]
    ):
        self.cotangents = cotangents[-1]
        self._pushes = [
            (_affine(stage.layer, out), _in_place(stage.activation, out), out)
            for stage, out in zip(stages, values, strict=True)
        ]
        moved = [number for number, stage in enumerate(stages) if stage.weight is not None or stage.bias is not None]
        lowest = min(moved, default=len(stages))
        self._pulls = [
            _Pull.of(
                stages[number],
                None if number == 0 else values[number - 1],
                values[number],
                cotangents[number],
                None if number == lowest else cotangents[number - 1],
                gradients,
            )
            for number in reversed(range(lowest, len(stages)))
        ]

    def push(self, inputs: Tensor) -> Tensor:
        """Outputs, shape (n, O), for inputs (n, d); the next call writes over them."""
        for affine, activate, out in self._pushes:
            affine(inputs)
            if activate is not None:
                activate()
            inputs = out
        return inputs

    def pull(self, inputs: Tensor) -> None:
        """J^T u into the workspace's gradients, of what `cotangents` was filled with.

        Args:
            inputs: those that were pushed last, shape (n, d).
        """
        for stage in self._pulls:
            if stage.slope is not None:
                stage.slope()
            if stage.weight is not None:
                torch.mm(stage.turned, inputs if stage.below is None else stage.below, out=stage.weight)
            if stage.bias is not None:
                torch.sum(stage.cotangents, 0, out=stage.bias)
            if stage.on is not None:
                stage.on()


@dataclass(frozen=True, eq=False)
class _Pull:
    """A stage's part of a backward pass.

    Attributes:
        slope: multiplies the cotangents with the activation's derivative.
        cotangents: (n, width).
        turned: the same, (width, n).
        below: inputs of the stage, (n, d); None for those of the chain.
        weight, bias: gradients; None where nothing is wanted.
        on: makes the cotangents of the stage below.
    """

    slope: Call | None
    cotangents: Tensor
    turned: Tensor
    below: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    on: Call | None

    @classmethod
    def of(
        cls,
        stage: Stage,
        below: Tensor | None,
        values: Tensor,
        cotangents: Tensor,
        following: Tensor | None,
        gradients: list[Tensor],
    ) -> _Pull:
        activation, weight = stage.activation, stage.layer.weight.detach()
        return cls(
            None if activation is None else partial(activation.slope_into, cotangents, values, cotangents),
            cotangents,
            cotangents.T,
            below,
            None if stage.weight is None else gradients[stage.weight],
            None if stage.bias is None else gradients[stage.bias],
            None if following is None else partial(torch.mm, cotangents, weight, out=following),
        )


def _affine(layer: nn.Linear, out: Tensor) -> Callable[[Tensor], Any]:
    """Writes what a layer makes of inputs."""
    weight = layer.weight.detach().T
    if layer.bias is None:
        return lambda inputs: torch.mm(inputs, weight, out=out)
    bias = layer.bias.detach()
    return lambda inputs: torch.addmm(bias, inputs, weight, out=out)


def _in_place(activation: Activation | None, values: Tensor) -> Call | None:
    if activation is None:
        return None
    if activation is ACTIVATIONS[nn.Tanh] and values.device.type == "cpu":
        array = values.numpy()  # which `apply` would ask for at every call
        return partial(np.tanh, array, array)
    return partial(activation.apply, values)
