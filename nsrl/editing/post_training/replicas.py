"""Several processes that train one model: what the guard understands of their wrappers, and what it refuses."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nsrl.errors import NsrlError
from nsrl.projection.optimizer import FlatParameters

REMEDY = (
    "a guard needs every parameter whole: train with DistributedDataParallel, or protect LoRA adapters that are left "
    "unsharded (fully_shard the base layers only)"
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile."""
    parallel = nn.parallel.DistributedDataParallel | nn.DataParallel
    while True:
        inner: Any = getattr(model, "module" if isinstance(model, parallel) else "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def refuse_sharded(model: nn.Module) -> None:
    """Raise NsrlError where trainable parameters lie in pieces on several processes.

    Raises:
        NsrlError: naming one, and what to do.
    """
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        kind = type(p.data).__name__
        if kind == "DTensor" or type(p).__name__ == "DTensor":
            raise NsrlError(f"{name} is sharded by FSDP2 or tensor parallelism (a DTensor); {REMEDY}")
        if type(p).__name__ == "FlatParameter" or hasattr(p, "_is_flat_param"):
            raise NsrlError(f"{name} is a flat parameter of FSDP; {REMEDY}")
        if hasattr(p, "ds_id"):
            raise NsrlError(f"{name} is partitioned by DeepSpeed ZeRO; {REMEDY}, or use ZeRO stage 1")
        if p.is_meta:
            raise NsrlError(f"{name} has no values yet (meta device); load the weights before the module is protected")


class Replicas:
    """Processes that hold the same model and preserve the same tokens; one process where there is no wrapper.

    Args:
        model: as the loop calls it.
    """

    def __init__(self, model: nn.Module):
        parallel = isinstance(model, nn.parallel.DistributedDataParallel)
        self.group: Any = model.process_group if parallel else None

    def largest(self, value: float) -> float:
        """The largest over the processes, so that all decide alike; NaN counts as infinite."""
        value = value if value == value else float("inf")
        if self.group is None:
            return value
        device = "cuda" if torch.distributed.get_backend(self.group) == "nccl" else "cpu"
        held = torch.tensor(value, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(held, torch.distributed.ReduceOp.MAX, group=self.group)
        return float(held)

    def share(self, flat: FlatParameters) -> None:
        """Everybody takes the parameters of the first process: kernels that add in another order may differ."""
        if self.group is not None:
            source = torch.distributed.get_global_rank(self.group, 0)
            for p in flat.parameters:
                torch.distributed.broadcast(p.data, source, group=self.group)
