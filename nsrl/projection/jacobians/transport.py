"""The journey of a Jacobian's blocks: from the process that captured them to the one that owns their layer."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nsrl.projection.jacobians.blocks import Block, Range
from nsrl.projection.jacobians.capture import JacobianError
from nsrl.projection.jacobians.columns import parameter_columns
from nsrl.projection.jacobians.factored import FactoredJacobian, StackedJacobian


@dataclass(frozen=True)
class Part:
    """What the other processes have to know of a process's Jacobian: all but the numbers (its blocks are on "meta")."""

    names: tuple[str, ...]
    columns: tuple[Range, ...]
    samples: int
    rows: int
    recomputed: tuple[str, ...]
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, jacobian: FactoredJacobian, module: nn.Module) -> Part:
        """That of a process's own samples.

        Raises:
            JacobianError: the Jacobian is of another module.
        """
        columns = tuple(parameter_columns(module, jacobian.names).values())
        if columns[-1][1] != jacobian.shape[1]:
            raise JacobianError("the Jacobian has other parameters than the module; give the module it was made from")
        blocks = tuple(_with_tensors(block, lambda t: t.to("meta")) for block in jacobian.blocks)
        return cls(jacobian.names, columns, jacobian.outputs.shape[0], jacobian.shape[0], jacobian.recomputed, blocks)


def group_layers(parts: list[Part]) -> list[int]:
    """The layer of every parameter; parameters that meet in a block of any process are in one layer."""
    columns = parts[0].columns
    layers = list(range(len(columns)))
    for block in (block for part in parts for block in part.blocks):
        met = {layers[position(owned, columns)] for owned in block.owned}
        if len(met) > 1:
            layers = [min(met) if layer in met else layer for layer in layers]
    return layers


def assign_owners(parts: list[Part], layers: list[int]) -> list[int]:
    """The rank that owns each parameter: whole layers, largest first, each to the rank with the fewest numbers."""
    columns = parts[0].columns
    costs: Counter[int] = Counter()
    for layer, (start, stop) in zip(layers, columns, strict=True):
        costs[layer] += stop - start
    for block in (block for part in parts for block in part.blocks):
        costs[layers[position(block.owned[0], columns)]] += sum(t.numel() for t in _tensors(block))
    loads = [0] * len(parts)
    owner: dict[int, int] = {}
    for layer in sorted(costs, key=lambda layer: (-costs[layer], layer)):
        owner[layer] = loads.index(min(loads))
        loads[owner[layer]] += costs[layer]
    return [owner[layer] for layer in layers]


def exchange_blocks(
    own: FactoredJacobian, parts: list[Part], layers: list[int], owners: list[int], group: dist.ProcessGroup | None
) -> list[list[Block]]:
    """Send every layer's blocks to its owner; returns the blocks of this process's layers, by the rank they came from.

    Point to point, because gloo has no all-to-all.
    """
    rank = own_rank(group)
    cargo: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for source, part in enumerate(parts):
        for index, block in enumerate(part.blocks):
            cargo[layers[position(block.owned[0], part.columns)]].append((source, index))
    received: list[list[Block]] = [[] for _ in parts]
    for layer in sorted(cargo):
        owner = owners[layer]
        messages = []
        for source, index in cargo[layer]:
            if rank not in (source, owner):
                continue
            block = own.blocks[index] if source == rank else _empty(parts[source].blocks[index], own.outputs.device)
            if owner == rank:
                received[source].append(block)
            if source != owner:
                send = source == rank
                peer = owner if send else source
                peer = peer if group is None else dist.get_global_rank(group, peer)
                operation = dist.isend if send else dist.irecv
                messages += [dist.P2POp(operation, t.contiguous(), peer, group) for t in _tensors(block)]
        for message in dist.batch_isend_irecv(messages) if messages else []:
            message.wait()
    return received


def stack_ranks(
    received: list[list[Block]], parts: list[Part], names: tuple[str, ...], width: int, like: Tensor
) -> FactoredJacobian | StackedJacobian:
    """The rows of all ranks: one block a layer where the ranks' blocks are alike, else one Jacobian below the other.

    They differ where a layer was factored on one rank and dense on another, unused, or met sequences of another length.
    """
    per_sample = [part.rows // part.samples for part in parts]
    alike = [[_kind(block) for block in blocks] for blocks in received]
    if per_sample.count(per_sample[0]) == len(parts) and alike.count(alike[0]) == len(parts):
        merged = [_merged(blocks) for blocks in zip(*received, strict=True)]
        samples, rows = sum(part.samples for part in parts), sum(part.rows for part in parts)
        return FactoredJacobian(merged, (rows, width), per_sample[0], names, like.new_empty(samples, 0))
    return StackedJacobian(
        [
            FactoredJacobian(blocks, (part.rows, width), rows, names, like.new_empty(part.samples, 0))
            for blocks, part, rows in zip(received, parts, per_sample, strict=True)
        ]
    )


# A block is a dataclass whose tensors have the samples first and whose other fields do not depend on the samples.


def _tensors(block: Block) -> list[Tensor]:
    return [value for value in vars(block).values() if isinstance(value, Tensor)]


def _with_tensors(block: Block, change: Callable[[Tensor], Tensor]) -> Block:
    return _replaced(block, {name: change(v) for name, v in vars(block).items() if isinstance(v, Tensor)})


def _replaced(block: Any, changes: dict[str, Any]) -> Block:
    return replace(block, **changes)


def _empty(block: Block, device: torch.device) -> Block:
    return _with_tensors(block, lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))


def with_columns(block: Block, change: Callable[[Range], Range]) -> Block:
    """The block with other places in the flat vector."""
    ranges = {name: value for name, value in vars(block).items() if isinstance(value, tuple) and value in block.owned}
    return _replaced(block, {name: change(value) for name, value in ranges.items()})


def _kind(block: Block) -> tuple[Any, ...]:
    """What blocks have in common that can be merged: all but the number of samples."""
    return type(block), [(v.shape[1:], v.dtype) if isinstance(v, Tensor) else v for v in vars(block).values()]


def _merged(blocks: tuple[Block, ...]) -> Block:
    if len(blocks) == 1:
        return blocks[0]
    stacks = zip(*(_tensors(block) for block in blocks), strict=True)
    joined = iter([torch.cat(tensors) for tensors in stacks])
    return _with_tensors(blocks[0], lambda _: next(joined))


def shifted(columns: Range, shift: int) -> Range:
    """Columns, some places on."""
    return columns[0] + shift, columns[1] + shift


def position(columns: Range, parameters: tuple[Range, ...]) -> int:
    """Index of the parameter that the columns belong to."""
    return bisect_right(parameters, (columns[0], math.inf)) - 1


def world_size(group: dist.ProcessGroup | None) -> int:
    """Number of processes; 1 where no group was initialised."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def own_rank(group: dist.ProcessGroup | None) -> int:
    """This process's place in the group."""
    return dist.get_rank(group) if world_size(group) > 1 else 0


def gather_objects(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """The values of all processes, in rank order."""
    values: list[Any] = [value] * world_size(group)
    if len(values) > 1:
        dist.all_gather_object(values, value, group=group)
    return values
