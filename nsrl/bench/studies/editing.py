"""Facts written into language models by all editors: what an edit reaches, what it spares, and when it breaks.

    nsrl bench edit

Every editor gets the same models, facts, values (found on the unedited model), preserved texts and layers. "batched"
writes 1, 10, 100 and 1,000 edits in one batch each, "sequential" writes 1,000 in a hundred batches of ten, judged along
the way. A run is a line of JSON in runs/reference/editing/MODEL_SEED.jsonl: what is there is not run again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from nsrl.bench.engine import open_workers
from nsrl.bench.studies.editing_pool import QUICK, SETTINGS, open_pool
from nsrl.bench.studies.lines import run_missing
from nsrl.bench.suites.jobs import Status
from nsrl.editing.editor import Editor
from nsrl.editing.knowledge.evaluation import Judge
from nsrl.errors import NsrlError
from nsrl.runs.machine import describe_environment

MODES = ("sequential", "batched")
ORDERS = (0, 1)
#: Edits of a batch in a sequence, and how many edits have been made where a run is judged.
STEP, COUNTS, ALONG = 10, (1, 10, 100, 1000), (1, 10, 30, 100, 300, 1000)


@dataclass(frozen=True)
class Entry:
    """An editor in the study.

    Attributes:
        method: one of `nsrl.editing.METHODS`.
        flags: of the method that are not its own.
    """

    method: str
    flags: dict[str, Any] = field(default_factory=dict)


def _as_published(method: str, **flags: Any) -> Entry:
    # Thresholds that leave nearly all or nearly nothing are run all the same.
    return Entry(method, {"kept": (0.0, 1.0), **flags})


#: Ours as it is; the others with their own constants, which were tuned on large models.
PUBLISHED: dict[str, Entry] = {
    "ours": Entry("nsrl"),
    "memit_history": _as_published("memit_history"),
    "alphaedit": _as_published("alphaedit"),
    "memit": _as_published("memit"),
    "alphaedit_energy": _as_published("alphaedit_energy"),
    "betaedit": _as_published("betaedit"),
    "evoedit": _as_published("evoedit"),
    "anchored": _as_published("anchored"),
    "alphaedit_official": _as_published("alphaedit_official"),
}
#: These models are small, so every rival is tried at a tenth to a ten-thousandth of its own strength of what holds
#: an edit back, too: on seeds from `DEVELOPMENT` on, which are in no table. BetaEdit has two that it is held back by.
STRENGTHS: dict[str, tuple[tuple[str, float], ...]] = {
    "memit_history": (("penalty", 15000.0),),
    "memit": (("penalty", 15000.0),),
    "anchored": (("penalty", 15000.0),),
    "alphaedit": (("ridge", 1.0),),
    "alphaedit_official": (("ridge", 10.0),),
    "alphaedit_energy": (("ridge", 1.0),),
    "evoedit": (("ridge", 1.0),),
    "betaedit": (("penalty", 3000.0), ("ridge", 1.0)),
}
SHARES = (1e-1, 1e-2, 1e-3, 1e-4)
DEVELOPMENT, DEVELOPED = 100, (100,)


def _strengths() -> dict[str, Entry]:
    entries = {}
    for method, flags in STRENGTHS.items():
        for share in SHARES:
            chosen = {key: float(f"{value * share:.6g}") for key, value in flags}
            entries[f"{method}, {' and '.join(f'{key} {value:g}' for key, value in chosen.items())}"] = _as_published(
                method, **chosen
            )
    return entries


EDITORS: dict[str, Entry] = {
    **PUBLISHED,
    **_strengths(),
    "ours, budget 0.002": Entry("nsrl", {"kl_budget": 0.002}),
    "ours, budget 0.05": Entry("nsrl", {"kl_budget": 0.05}),
}
#: Of every rival the strength with the largest efficacy x specificity behind 1,000 edits in sequence, its own among
#: them, as far as `nsrl bench edit --only development` has been run (`editing_report.best_strengths`).
TUNED: tuple[str, ...] = (
    "memit_history, penalty 150",
    "alphaedit, ridge 0.001",
    "memit, penalty 150",
    "alphaedit_energy, ridge 0.001",
    "betaedit, penalty 3 and ridge 0.001",
    "evoedit, ridge 0.001",
    "anchored, penalty 150",
    "alphaedit_official, ridge 0.001",
)


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        model: one of `SETTINGS`.
        editor: one of `EDITORS`.
        mode: "sequential" or "batched".
        seed: of world, weights and facts.
        order: of the facts.
    """

    model: str
    editor: str
    mode: str
    seed: int
    order: int

    @property
    def name(self) -> str:
        """Unique among the cells."""
        return f"{self.model}/{self.editor}/{self.mode}/{self.seed}/{self.order}"


def plan_cells(only: Sequence[str] = (), quick: bool = False) -> list[Cell]:
    """All runs; models outermost, then orders, modes and seeds, so that a study that is stopped early is balanced.

    Args:
        only: names of models, modes and editors; none of a kind means all of it, and of the rivals' strengths those in
            `TUNED`. "development" plans all strengths of all rivals on `DEVELOPED`, in sequence.
        quick: the tiny model, one seed, one order.

    Raises:
        NsrlError: an unknown name.
    """
    known = [*SETTINGS, *MODES, *EDITORS, "development"]
    unknown = [name for name in only if name not in known]
    if unknown:
        raise NsrlError(f"there is no model, mode or editor {unknown[0]!r}; there are {', '.join(known)}")
    settings = QUICK if quick else SETTINGS
    models = [name for name in settings if name in only] or list(settings)[: 1 if quick else None]
    modes = [name for name in MODES if name in only] or MODES
    if "development" in only:
        strengths = [name for name in EDITORS if not name.startswith("ours")]
        return [Cell("tiny", editor, "sequential", seed, 0) for seed in DEVELOPED for editor in strengths]
    editors = [name for name in EDITORS if name in only] or [name for name in EDITORS if name in {*PUBLISHED, *TUNED}]
    return [
        Cell(model, editor, mode, seed, order)
        for model in models
        for order in ORDERS[: 1 if quick else None]
        for mode in modes
        for seed in settings[model].seeds
        for editor in editors
    ]


_pool = lru_cache(maxsize=1)(open_pool)


def run_cell(cell: Cell, cache: Path, quick: bool = False) -> dict[str, Any]:
    """One run, in this process.

    Args:
        cell: the run.
        cache: folder of models and values.
        quick: small sizes, whose numbers mean nothing.
    """
    pool = _pool(cell.model, cell.seed, cache, quick)
    order = torch.randperm(len(pool.facts), generator=torch.Generator().manual_seed(cell.order)).tolist()
    facts, values = [pool.facts[index] for index in order], pool.values[order]
    original = [parameter.detach().clone() for parameter in pool.model.parameters()]
    judge = Judge(pool.model, pool.tokenizer, facts, pool.knowledge, pool.heldout)
    entry = EDITORS[cell.editor]
    editor = Editor(pool.model, pool.tokenizer, entry.method, pool.layers, pool.search, **entry.flags)
    editor.preserve(pool.preserved)
    began, points, stopped = time.process_time(), list[dict[str, Any]](), None
    batches: list[Any] = []
    try:
        for start, stop in batches_of(cell.mode, len(facts)):
            if start == 0 and editor.edits:
                editor.undo()
            edits = [fact.edit for fact in facts[start:stop]]
            batches.append(editor.apply(edits, values[start:stop]))
            if cell.mode == "batched" or stop in ALONG or stop == len(facts):
                points.append(_point(editor, judge, stop))
    except NsrlError as error:
        stopped = str(error)
    report = editor.report()
    editor.undo()
    undone = all(torch.equal(now, then) for now, then in zip(pool.model.parameters(), original, strict=True))
    with torch.no_grad():
        for parameter, then in zip(pool.model.parameters(), original, strict=True):
            parameter.copy_(then)
    measured = [batch.kl for batch in batches if batch.kl is not None]
    return {
        "cell": cell.name,
        "model": cell.model,
        "editor": cell.editor,
        "mode": cell.mode,
        "seed": cell.seed,
        "order": cell.order,
        "quick": quick,
        "points": points,
        "stopped": stopped,
        "batches": len(batches),
        "budget": report.budget,
        "kl_most": max(measured, default=None),
        "held": sum(kl <= report.budget for kl in measured) if report.budget is not None else None,
        "undone": undone,
        "kept_share": list(report.kept_share.values()),
        "processor_seconds": time.process_time() - began,
        "machine": describe_environment(),
    }


def batches_of(mode: str, count: int) -> Iterator[tuple[int, int]]:
    """First and last edit, excluded, of every batch; a batch that begins at 0 is written into the unedited model."""
    if mode == "batched":
        yield from ((0, stop) for stop in sorted({min(number, count) for number in COUNTS}))
        return
    # The first edit by itself, so that every run is judged at one edit, too.
    yield 0, 1
    yield from ((max(start, 1), min(start + STEP, count)) for start in range(0, count, STEP))


def _point(editor: Editor, judge: Judge, count: int) -> dict[str, Any]:
    report = editor.report()
    scores = {name: _number(value) for name, value in judge.measure(editor.model, 0, count).as_dict().items()}
    last = report.batches[-1]
    return {
        **scores,
        "kl": report.kl_mean,
        "kl_heldout": report.kl_heldout,
        "missing": last.missing,
        "change": last.change,
        "penalty": last.penalty,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def run_cells(
    cells: Sequence[Cell],
    reference: Path,
    cache: Path,
    *,
    workers: int = 1,
    quick: bool = False,
    engine: str = "local",
    on_status: Callable[[Status], Any] | None = None,
    told: Callable[[str], None] = lambda _: None,
) -> dict[str, str]:
    """Run whatever has no line yet.

    Args:
        cells: what to run.
        reference: folder of the lines, a file for a model and a seed.
        cache: folder of models and values, which are made where they are missing.
        workers: processes at a time, one thread each; a single local one is this process.
        quick: as in `run_cell`.
        engine: where they run (`nsrl.bench.engine`).
        on_status: called after every run.
        told: called with what is being made.

    Returns:
        Why runs came to no result, by name.
    """
    return run_missing(
        cells,
        reference.glob("*.jsonl"),
        lambda cell: reference / f"{cell.model}_{cell.seed}.jsonl",
        lambda waiting: (
            _in_turn(waiting, cache, quick, told)
            if workers == 1 and engine == "local"
            else _beside(waiting, cache, quick, workers, told, engine)
        ),
        on_status,
    )


Run = tuple[Cell, dict[str, Any] | BaseException]


def _in_turn(cells: Sequence[Cell], cache: Path, quick: bool, told: Callable[[str], None]) -> Iterator[Run]:
    made = set[tuple[str, int]]()
    for cell in cells:
        try:
            if (cell.model, cell.seed) not in made:
                open_pool(cell.model, cell.seed, cache, quick, told)
                made.add((cell.model, cell.seed))
            yield cell, run_cell(cell, cache, quick)
        except NsrlError as error:
            yield cell, error


def _beside(
    cells: Sequence[Cell], cache: Path, quick: bool, workers: int, told: Callable[[str], None], engine: str
) -> Iterator[Run]:
    """Runs as they end; those of a pool begin when one process has made it."""
    waiting: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        waiting.setdefault((cell.model, cell.seed), []).append(cell)
    made: dict[Future[Any], tuple[str, int]] = {}
    running: dict[Future[Any], Cell] = {}
    with open_workers(engine, min(workers, len(cells)), cache) as executor:
        for pool in waiting:
            made[executor.submit(_make, *pool, cache, quick)] = pool  # a pool itself would be sent back
        while made or running:
            ended, _ = wait([*made, *running], return_when=FIRST_COMPLETED)
            for future in ended:
                if future in running:
                    yield running.pop(future), future.exception() or future.result()
                    continue
                pool, error = made.pop(future), future.exception()
                told(f"{pool[0]} {pool[1]} is ready" if error is None else f"{pool[0]} {pool[1]} cannot be made")
                for cell in waiting[pool]:
                    if error is None:
                        running[executor.submit(run_cell, cell, cache, quick)] = cell
                    else:
                        yield cell, error


def _make(model: str, seed: int, cache: Path, quick: bool) -> None:
    open_pool(model, seed, cache, quick)
