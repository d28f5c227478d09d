"""The same Jacobian with other factors: some of its samples only, or all of them in float64.

The tensors of a block have the samples in front, whatever the block; nothing else has to be known of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nsrl.projection.jacobians.factored import FactoredJacobian, Jacobian, StackedJacobian
from nsrl.projection.jacobians.sharded import ShardedJacobian
from nsrl.projection.solvers.plan import CHUNK


def is_whole(jacobian: Jacobian) -> bool:
    """Whether the factors of all columns are here, so that rows can be formed and J^T J is known."""
    return isinstance(jacobian, FactoredJacobian | StackedJacobian)


def storage(jacobian: Jacobian) -> tuple[torch.dtype, torch.device]:
    """Precision and place of the factors."""
    held: Any = jacobian.local if isinstance(jacobian, ShardedJacobian) else jacobian
    held = held.parts[0] if isinstance(held, StackedJacobian) else held
    numbers = held.outputs if isinstance(held, FactoredJacobian) else held.rmatvec(torch.zeros(held.shape[0]))
    return numbers.dtype, numbers.device


def doubled(jacobian: Jacobian) -> Jacobian:
    """The Jacobian with its factors in float64, so that products have float64 round-off, for twice the memory."""
    if isinstance(jacobian, ShardedJacobian):
        result = copy.copy(jacobian)
        result.local = _each(jacobian.local, _double)
        return result
    return _each(jacobian, _double) if isinstance(jacobian, FactoredJacobian | StackedJacobian) else jacobian


def row_chunks(jacobian: Jacobian, entries: int = CHUNK) -> Iterator[Tensor]:
    """The rows of J in order, some at a time.

    Args:
        jacobian: a `FactoredJacobian` or `StackedJacobian`.
        entries: how many numbers a chunk may hold (never less than the rows of one sample).

    Yields:
        Dense rows, shape (c, P), float64.

    Raises:
        ValueError: another kind of Jacobian.
    """
    for part in jacobian.parts if isinstance(jacobian, StackedJacobian) else (jacobian,):
        if not isinstance(part, FactoredJacobian):
            raise ValueError(f"a {type(part).__name__} does not hold the factors of all columns; solve it by 'dual'")
        samples = part.outputs.shape[0]
        step = max(1, entries * samples // max(1, part.shape[0] * part.shape[1]))
        for start in range(0, samples, step):
            yield _mapped(part, partial(_some, start=start, stop=start + step)).dense().double()


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _some(tensor: Tensor, start: int, stop: int) -> Tensor:
    return tensor[start:stop]


def _each(jacobian: FactoredJacobian | StackedJacobian, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(jacobian, StackedJacobian):
        return StackedJacobian([_mapped(part, change) for part in jacobian.parts])
    return _mapped(jacobian, change)


def _mapped(jacobian: FactoredJacobian, change: Callable[[Tensor], Tensor]) -> FactoredJacobian:
    outputs = change(jacobian.outputs)
    per_sample = jacobian.shape[0] // max(1, jacobian.outputs.shape[0])
    blocks: list[Any] = []
    for block in jacobian.blocks:
        held: Any = block
        values = {field.name: getattr(held, field.name) for field in fields(held)}
        blocks.append(replace(held, **{name: change(v) for name, v in values.items() if isinstance(v, Tensor)}))
    shape = (outputs.shape[0] * per_sample, jacobian.shape[1])
    return FactoredJacobian(blocks, shape, per_sample, jacobian.names, outputs)
