"""Post-training a tiny language model on something new: old knowledge kept against what is learnt, all methods alike.

    nsrl bench post_training

Every method gets the same model, the same preserved sentences (every old fact in one of its two wordings), the same new
data and as many steps and tokens of both. A run is a line of JSON in runs/reference/post_training/runs.jsonl: what is
there is not run again.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsrl.bench.studies.lines import run_missing
from nsrl.bench.studies.post_training_tasks import (
    PEOPLE,
    TASKS,
    Task,
    World,
    cross_entropy,
    known,
    pretrain,
    tiny_model,
)
from nsrl.bench.suites.jobs import Status
from nsrl.editing.guard import protect_module
from nsrl.editing.post_training.preserved import Preserved
from nsrl.errors import NsrlError
from nsrl.runs.machine import describe_environment

#: Batches of preserved sentences, and sentences of each.
BATCHES, SENTENCES = 6, 24
EPOCHS = 140
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Method:
    """How the new task is learnt.

    Attributes:
        kind: "plain", "l2", "ewc", "replay", "kl", "lora" or "guard".
        grid: coefficients that are tried; the best is taken for each task, with its hindsight.
        options: of the guard.
    """

    kind: str
    grid: tuple[float, ...] = (1.0,)
    options: dict[str, Any] = field(default_factory=dict)


#: One setting of ours for all tasks: its budget is what a user states, not what is tuned.
METHODS: dict[str, Method] = {
    "plain": Method("plain"),
    "ours": Method("guard", options={"kl_budget": 0.02, "energy": 0.5, "measure_every": 25}),
    "ours, gradient only": Method("guard", options={"kl_budget": 0.02, "constraint": "none", "measure_every": 25}),
    "KL to reference": Method("kl", (1.0, 3.0, 10.0)),
    "replay": Method("replay", (1.0, 3.0)),
    "EWC": Method("ewc", (100.0, 1000.0)),
    "L2": Method("l2", (0.1, 1.0)),
    "LoRA": Method("lora", (8.0,)),
}


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        task: name of the task.
        method: name of the method.
        coefficient: one of its grid; the rank of LoRA.
        seed: of world, model and data.
    """

    task: str
    method: str
    coefficient: float
    seed: int

    @property
    def name(self) -> str:
        """Unique among the cells."""
        return f"{self.task}/{self.method} {self.coefficient:g}/{self.seed}"


def plan_cells(only: Sequence[str] = (), quick: bool = False) -> list[Cell]:
    """All runs; seeds outermost, so that a study that is stopped early is balanced.

    Args:
        only: names of tasks and methods; none of a kind means all of it.
        quick: one seed, and one coefficient of each.

    Raises:
        NsrlError: an unknown name.
    """
    unknown = [name for name in only if name not in TASKS and name not in METHODS]
    if unknown:
        raise NsrlError(f"there is no task or method {unknown[0]!r}; there are {', '.join([*TASKS, *METHODS])}")
    tasks = [name for name in TASKS if name in only] or list(TASKS)
    methods = [name for name in METHODS if name in only] or list(METHODS)
    return [
        Cell(task, method, coefficient, seed)
        for seed in SEEDS[: 1 if quick else None]
        for task in tasks
        for method in methods
        for coefficient in METHODS[method].grid[: 1 if quick else None]
    ]


@dataclass(frozen=True)
class Start:
    """What all runs of a seed begin with.

    Attributes:
        world: facts.
        model: that knows the old ones.
        preserved: batches of old sentences that the methods may use.
        knew: which old facts it answers rightly, wording by wording.
    """

    world: World
    model: Any
    preserved: list[Tensor]
    knew: Tensor


@lru_cache(maxsize=4)
def begin(seed: int, epochs: int = EPOCHS) -> Start:
    """Make the world and the model that knows it."""
    world = World.generated(seed)
    model = tiny_model(world, seed)
    pretrain(model, world, seed, epochs)
    first, second = (world.sentences(range(PEOPLE), [wording]) for wording in (0, 1))
    generator = torch.Generator().manual_seed(seed + 100)
    told = torch.where(torch.rand(len(first), 1, generator=generator) < 0.5, first, second)
    parts = told[torch.randperm(len(told), generator=generator)[: BATCHES * SENTENCES]].split(SENTENCES)
    return Start(world, model, list(parts), _knows(model, world))


def run_cell(cell: Cell, quick: bool = False) -> dict[str, Any]:
    """One run, in this process.

    Args:
        cell: the run.
        quick: few steps, whose numbers mean nothing.
    """
    start = begin(cell.seed, 2 if quick else EPOCHS)
    task, method = TASKS[cell.task], METHODS[cell.method]
    model = copy.deepcopy(start.model)
    drift = Preserved(model, [start.world.sentences(range(PEOPLE))[:, :-1]])
    before = task.score(model, start.world)
    trained = _with_adapters(model, int(cell.coefficient)) if method.kind == "lora" else model
    optimizer = torch.optim.AdamW(
        [p for p in trained.parameters() if p.requires_grad], task.rate * (5.0 if method.kind == "lora" else 1.0)
    )
    began = time.process_time()
    guard = None
    if method.kind == "guard":
        guard = protect_module(model, optimizer, [part[:, :-1] for part in start.preserved], **method.options)
    hold = _holding(method.kind, cell.coefficient, model, start)
    _train(trained, optimizer, task, start.world, hold, 4 if quick else task.steps, cell.seed)
    report = None if guard is None else guard.finish()
    spent = time.process_time() - began
    if method.kind == "lora":
        drift.module = trained.merge_and_unload()
    trained.eval()
    now = _knows(drift.module, start.world)
    measured = drift.measure()
    knew = start.knew
    return {
        "cell": cell.name,
        "task": cell.task,
        "method": cell.method,
        "coefficient": cell.coefficient,
        "seed": cell.seed,
        "quick": quick,
        "before": before,
        "new": task.score(drift.module, start.world),
        "knew": float(knew.double().mean()),
        "old": float((now & knew).sum()) / max(int(knew.sum()), 1),
        "kl_all": measured.kl_mean,
        "agreement_all": measured.agreement,
        "kl_preserved": None if report is None else report.kl_mean,
        "budget": None if report is None else report.kl_budget,
        "guard": None if report is None else _told(report),
        "processor_seconds": spent,
        "machine": describe_environment(),
    }


def run_cells(
    cells: Sequence[Cell], path: Path, *, quick: bool = False, on_status: Callable[[Status], Any] | None = None
) -> dict[str, str]:
    """Run whatever has no line yet, one after the other: a run takes seconds.

    Args:
        cells: what to run.
        path: of the lines.
        quick: as in `run_cell`.
        on_status: called after every run.

    Returns:
        Why runs came to no result, by name.
    """
    return run_missing(cells, [path], lambda _: path, lambda waiting: _in_turn(waiting, quick), on_status)


def _in_turn(cells: Sequence[Cell], quick: bool) -> Iterator[tuple[Cell, dict[str, Any] | BaseException]]:
    for cell in cells:
        try:
            yield cell, run_cell(cell, quick)
        except (NsrlError, ImportError) as error:
            yield cell, NsrlError(str(error))


Hold = Callable[[torch.Generator], None]


def _train(
    model: Any, optimizer: torch.optim.Optimizer, task: Task, world: World, hold: Hold, steps: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed + 7)
    # Another stream, so that every method learns from the same batches.
    other = torch.Generator().manual_seed(seed + 8)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss(model, world, generator).backward()
        hold(other)
        optimizer.step()
    model.eval()


def _holding(kind: str, coefficient: float, model: Any, start: Start) -> Hold:
    """What a method adds to the gradients of every step."""
    parameters = list(model.parameters())
    begin = [p.detach().clone() for p in parameters]

    def draw(generator: torch.Generator) -> int:
        return int(torch.randint(len(start.preserved), (1,), generator=generator))

    def add(pieces: Sequence[Tensor], factor: float) -> None:
        for p, piece in zip(parameters, pieces, strict=True):
            if p.grad is not None:
                p.grad.add_(piece, alpha=factor)

    if kind == "kl":
        reference = Preserved(model, [part[:, :-1] for part in start.preserved])
        return lambda generator: add(reference.pull(draw(generator), parameters)[1], coefficient)
    if kind == "replay":
        return lambda generator: (coefficient * cross_entropy(model, start.preserved[draw(generator)])).backward()
    if kind in ("l2", "ewc"):
        weights = _fisher(model, start.preserved) if kind == "ewc" else [torch.ones_like(p) for p in parameters]

        def pull(generator: torch.Generator) -> None:
            with torch.no_grad():
                add([w * (p - b) for w, p, b in zip(weights, parameters, begin, strict=True)], coefficient)

        return pull
    return lambda generator: None


def _fisher(model: Any, sentences: Sequence[Tensor]) -> list[Tensor]:
    """Diagonal of the empirical Fisher information of the preserved sentences, a mean over them."""
    total = [torch.zeros_like(p) for p in model.parameters()]
    rows = torch.cat(list(sentences))
    for row in rows:
        grads = torch.autograd.grad(cross_entropy(model, row[None]), list(model.parameters()))
        for sum_, grad in zip(total, grads, strict=True):
            sum_.add_(grad.square(), alpha=1.0 / len(rows))
    return total


def _with_adapters(model: Any, rank: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise NsrlError("LoRA needs the package peft, which no extra of nsrl installs; pip install peft") from error
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(rank)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear))


def _knows(model: Any, world: World) -> Tensor:
    return torch.cat([known(model, world, range(PEOPLE), wording) for wording in (0, 1)])


def _told(report: Any) -> dict[str, Any]:
    return {
        "kept_share": report.kept_share,
        "rank_fraction": report.rank / report.parameters,
        "multiplier": report.multiplier,
        "restorations": report.restorations,
        "fallbacks": report.fallbacks,
        "measurements": report.measurements,
        "nbytes": report.nbytes,
        "dense_nbytes": report.dense_nbytes,
    }
