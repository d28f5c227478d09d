"""What each of two processes does with its share of the samples; `test_sharding` compares with one process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from nsrl.projection import (
    FactoredJacobian,
    JacobianError,
    KrylovProjection,
    ShardedJacobian,
    SpectralProjection,
    jacobian,
    shard_layers,
    sharded_jacobian,
)
from nsrl.projection.optimizer import FlatParameters
from tests.projection.architecture import Architecture, sequences, vectors
from tests.projection.architectures import ARCHITECTURES
from tests.projection.builders import Net, mlp, normal, project_way

SAMPLES = (3, 5)
BUDGET = 0.02
CHOSEN = {
    "single linear",
    "frozen weight",
    "unused layer",
    "one linear used twice",
    "weight used outside its layer",
    "tied weights",
    "weight tied to a transposed linear",
    "layer norm",
    "free parameters",
    "positions, materialised",
    "embedding",
    "language model, tied head with bias",
    "attention",
    "conv groups",
    "conv used twice",
    "lstm",
    "transformer decoder layer",
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def share(samples: Any, rank: int) -> Any:
    """Rank 0 has the first three samples, rank 1 the other five."""
    return samples[: SAMPLES[0]] if rank == 0 else samples[SAMPLES[0] :]


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Layers of unequal size, one of them without a factored form."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Sequential(nn.Linear(6, 20), nn.LayerNorm(20)), nn.Tanh(), nn.Linear(20, 3)
    ).to(dtype)


def chosen() -> list[Architecture]:
    """One of every kind of block and of every way to share a parameter."""
    return [architecture for architecture in ARCHITECTURES if architecture.name in CHOSEN]


def width(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def products(sharded: ShardedJacobian) -> dict[str, Any]:
    """Everything that can be asked of it."""
    vector, pulled = normal(sharded.total_columns, seed=5), normal(sharded.shape[0], seed=6)
    return {
        "names": list(sharded.names),
        "columns": list(sharded.columns),
        "dense": sharded.dense(),
        "gram": sharded.gram(),
        "matvec": sharded.matvec(sharded.own_columns(vector)),
        "rmatvec": sharded.gather_columns(sharded.rmatvec(pulled)),
        "matmat": sharded.matmat(sharded.own_columns(vector).unsqueeze(1)),
        "rmatmat": sharded.gather_columns(sharded.rmatmat(pulled.unsqueeze(1)).squeeze(1)),
        "squares": sharded.gather_columns(sharded.column_squares()),
        "norm": sharded.norm(sharded.own_columns(vector)),
        "rows": sharded.gather_rows(pulled.split(sharded.row_counts)[dist.get_rank()]),
        "nbytes": sharded.nbytes(),
        "recomputed": list(sharded.recomputed),
        "merged": isinstance(sharded.local, FactoredJacobian),
    }


def architectures(rank: int) -> dict[str, Any]:
    results = {}
    for architecture in chosen():
        torch.manual_seed(0)
        module = architecture.build().double()
        inputs = architecture.inputs(sum(SAMPLES), 2)
        results[architecture.name] = products(sharded_jacobian(module, share(inputs, rank)))
    return results


def projections(rank: int) -> dict[str, Any]:
    return {
        name: {case: project(rank, dtype, *case_of) for case, case_of in PROJECTIONS.items()}
        for name, dtype in DTYPES.items()
    }


PROJECTIONS: dict[str, tuple[str, float, bool]] = {
    "budget": ("spectral", BUDGET, False),
    "hard null space": ("spectral", 0.0, False),
    "inside": ("spectral", 1e6, False),
    "optimizer metric": ("spectral", BUDGET, True),
    "krylov": ("krylov", BUDGET, False),
    "krylov, optimizer metric": ("krylov", BUDGET, True),
}


def problem(dtype: torch.dtype) -> dict[str, Tensor]:
    """A proposal, a residual and a metric over all columns and rows."""
    columns = width(network())
    return {
        "proposal": normal(columns, seed=7, dtype=dtype),
        "residual": 0.1 * normal(24, seed=8, dtype=dtype),
        "scale": normal(columns, seed=9, dtype=dtype).exp(),
    }


def project(rank: int, dtype: torch.dtype, solver: str, budget: float, metric: bool) -> dict[str, Any]:
    given = problem(dtype)
    inputs = share(vectors(sum(SAMPLES), 3).to(dtype), rank)
    sharded = sharded_jacobian(network(dtype), inputs, mean=True)
    residual = sharded.gather_rows(given["residual"][:9] if rank == 0 else given["residual"][9:])
    scale = sharded.own_columns(given["scale"]) if metric else None
    proposal = sharded.own_columns(given["proposal"])
    result = solve(solver, sharded, residual, scale).project(proposal, budget)
    return {
        "displacement": sharded.gather_columns(result.displacement),
        "predicted": result.predicted,
        "damping": result.damping,
        "kept": sharded.norm(result.displacement) / sharded.norm(proposal),
    }


def solve(solver: str, jacobian: Any, residual: Tensor, scale: Tensor | None) -> SpectralProjection | KrylovProjection:
    divergence = 0.5 * float(residual.double().square().sum())
    if solver == "spectral":
        return SpectralProjection(jacobian, residual, divergence, scale)
    return KrylovProjection(jacobian, residual, divergence, scale)


def collectives(rank: int) -> dict[str, Any]:
    """Shapes of everything that is reduced, step by step."""
    sharded = sharded_jacobian(network(), share(vectors(sum(SAMPLES), 3), rank), mean=True)
    residual, proposal = torch.zeros(24, dtype=torch.float64), normal(sharded.shape[1], seed=4)
    counted: dict[str, Any] = {}
    with reductions() as counted["capture"]:
        sharded_jacobian(network(), share(vectors(sum(SAMPLES), 3), rank), mean=True)
    with reductions() as counted["refresh"]:
        solver = SpectralProjection(sharded, residual, 0.0)
    with reductions() as counted["projection"]:
        counted["passes"] = solver.project(proposal, BUDGET).iterations
    with reductions() as counted["inside"]:
        solver.project(proposal, 1e6)
    with reductions() as counted["krylov"]:
        counted["iterations"] = KrylovProjection(sharded, residual, 0.0).project(proposal, BUDGET).iterations
    with reductions() as counted["rmatvec"]:
        sharded.rmatvec(residual)
        sharded.scaled(proposal.abs())
    return counted


@contextmanager
def reductions() -> Iterator[list[list[int]]]:
    shapes: list[list[int]] = []
    real = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes.append(list(tensor.shape))
        return real(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        yield shapes
    finally:
        dist.all_reduce = real


def unlike(rank: int) -> dict[str, Any]:
    """Ranks whose blocks cannot be merged."""
    module, inputs = network(), share(vectors(sum(SAMPLES), 3), rank)
    pooled = positions_network()
    gated = gated_network()
    return {
        "dense on one rank": products(sharded_jacobian(module, inputs, dense=("2.0.weight",) if rank else ())),
        "longer on one rank": products(sharded_jacobian(pooled, sequence(rank))),
        "unused on one rank": products(sharded_jacobian(gated, inputs.abs() if rank else -inputs.abs())),
        "more rows on one rank": products(sharded_jacobian(module, inputs, seed=seeds if rank else None)),
    }


def positions_network() -> nn.Module:
    torch.manual_seed(2)
    return Net(lambda net, x: net.b(torch.tanh(net.a(x))).mean(1), a=nn.Linear(4, 5), b=nn.Linear(5, 3)).double()


def sequence(rank: int) -> Tensor:
    return share(sequences(sum(SAMPLES), 3), rank)[:, : 2 + rank]


def gated_network() -> nn.Module:
    torch.manual_seed(3)
    return Net(
        lambda net, x: net.a(x) if bool((x > 0).all()) else net.b(x), a=nn.Linear(4, 3), b=nn.Linear(4, 3)
    ).double()


def seeds(outputs: Tensor) -> Tensor:
    """Two rows a sample instead of three."""
    return normal(2, outputs.shape[1], seed=11).expand(len(outputs), -1, -1)


def step(module: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor) -> None:
    optimizer.zero_grad()
    module(inputs).square().mean().backward()
    optimizer.step()


def data_parallel(rank: int) -> dict[str, Any]:
    """Two projected steps of a DistributedDataParallel module, whose every process has all parameters."""
    module = DistributedDataParallel(network())
    states, batch = vectors(sum(SAMPLES), 3), vectors(8, 4)
    sharded = sharded_jacobian(module, share(states, rank), mean=True)
    solver = SpectralProjection(sharded, torch.zeros(24, dtype=torch.float64), 0.0)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    project_way(
        optimizer,
        list(module.parameters()),
        lambda d: sharded.gather_columns(solver.project(sharded.own_columns(d), BUDGET).displacement),
    )
    for _ in range(2):
        step(module, optimizer, batch[rank::2])
    return {"names": list(sharded.names), "parameters": FlatParameters(list(module.parameters())).read()}


def fully_sharded(rank: int) -> dict[str, Any]:
    """Refused while sharded; unsharded it is linearised, and a step of the sharded parameters is projected."""
    module = network()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(module[2], mesh=mesh)
    fully_shard(module, mesh=mesh)
    states, batch = vectors(sum(SAMPLES), 3), vectors(8, 4)
    refused = message(lambda: sharded_jacobian(module, share(states, rank)))
    keep_unsharded(module, True)
    sharded = sharded_jacobian(module, share(states, rank), mean=True)
    keep_unsharded(module, False)
    solver = SpectralProjection(sharded, torch.zeros(24, dtype=torch.float64), 0.0)
    whole = [p.full_tensor().detach().flatten() for p in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), lr=10.0)
    step(module, optimizer, batch[rank::2])
    moved = torch.cat([p.full_tensor().detach().flatten() for p in module.parameters()]) - torch.cat(whole)
    projected = sharded.gather_columns(solver.project(sharded.own_columns(moved), BUDGET).displacement)
    with torch.no_grad():
        for p, start, d in zip(module.parameters(), whole, projected.split([len(w) for w in whole]), strict=True):
            p.copy_(distribute_tensor((start + d).view(p.shape), p.device_mesh, p.placements))
    parameters = [p.full_tensor().detach().flatten() for p in module.parameters()]
    return {"refused": refused, "products": products(sharded), "parameters": torch.cat(parameters)}


def keep_unsharded(module: nn.Module, whole: bool) -> None:
    parts = [child for child in module.modules() if isinstance(child, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(not whole)
        part.set_reshard_after_backward(not whole)
    for part in parts:
        part.unshard() if whole else part.reshard()


def failures(rank: int) -> dict[str, Any]:
    """What goes wrong on one rank is raised on all."""
    inputs = share(vectors(sum(SAMPLES), 3), rank)
    broken = inputs * torch.nan if rank else inputs
    other = mlp(4, 7, 3).double() if rank else mlp(4, 6, 3).double()
    sharded = sharded_jacobian(network(), inputs)
    return {
        "one rank diverged": message(lambda: sharded_jacobian(network(), broken)),
        "one rank crashed": message(lambda: sharded_jacobian(network(), inputs[:, : 4 - rank])),
        "other modules": message(lambda: sharded_jacobian(other, inputs)),
        "another module": message(lambda: shard_layers(jacobian(network(), inputs), mlp(4, 3).double())),
        "wider module": message(lambda: shard_layers(jacobian(mlp(4, 3), inputs.float()), mlp(5, 3))),
        "own_columns": message(lambda: sharded.own_columns(torch.zeros(3))),
        "gather_columns": message(lambda: sharded.gather_columns(torch.zeros(3))),
        "gather_rows": message(lambda: sharded.gather_rows(torch.zeros(24))),
    }


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except (JacobianError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


SCENARIOS = (architectures, projections, collectives, unlike, data_parallel, fully_sharded, failures)


def work(rank: int, folder: str) -> None:
    """Run every scenario as one of two gloo processes and save what came out as FOLDER/RANK.pt."""
    torch.set_num_threads(1)
    store = (Path(folder) / "store").as_uri()
    # long enough for a machine that is busy; it only ends what would never end
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=240))
    try:
        torch.save({scenario.__name__: scenario(rank) for scenario in SCENARIOS}, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
