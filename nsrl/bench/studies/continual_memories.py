"""How few samples a task will do: a KL budget with its default against replay, with nothing tuned for the benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nsrl.bench.studies.continual import BENCHMARKS, FROM_FILES, Cell
from nsrl.continual.config import ContinualConfig, StrategySettings
from nsrl.errors import NsrlError
from nsrl.runs.settings import load

#: Samples kept of every task.
SIZES = (20, 100, 500)
SEEDS = (0, 1, 2)
#: Benchmarks of the study that need no files; others run when they are named.
OFFLINE = ("permuted_digits", "split_digits", "split_digits_class")
#: DER++'s coefficients alpha and beta as its authors chose them with 500 samples on other benchmarks
#: (arXiv 2004.07211; github.com/aimagelab/mammoth, utils/best_args.py). Their learning rates, of other networks and
#: batches, are not taken over: all strategies have that of the configuration.
COEFFICIENTS = {"cifar10": (0.2, 0.5), "rotated_mnist": (0.5, 1.0), "permuted_mnist": (1.0, 0.5)}


def variants(size: int, tasks: int, batch: int) -> dict[str, StrategySettings]:
    """What runs, by the name that it has in the tables.

    Args:
        size: samples kept of a task; DER++'s reservoir has room for as many of all tasks together.
        tasks: of the benchmark.
        batch: examples in a step; replay draws as many, DER++ that many twice.
    """
    reservoir = {"buffer_size": size * tasks, "batch_samples": batch}
    return {
        "kl_budget": StrategySettings("kl_budget", {"states_per_task": size}),
        "er": StrategySettings("er", {"samples_per_task": size, "batch_samples": batch}),
        **{
            f"derpp_{source}": StrategySettings("derpp", {**reservoir, "alpha": alpha, "beta": beta})
            for source, (alpha, beta) in COEFFICIENTS.items()
        },
    }


def plan_memories(configs: Path, *, only: Sequence[str] = (), quick: bool = False) -> list[Cell]:
    """All runs, seeds outermost.

    Args:
        configs: folder whose `continual` holds the configurations; their presets are not used.
        only: names of benchmarks, variants and sizes ("20"); none of a kind means all of it, of the benchmarks those
            of `OFFLINE`.
        quick: one seed, one epoch.

    Raises:
        NsrlError: an unknown name, an unreadable configuration.
    """
    benchmarks = (*BENCHMARKS, *FROM_FILES)
    names = list(variants(1, 1, 1))
    known = {*benchmarks, *names, *map(str, SIZES)}
    unknown = [name for name in only if name not in known]
    if unknown:
        raise NsrlError(
            f"there is no benchmark, variant or size {unknown[0]!r}; benchmarks: {', '.join(benchmarks)}; "
            f"variants: {', '.join(names)}; sizes: {', '.join(map(str, SIZES))}"
        )
    wanted = [name for name in benchmarks if name in only] or list(OFFLINE)
    chosen = [name for name in names if name in only] or names
    sizes = [size for size in SIZES if str(size) in only] or list(SIZES)
    bases = {name: load(ContinualConfig, configs / "continual" / f"{name}.yaml") for name in wanted}
    cells = []
    for seed in SEEDS[:1] if quick else SEEDS:
        for benchmark, base in bases.items():
            tasks = base.benchmark.tasks or (10 if base.benchmark.name.startswith("permuted") else 5)
            for size in sizes:
                for variant, strategy in variants(size, tasks, base.training.batch_size).items():
                    if variant in chosen:
                        config = replace(base, seed=seed, out=None, strategy=strategy, presets={})
                        if quick:
                            config = replace(config, training=replace(config.training, epochs=1))
                        cells.append(Cell(f"{benchmark}_{size}", config, variant))
    return cells


def broken(content: dict[str, Any]) -> list[str]:
    """Where a strategy ends more than five points of ACC below what it has with the most samples, a line each."""
    means = {(entry["benchmark"], entry["strategy"]): entry["acc"]["mean"] for entry in content["summary"]}
    lines = []
    for (benchmark, strategy), acc in means.items():
        name, _, size = benchmark.rpartition("_")
        most = means.get((f"{name}_{SIZES[-1]}", strategy))
        if most is not None and most - acc > 0.05:
            lines.append(f"{strategy} on {name} with {size} samples a task: {100 * (most - acc):.1f} points below")
    return lines
