"""All strategies of continual learning on all offline benchmarks, over seeds and orders of the tasks, in processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nsrl.bench.engine import open_workers
from nsrl.bench.suites.jobs import Status
from nsrl.bench.suites.statistics import bootstrap, paired_difference
from nsrl.continual.config import ContinualConfig, StrategySettings
from nsrl.continual.strategies import STRATEGIES
from nsrl.errors import NsrlError
from nsrl.files import write_json
from nsrl.reading.documents import read_results
from nsrl.runs.machine import describe_environment
from nsrl.runs.settings import load, plain

#: Configurations (configs/continual/NAME.yaml) that need no files.
BENCHMARKS = (
    "permuted_digits",
    "rotated_digits",
    "split_digits",
    "split_digits_class",
    "teacher_student",
    "regression",
)
#: Configurations that read the user's files: they run when they are named.
FROM_FILES = (
    "permuted_mnist",
    "permuted_mnist_online",
    "split_mnist",
    "split_mnist_class",
    "permuted_fashion_mnist",
    "split_fashion_mnist",
    "split_fashion_mnist_class",
)
SEEDS = (0, 1, 2, 3, 4)
ORDERS = (0, 1)
#: What of a run's metrics is averaged.
MEASURED = (
    "acc",
    "bwt",
    "fwt",
    "forgetting",
    "learning",
    "preserved_kl",
    "kept_share",
    "leakage",
    "worst_kl",
    "worst_retained_kl",
    "worst_drop",
    "worst_accuracy",
    "train_seconds",
    "train_cpu_seconds",
    "memory_bytes",
)


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        benchmark: name of its configuration.
        config: with strategy, seed and order filled in.
        variant: what the strategy is called here; its own name, unless it runs with several options.
        watched: whether learnt tasks are looked at behind every step, not ten times a task.
    """

    benchmark: str
    config: ContinualConfig
    variant: str = ""
    watched: bool = False

    @property
    def name(self) -> str:
        """Unique among the cells."""
        config = self.config
        return f"{self.benchmark}/{self.title}_seed{config.seed}_order{config.benchmark.order}"

    @property
    def title(self) -> str:
        """What its strategy is called."""
        return self.variant or self.config.strategy.name

    def stored(self, out: Path) -> dict[str, Any] | None:
        """The result in `out`, if it is of the same configuration."""
        try:
            content = read_results(out / f"{self.name}.json")
        except (OSError, ValueError):
            return None
        return content["metrics"] if content.get("config") == plain(self.config) else None


def plan_cells(configs: Path, *, only: Sequence[str] = (), quick: bool = False) -> list[Cell]:
    """All runs; seeds and orders outermost, so that a benchmark that is stopped early is balanced.

    Args:
        configs: folder whose `continual` holds the configurations. Every strategy runs with its own defaults and,
            over them, the configuration's preset for it.
        only: names of benchmarks and of strategies; none of a kind means all of it, of the benchmarks those that need
            no files.
        quick: one seed, one order, one epoch.

    Raises:
        NsrlError: an unknown name, an unreadable configuration.
    """
    unknown = [name for name in only if name not in (*BENCHMARKS, *FROM_FILES, *STRATEGIES)]
    if unknown:
        raise NsrlError(
            f"there is no benchmark or strategy {unknown[0]!r}; benchmarks: {', '.join((*BENCHMARKS, *FROM_FILES))}; "
            f"strategies: {', '.join(STRATEGIES)}"
        )
    strategies = [name for name in STRATEGIES if name in only] or list(STRATEGIES)
    wanted = [name for name in (*BENCHMARKS, *FROM_FILES) if name in only] or list(BENCHMARKS)
    bases = {name: load(ContinualConfig, configs / "continual" / f"{name}.yaml") for name in wanted}
    cells = []
    for seed in SEEDS[:1] if quick else SEEDS:
        for order in ORDERS[:1] if quick else ORDERS:
            for benchmark, base in bases.items():
                for strategy in strategies:
                    chosen = base.strategy if base.strategy.name == strategy else StrategySettings(strategy)
                    own = StrategySettings(strategy, replace(base, strategy=chosen).options)
                    config = replace(
                        base,
                        seed=seed,
                        out=None,
                        strategy=own,
                        presets={},
                        benchmark=replace(base.benchmark, order=order),
                    )
                    if quick:
                        config = replace(config, training=replace(config.training, epochs=1))
                    cells.append(Cell(benchmark, config))
    return cells


def run_cells(
    cells: Sequence[Cell],
    out: Path,
    *,
    workers: int = 2,
    again: bool = False,
    engine: str = "local",
    on_status: Callable[[Status], Any] | None = None,
) -> dict[str, Any]:
    """Run whatever is not in `out` yet, and gather all.

    Args:
        cells: what to run.
        out: a JSON file a run goes there.
        workers: processes at a time, one thread each.
        again: run also what is there.
        engine: where they run (`nsrl.bench.engine`).
        on_status: called after every run.

    Returns:
        `environment`, `configs`, `rows` (one a run), `summary` (one a benchmark and strategy), `failures`.

    Raises:
        NsrlError: no run came to a result.
    """
    start = time.monotonic()
    found = {} if again else {cell.name: metrics for cell in cells if (metrics := cell.stored(out)) is not None}
    waiting = [cell for cell in cells if cell.name not in found]
    failures: dict[str, str] = {}
    with open_workers(engine, min(workers, len(waiting)), out) as pool:
        futures: dict[Future[dict[str, Any]], Cell] = {pool.submit(run_cell, cell, out): cell for cell in waiting}
        for number, future in enumerate(as_completed(futures), start=1):
            cell = futures[future]
            error = future.exception()
            if error is None:
                found[cell.name] = future.result()
            else:
                failures[cell.name] = str(error) if isinstance(error, NsrlError) else repr(error)
            if on_status is not None:
                seconds = time.monotonic() - start
                remaining = seconds / number * (len(waiting) - number)
                on_status(Status(len(cells), list(found), [], list(failures), seconds, remaining))
    if not found:
        raise NsrlError("no run came to a result: " + "; ".join(f"{name}: {why}" for name, why in failures.items()))
    return gather(cells, found, failures)


def run_cell(cell: Cell, out: Path) -> dict[str, Any]:
    """One run, in this process; its result is written when it is there."""
    from nsrl.continual.runner import run_continual
    from nsrl.continual.watching import LOOKS

    metrics = run_continual(cell.config, looks=None if cell.watched else LOOKS)
    write_json(out / f"{cell.name}.json", {"config": plain(cell.config), "metrics": metrics})
    return metrics


def gather(cells: Sequence[Cell], found: dict[str, dict[str, Any]], failures: dict[str, str]) -> dict[str, Any]:
    """Rows and summary of the runs that came to a result."""
    rows: list[dict[str, Any]] = []
    for cell in cells:
        if cell.name in found:
            metrics = found[cell.name]
            identity: dict[str, Any] = {
                "benchmark": cell.benchmark,
                "strategy": cell.title,
                "seed": cell.config.seed,
                "order": cell.config.benchmark.order,
            }
            rows.append(identity | {key: metrics.get(key) for key in (*MEASURED, "rank", "matrix")})
    configs = {cell.benchmark: plain(replace(cell.config, strategy=StrategySettings())) for cell in reversed(cells)}
    for name, config in configs.items():
        for key in ("seed", "out", "strategy"):
            config.pop(key)
        config["presets"] = {
            cell.title: cell.config.strategy.options
            for cell in cells
            if cell.benchmark == name and cell.config.strategy.options
        }
    return {
        "environment": describe_environment(),
        "configs": configs,
        "rows": rows,
        "summary": [
            summarise(benchmark, strategy, rows)
            for benchmark in dict.fromkeys(row["benchmark"] for row in rows)
            for strategy in dict.fromkeys(row["strategy"] for row in rows if row["benchmark"] == benchmark)
        ],
        "failures": failures,
    }


def summarise(benchmark: str, strategy: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and 95 % bootstrap interval over seeds and orders of all that is measured.

    Besides, `slowdown`: median over the runs of processor time in training over naive's of the same seed and order; and
    `acc_below_joint`: mean and interval of joint's ACC minus this one's, paired.
    """
    mine = {
        (row["seed"], row["order"]): row for row in rows if (row["benchmark"], row["strategy"]) == (benchmark, strategy)
    }
    summary: dict[str, Any] = {"benchmark": benchmark, "strategy": strategy, "runs": len(mine)}
    for key in MEASURED:
        values = [row[key] for row in mine.values() if row.get(key) is not None and row[key] == row[key]]
        if values:
            summary[key] = _interval(bootstrap(values)) | {"minimum": min(values), "maximum": max(values)}
    for other in ("naive", "joint"):
        theirs = {
            (row["seed"], row["order"]): row
            for row in rows
            if (row["benchmark"], row["strategy"]) == (benchmark, other)
        }
        pairs = [(mine[key], theirs[key]) for key in mine if key in theirs]
        if pairs and other == "naive":
            ratios = sorted(own["train_cpu_seconds"] / naive["train_cpu_seconds"] for own, naive in pairs)
            summary["slowdown"] = ratios[len(ratios) // 2]
        elif pairs:
            below = paired_difference([joint["acc"] for _, joint in pairs], [own["acc"] for own, _ in pairs])
            summary["acc_below_joint"] = _interval(below)
    return summary


def _interval(interval: Any) -> dict[str, float]:
    return {"mean": interval.estimate, "low": interval.low, "high": interval.high}
