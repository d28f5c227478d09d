"""Several processes: data-parallel replicas stay alike and inside the budget; sharded parameters are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nsrl.editing.guard import protect_module
from nsrl.errors import NsrlError
from tests.editing.tiny_lm import TinyLM, batches, loss


def replica(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(TinyLM())
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    guard = protect_module(model, optimizer, batches(), 0.01, measure_every=4, project_every=2)
    for step in range(10):
        optimizer.zero_grad()
        loss(model, batches(1, seed=10 * step + rank, padded=False)[0]).backward()  # other data on each
        optimizer.step()
    report = guard.finish()
    torch.save({"model": model.module.state_dict(), "kl": report.kl_mean}, f"{folder}/{rank}.pt")
    # the model's reducer holds the group: let go of it together, or the process may end before its threads do
    del guard, optimizer, model
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_replicas_stay_alike_and_inside(tmp_path) -> None:
    torch.multiprocessing.spawn(replica, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(value, second["model"][name]) for name, value in first["model"].items())
    assert first["kl"] == second["kl"] and 1e-5 < first["kl"] <= 0.01


def test_wrappers_are_looked_through() -> None:
    model = TinyLM()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert protect_module(nn.DataParallel(model), optimizer, batches()).model is model


class DTensor(torch.Tensor):
    """As FSDP2 leaves parameters, by name."""


def test_sharded_parameters_are_refused_with_the_remedy() -> None:
    model = TinyLM()
    sharded, partitioned, empty = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model).to("meta")
    sharded.norm.weight = nn.Parameter(torch.ones(16).as_subclass(DTensor))
    partitioned.norm.weight.ds_id = 3
    for wrong, told in ((sharded, "FSDP2"), (partitioned, "ZeRO"), (empty, "meta device")):
        with pytest.raises(NsrlError, match=told):
            protect_module(wrong, torch.optim.SGD(wrong.parameters(), 0.1), batches())
