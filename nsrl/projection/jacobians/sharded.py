"""Scale-out: samples sharded for capture, layers sharded for everything after it.

Every process of a `torch.distributed` group linearises its own samples; then each layer's factors travel to one owner,
which from there on holds all samples of some layers. With J = [J_1 ... J_W] split by columns,

    J v   = sum_w J_w v_w       one all-reduce of a k-vector
    J^T u = (J_1^T u, ...)      local
    J J^T = sum_w J_w J_w^T     one all-reduce of a k x k matrix

so a solver written for the `Jacobian` protocol runs on every process unchanged, each on its own columns. Because the
reduced numbers are the same bits everywhere, so are all decisions of the solvers (damping, passes): call them on every
process, with the same residual and budget.
"""

from __future__ import annotations

from copy import copy
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nsrl.projection.jacobians.blocks import Range
from nsrl.projection.jacobians.capture import JacobianError
from nsrl.projection.jacobians.factored import FactoredJacobian, StackedJacobian
from nsrl.projection.jacobians.linearise import jacobian
from nsrl.projection.jacobians.transport import (
    Part,
    assign_owners,
    exchange_blocks,
    gather_objects,
    group_layers,
    own_rank,
    position,
    shifted,
    stack_ranks,
    with_columns,
    world_size,
)


class ShardedJacobian:
    """The columns of one process, all rows; satisfies the `Jacobian` protocol over these columns.

    Rows are in rank order: all rows of rank 0's samples, then rank 1's. Norms that a solver takes of columns are
    local: `Projection.kept` is this process's share; that of the whole update is `norm(displacement) / norm(proposal)`.

    Attributes:
        shape: (k, columns of this process); k counts the rows of all processes.
        names: the parameters that own the columns here, in `named_parameters()` order.
        columns: their start and stop in the whole flat vector.
        total_columns: P, over all processes.
        row_counts: rows of every rank's samples, in rank order.
        outputs: the module's outputs at this process's own samples, (N of this process, O), detached.
        local: these columns as an ordinary Jacobian; none of its methods communicates.
        recomputed: parameters whose factors disagreed with autograd on any process.
    """

    recomputed: tuple[str, ...] = ()

    def __init__(
        self,
        local: FactoredJacobian | StackedJacobian,
        outputs: Tensor,
        names: tuple[str, ...],
        columns: tuple[Range, ...],
        total_columns: int,
        row_counts: tuple[int, ...],
        group: dist.ProcessGroup | None = None,
    ):
        self.local = local
        self.outputs = outputs
        self.shape: tuple[int, int] = local.shape
        self.names = names
        self.columns = columns
        self.total_columns = total_columns
        self.row_counts = row_counts
        self._group = group

    def matvec(self, vector: Tensor) -> Tensor:
        """J v, shape (k,), from this process's columns of v: one all-reduce of k numbers."""
        return self._summed(self.local.matvec(vector))

    def rmatvec(self, rows: Tensor) -> Tensor:
        """This process's columns of J^T u, for u of shape (k,), the same on every process. No communication."""
        return self.local.rmatvec(rows)

    def matmat(self, vectors: Tensor) -> Tensor:
        """J V, shape (k, c), from this process's columns of V: one all-reduce."""
        return self._summed(self.local.matmat(vectors))

    def rmatmat(self, rows: Tensor) -> Tensor:
        """This process's columns of J^T U, for U of shape (k, c). No communication."""
        return self.local.rmatmat(rows)

    def gram(self, precision: torch.dtype = torch.float64) -> Tensor:
        """K = J J^T over all columns, shape (k, k), on every process: one all-reduce."""
        return self._summed(self.local.gram(precision))

    def column_squares(self) -> Tensor:
        """This process's columns of the diagonal of J^T J, (own columns,) float64. No communication."""
        return self.local.column_squares()

    def dense(self) -> Tensor:
        """This process's columns of the materialised Jacobian, shape (k, local columns)."""
        return self.local.dense()

    def scaled(self, scale: Tensor) -> tuple[ShardedJacobian, Tensor]:
        """As `FactoredJacobian.scaled`, for this process's columns of the scale. No communication."""
        local, fitted = self.local.scaled(scale)
        scaled = copy(self)
        scaled.local = local
        return scaled, fitted

    def own_columns(self, vector: Tensor) -> Tensor:
        """This process's columns of a whole flat vector (P,).

        Raises:
            JacobianError: it has another shape.
        """
        if vector.shape != (self.total_columns,):
            raise JacobianError(f"the vector must have shape ({self.total_columns},), not {tuple(vector.shape)}")
        return torch.cat([vector[slice(*columns)] for columns in self.columns]) if self.columns else vector[:0]

    def gather_columns(self, vector: Tensor) -> Tensor:
        """The whole flat vector (P,) on every process, from each process's columns: one all-reduce of P numbers.

        Raises:
            JacobianError: the vector is not of this process's columns.
        """
        if vector.shape != (self.shape[1],):
            raise JacobianError(f"the vector must have shape ({self.shape[1]},), not {tuple(vector.shape)}")
        whole = vector.new_zeros(self.total_columns)
        for (start, stop), piece in zip(self.columns, vector.split(_widths(self.columns)), strict=True):
            whole[start:stop] = piece
        return self._summed(whole)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """All rows (k,) on every process, from one entry a row of each process's own samples: one all-reduce.

        Raises:
            JacobianError: the rows are not those of this process's samples.
        """
        rank = own_rank(self._group)
        if rows.shape != (self.row_counts[rank],):
            raise JacobianError(f"the rows must have shape ({self.row_counts[rank]},), not {tuple(rows.shape)}")
        start = sum(self.row_counts[:rank])
        whole = rows.new_zeros(self.shape[0])
        whole[start : start + len(rows)] = rows
        return self._summed(whole)

    def norm(self, vector: Tensor) -> float:
        """Euclidean norm over all processes of a vector split like the columns: one all-reduce of a number."""
        return float(self._summed(vector.double().square().sum()).sqrt())

    def nbytes(self) -> int:
        """Memory held by this process's factors, in bytes."""
        return self.local.nbytes()

    def _summed(self, tensor: Tensor) -> Tensor:
        if world_size(self._group) > 1:
            dist.all_reduce(tensor, group=self._group)
        return tensor


def sharded_jacobian(
    module: nn.Module, inputs: Any, *, mean: bool = False, group: dist.ProcessGroup | None = None, **capture: Any
) -> ShardedJacobian:
    """Linearise this process's samples and share the layers out; the processes of the group call this together.

    Args:
        module: the same on every process; a DistributedDataParallel is unwrapped, and parameter names are those of the
            module inside.
        inputs: this process's samples; their number may differ between processes.
        mean: multiply all rows by 1 / sqrt(N), N the samples of all processes, so that the Gram is a mean over samples.
        group: processes to share with; default all. Without an initialised process group there is one process.
        capture: `forward`, `parameters`, `seed`, `scale` and the other arguments of `jacobian`. A `scale` must be
            made with the number of samples of all processes.

    Raises:
        JacobianError: on every process, when the capture fails on any; sharded (FSDP2) parameters; different modules.
    """
    module = _unwrapped(module)
    own: FactoredJacobian | None = None
    failure: Exception | None = None
    try:
        own = jacobian(module, inputs, **capture)
    except Exception as error:  # the other processes wait in the next collective and have to be told
        failure = error
    samples = 0 if own is None else own.outputs.shape[0]
    reports = gather_objects((samples, failure and f"{type(failure).__name__}: {failure}"), group)
    if failure is not None:
        raise failure
    for rank, (_, message) in enumerate(reports):
        if message:
            raise JacobianError(f"rank {rank} could not linearise its samples: {message}")
    assert own is not None
    if mean:
        factor = sum(count for count, _ in reports) ** -0.5
        blocks = [block.multiplied(factor) for block in own.blocks]
        recomputed = own.recomputed
        own = FactoredJacobian(blocks, own.shape, own.shape[0] // samples, own.names, own.outputs)
        own.recomputed = recomputed
    return shard_layers(own, module, group)


def shard_layers(
    jacobian: FactoredJacobian, module: nn.Module, group: dist.ProcessGroup | None = None
) -> ShardedJacobian:
    """Turn Jacobians of each process's own samples into one of all samples, its layers shared out over the processes.

    Layers go, largest first, to the process that has least to hold so far; a layer is never split. They travel one by
    one: on top of its own samples' factors and those of the layers it owns, a process holds one layer at a time.

    Args:
        jacobian: this process's rows; all processes use the same parameters.
        module: what was linearised.
        group: as for `sharded_jacobian`.

    Raises:
        JacobianError: on every process, when their parameters differ; sharded (FSDP2) parameters.
        ValueError: the Jacobian's names are not those of the module.
    """
    parts = gather_objects(Part.of(jacobian, _unwrapped(module)), group)
    names, columns = parts[0].names, parts[0].columns
    for rank, part in enumerate(parts):
        if (part.names, part.columns) != (names, columns):
            raise JacobianError(f"rank {rank} linearised other parameters than rank 0; give every rank the same module")
    layers = group_layers(parts)
    owners = assign_owners(parts, layers)
    mine = [index for index, owner in enumerate(owners) if owner == own_rank(group)]
    starts = list(accumulate((columns[index][1] - columns[index][0] for index in mine), initial=0))
    shifts = {index: start - columns[index][0] for index, start in zip(mine, starts, strict=False)}
    received = [
        [with_columns(block, lambda owned: shifted(owned, shifts[position(owned, columns)])) for block in blocks]
        for blocks in exchange_blocks(jacobian, parts, layers, owners, group)
    ]
    own_names = tuple(names[index] for index in mine)
    local = stack_ranks(received, parts, own_names, starts[-1], jacobian.outputs)
    own_columns = tuple(columns[index] for index in mine)
    row_counts = tuple(part.rows for part in parts)
    result = ShardedJacobian(local, jacobian.outputs, own_names, own_columns, columns[-1][1], row_counts, group)
    result.recomputed = tuple(sorted({name for part in parts for name in part.recomputed}))
    return result


def _unwrapped(module: nn.Module) -> nn.Module:
    if isinstance(module, DistributedDataParallel):
        module = module.module
    if any(hasattr(parameter, "full_tensor") for parameter in module.parameters()):
        raise JacobianError(
            "the module's parameters are sharded (DTensor): linearise it before fully_shard, or call "
            "set_reshard_after_forward(False), set_reshard_after_backward(False) and unshard() of every "
            "fully_shard-ed submodule first (docs/distributed.md)"
        )
    return module


def _widths(columns: tuple[Range, ...]) -> list[int]:
    return [stop - start for start, stop in columns]
