"""Two gloo processes give what one process gives."""

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from nsrl.projection import SpectralProjection, jacobian, shard_layers, sharded_jacobian
from nsrl.projection.optimizer import FlatParameters
from tests.projection.architecture import vectors
from tests.projection.builders import jacrev_matrix, mlp, normal, project_way
from tests.projection.jacobians import sharding_worker as worker
from tests.projection.jacobians.sharding_worker import BUDGET, DTYPES, PROJECTIONS, SAMPLES
from tests.tolerances import relative

ROOT = Path(__file__).parents[3]
ARCHITECTURES = {architecture.name: architecture for architecture in worker.chosen()}
ROWS = 3 * sum(SAMPLES)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes saved."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker.work, (str(folder),), 2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Equal up to a share of the largest entry."""
    assert ours.shape == expected.shape
    assert float((ours.double() - expected.double()).abs().max()) <= tolerance * float(expected.abs().max())


def check_products(parts: list[dict[str, Any]], expected: Tensor, names: list[str]) -> None:
    """The ranks own all columns once, and every product is that of the dense matrix (k, P)."""
    owned = sorted(
        (columns, name) for part in parts for columns, name in zip(part["columns"], part["names"], strict=True)
    )
    assert [name for _, name in owned] == names
    assert [start for (start, _), _ in owned] == [0, *(stop for (_, stop), _ in owned)][:-1]
    dense = torch.full_like(expected, torch.nan)
    for part in parts:
        pieces = part["dense"].split([stop - start for start, stop in part["columns"]], 1)
        for (start, stop), piece in zip(part["columns"], pieces, strict=True):
            dense[:, start:stop] = piece
    close(dense, expected)
    vector, rows = normal(expected.shape[1], seed=5), normal(expected.shape[0], seed=6)
    for part in parts:
        assert torch.equal(part["gram"], part["gram"].T) and part["gram"].dtype == torch.float64
        close(part["gram"], expected @ expected.T)
        close(part["matvec"], expected @ vector)
        close(part["rmatvec"], expected.T @ rows)
        close(part["matmat"].squeeze(1), part["matvec"])
        close(part["rmatmat"], expected.T @ rows)
        close(part["squares"], expected.square().sum(0))
        assert torch.equal(part["rows"], rows)
        assert part["norm"] == pytest.approx(float(vector.norm()), rel=1e-12)


def trainable(module: nn.Module) -> list[str]:
    return [name for name, p in module.named_parameters() if p.requires_grad]


def test_every_chosen_architecture_exists() -> None:
    assert set(ARCHITECTURES) == worker.CHOSEN


@pytest.mark.parametrize("name", sorted(worker.CHOSEN))
def test_products_of_every_kind_of_layer(ranks: list[dict[str, Any]], name: str) -> None:
    torch.manual_seed(0)
    module = ARCHITECTURES[name].build().double()
    whole = jacobian(module, ARCHITECTURES[name].inputs(sum(SAMPLES), 2))
    check_products([rank["architectures"][name] for rank in ranks], whole.dense(), trainable(module))
    assert all(rank["architectures"][name]["recomputed"] == list(whole.recomputed) for rank in ranks)


def test_a_process_may_own_nothing(ranks: list[dict[str, Any]]) -> None:
    assert [len(rank["architectures"]["single linear"]["names"]) for rank in ranks] == [2, 0]


def test_layers_are_shared_out_evenly(ranks: list[dict[str, Any]]) -> None:
    held = [rank["architectures"]["transformer decoder layer"]["nbytes"] for rank in ranks]
    assert max(held) < 1.2 * min(held)


def round_off(whole: Any, scale: Tensor | None, damping: float, dtype: torch.dtype, solver: str) -> float:
    """What adding up in two processes changes: the products' rounding times the condition of K + lambda.

    The spectral projection makes its products in float64, whatever the factors, and rounds the result; Krylov makes
    them in the factors' format.
    """
    rows = whole.dense().double() if scale is None else whole.dense().double() * scale.double()
    values = torch.linalg.svdvals(rows).square()
    inside = math.isinf(damping)  # nothing is solved
    condition = 1.0 if inside else float((values[0] + damping) / (values[-1] + damping))
    if solver == "krylov":
        return relative(dtype, 1, condition)
    return max(relative(torch.float64, len(rows), condition), relative(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PROJECTIONS)
def test_projections_are_those_of_one_process(ranks: list[dict[str, Any]], dtype: str, case: str) -> None:
    solver, budget, metric = PROJECTIONS[case]
    given = worker.problem(DTYPES[dtype])
    inputs = vectors(sum(SAMPLES), 3).to(DTYPES[dtype])
    whole = jacobian(worker.network(DTYPES[dtype]), inputs, scale=sum(SAMPLES) ** -0.5)
    expected = worker.solve(solver, whole, given["residual"], given["scale"] if metric else None)
    result = expected.project(given["proposal"], budget)
    tolerance = round_off(whole, given["scale"] if metric else None, result.damping, DTYPES[dtype], solver)
    for rank in ranks:
        ours = rank["projections"][dtype][case]
        close(ours["displacement"], result.displacement, tolerance)
        # a sum of squares of its own size: its round-off is a share of that, and of no less than the proposal's
        assert ours["predicted"] == pytest.approx(result.predicted, abs=tolerance * max(1.0, result.predicted))
        assert ours["kept"] == pytest.approx(result.kept, rel=tolerance)
    assert torch.equal(*(rank["projections"][dtype][case]["displacement"] for rank in ranks))
    assert ranks[0]["projections"][dtype][case]["damping"] == ranks[1]["projections"][dtype][case]["damping"]


def test_one_reduction_a_refresh_and_one_a_pass(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        counted = rank["collectives"]
        assert counted["capture"] == []
        assert counted["refresh"] == [[ROWS, ROWS]]
        assert counted["inside"] == [[ROWS]]
        assert counted["projection"] == [[ROWS]] * (1 + counted["passes"])
        assert counted["krylov"] == [[ROWS]] * (2 + counted["iterations"])
        assert counted["rmatvec"] == []


UNLIKE: dict[str, Callable[[], list[Tensor]]] = {
    "dense on one rank": lambda: [
        jacobian(worker.network(), worker.share(vectors(sum(SAMPLES), 3), rank)).dense() for rank in range(2)
    ],
    "longer on one rank": lambda: [
        jacobian(worker.positions_network(), worker.sequence(rank)).dense() for rank in range(2)
    ],
    "unused on one rank": lambda: [
        jacobian(worker.gated_network(), sign * worker.share(vectors(sum(SAMPLES), 3), rank).abs()).dense()
        for rank, sign in enumerate((-1, 1))
    ],
    "more rows on one rank": lambda: [
        jacobian(worker.network(), worker.share(vectors(sum(SAMPLES), 3), rank), seed=seed).dense()
        for rank, seed in enumerate((None, worker.seeds))
    ],
}


@pytest.mark.parametrize("case", UNLIKE)
def test_ranks_may_factor_a_layer_differently(ranks: list[dict[str, Any]], case: str) -> None:
    module = {"longer": worker.positions_network, "unused": worker.gated_network}.get(case.split()[0], worker.network)()
    parts = [rank["unlike"][case] for rank in ranks]
    assert not all(part["merged"] for part in parts)
    check_products(parts, torch.cat(UNLIKE[case]()), trainable(module))


def projected_steps(optimizer_of: Callable[[list[nn.Parameter]], torch.optim.Optimizer], steps: int) -> Tensor:
    """Parameters after projected steps of one process with all samples."""
    module = worker.network()
    parameters = list(module.parameters())
    whole = jacobian(module, vectors(sum(SAMPLES), 3), scale=sum(SAMPLES) ** -0.5)
    solver = SpectralProjection(whole, torch.zeros(ROWS, dtype=torch.float64), 0.0)
    optimizer = optimizer_of(parameters)
    project_way(optimizer, parameters, lambda d: solver.project(d, BUDGET).displacement)
    for _ in range(steps):
        worker.step(module, optimizer, vectors(8, 4))
    return FlatParameters(parameters).read()


def test_distributed_data_parallel(ranks: list[dict[str, Any]]) -> None:
    expected = projected_steps(lambda p: torch.optim.Adam(p, lr=0.1), 2)
    assert float((expected - FlatParameters(list(worker.network().parameters())).read()).norm()) > 0.1
    for rank in ranks:
        close(rank["data_parallel"]["parameters"], expected, 1e-9)
        assert not any(name.startswith("module.") for name in rank["data_parallel"]["names"])


def test_fully_sharded_modules_are_refused_until_unsharded(ranks: list[dict[str, Any]]) -> None:
    module = worker.network()
    expected = jacobian(module, vectors(sum(SAMPLES), 3), scale=sum(SAMPLES) ** -0.5).dense()
    check_products([rank["fully_sharded"]["products"] for rank in ranks], expected, trainable(module))
    for rank in ranks:
        assert re.search(r"DTensor.*before fully_shard.*unshard\(\)", rank["fully_sharded"]["refused"])


def test_a_fully_sharded_step_is_projected(ranks: list[dict[str, Any]]) -> None:
    expected = projected_steps(lambda p: torch.optim.SGD(p, lr=10.0), 1)
    for rank in ranks:
        close(rank["fully_sharded"]["parameters"], expected, 1e-9)


@pytest.mark.parametrize(
    ("case", "rank", "expected"),
    [
        ("one rank diverged", 0, "JacobianError: rank 1 could not linearise its samples: .*NaN"),
        ("one rank diverged", 1, "JacobianError: the outputs have NaN"),
        ("one rank crashed", 0, "JacobianError: rank 1 could not linearise its samples: RuntimeError"),
        ("one rank crashed", 1, "RuntimeError"),
        ("other modules", 0, "JacobianError: rank 1 linearised other parameters"),
        ("other modules", 1, "JacobianError: rank 1 linearised other parameters"),
        ("another module", 0, "ValueError: .*no trainable parameter"),
        ("wider module", 0, "JacobianError: the Jacobian has other parameters than the module"),
        ("own_columns", 0, r"JacobianError: the vector must have shape \(273,\), not \(3,\)"),
        ("gather_columns", 1, r"JacobianError: the vector must have shape"),
        ("gather_rows", 1, r"JacobianError: the rows must have shape \(15,\), not \(24,\)"),
    ],
)
def test_failures_are_sentences_on_every_rank(ranks: list[dict[str, Any]], case: str, rank: int, expected: str) -> None:
    assert re.match(expected, ranks[rank]["failures"][case])


def test_one_process_without_a_group_is_a_plain_jacobian() -> None:
    module, inputs = mlp(4, 6, 3).double(), vectors(5, 3)
    sharded = sharded_jacobian(module, inputs, mean=True)
    expected = jacrev_matrix(module, inputs) / 5**0.5
    vector, rows = normal(expected.shape[1], seed=5), normal(15, seed=6)
    assert sharded.shape == expected.shape and list(sharded.names) == trainable(module)
    close(sharded.gram(), expected @ expected.T)
    close(sharded.matvec(sharded.own_columns(vector)), expected @ vector)
    close(sharded.gather_columns(sharded.rmatvec(sharded.gather_rows(rows))), expected.T @ rows)
    plain = jacobian(module, inputs)
    assert shard_layers(plain, module).local.nbytes() == plain.nbytes()


def run(*command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_torchrun_prints_what_one_process_prints(tmp_path: Path) -> None:
    script = tmp_path / "project.py"
    script.write_text(re.search(r"```python\n(.*?)```", (ROOT / "docs" / "distributed.md").read_text(), re.S)[1])
    alone = run(sys.executable, str(script))
    together = run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script))
    numbers = [[float(number) for number in re.findall(r"-?\d+\.\d+", output)] for output in (alone, together)]
    assert len(numbers[0]) == 3 and numbers[0] == pytest.approx(numbers[1], abs=1e-6)
    assert numbers[0][0] == pytest.approx(0.01, rel=1e-4)
