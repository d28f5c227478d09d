"""Rivals tuned by one rule, on seeds that nothing is reported on, against a KL budget with its default.

Every rival gets the same number of trials: pairs of an optimizer with its learning rate and a choice of the strategy's
own coefficients, drawn without replacement from a grid that is a part of the results. The trial with the best score on
validation examples runs on the reported seeds. The KL budget has its default and the benchmark's own optimizer; it runs
once more with its default and an optimizer found by as many trials, for that is no option of its.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nsrl.bench.studies.continual import BENCHMARKS, FROM_FILES, Cell, run_cells
from nsrl.bench.suites.jobs import Status
from nsrl.continual.config import ContinualConfig, StrategySettings
from nsrl.errors import NsrlError
from nsrl.runs.settings import load

#: Trials of a rival on a benchmark; fewer only where its grid has fewer.
TRIALS = 6
#: Seed of the trials, and those that are reported.
TUNING_SEED = 100
SEEDS = (0, 1, 2, 3, 4)
OPTIMIZERS = (("adam", 1e-3), ("adam", 3e-3), ("adam", 1e-2), ("sgd", 0.03), ("sgd", 0.1), ("sgd", 0.3))
#: Own coefficients of every rival, and of the KL budget, which has none that is tuned.
COEFFICIENTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "naive": {},
    "joint": {},
    "ewc": {"strength": (10.0, 100.0, 1000.0)},
    "agem": {"batch_samples": (64, 256)},
    "er": {"batch_samples": (32, 128), "weight": (1.0, None)},
    "der": {"alpha": (0.2, 0.5, 1.0), "batch_samples": (32, 128)},
    "derpp": {"alpha": (0.2, 0.5, 1.0), "beta": (0.5, 1.0), "batch_samples": (32, 128)},
    "ogd": {"samples_per_task": (100, 200)},
    "gpm": {"energy": (0.9, 0.95, 0.97, 0.99)},
    "sgp": {"energy": (0.9, 0.97), "alpha": (1.0, 10.0, 50.0)},
    "trgp": {"energy": (0.9, 0.97), "trust": (0.3, 0.5)},
    "adam_nscl": {"multiple": (10.0, 100.0, 1000.0)},
    "kl_budget": {},
}
#: What keeps samples, and the option that says how many; all of them keep as many as the KL budget.
KEEPERS = {
    "er": "samples_per_task",
    "agem": "samples_per_task",
    "der": "buffer_size",
    "derpp": "buffer_size",
    "kl_budget": "states_per_task",
}
#: What has no trials, and what it is called where its optimizer had some.
OURS, OURS_TRIED = "kl_budget", "kl_budget_optimizer_tuned"


@dataclass(frozen=True)
class Plan:
    """What runs.

    Attributes:
        bases: configurations by benchmark.
        rivals: that are tuned.
        seeds: that are reported.
        quick: one epoch.
        trials: of a rival on a benchmark, at most.
    """

    bases: dict[str, ContinualConfig]
    rivals: tuple[str, ...]
    seeds: tuple[int, ...]
    quick: bool = False
    trials: int = TRIALS

    def tuning_cells(self) -> list[Cell]:
        """The trials of all rivals; a rival's first trials outermost, so that one stopped early is balanced."""
        cells = [
            (number, self._cell(benchmark, rival, TUNING_SEED, training, options, f"{rival}_trial{number}"))
            for benchmark in self.bases
            for rival in self.rivals
            for number, (training, options) in enumerate(trials(rival, self.trials))
        ]
        return [cell for _, cell in sorted(cells, key=lambda pair: pair[0])]

    def final_cells(self, chosen: dict[tuple[str, str], Cell]) -> list[Cell]:
        """The runs that are reported, seeds outermost.

        Args:
            chosen: the best trial of every benchmark and rival that has one.
        """
        cells = []
        for seed in self.seeds:
            for benchmark in self.bases:
                cells.append(self._cell(benchmark, OURS, seed, {}, {}, OURS))
                for rival in self.rivals:
                    if (benchmark, rival) in chosen:
                        config = replace(chosen[benchmark, rival].config, seed=seed)
                        cells.append(Cell(benchmark, config, OURS_TRIED if rival == OURS else rival))
        return cells

    def _cell(
        self, benchmark: str, strategy: str, seed: int, training: dict[str, Any], own: dict[str, Any], variant: str
    ) -> Cell:
        base = self.bases[benchmark]
        options = dict(own)
        if strategy in KEEPERS:
            tasks = base.benchmark.tasks or 5
            options[KEEPERS[strategy]] = kept(base) * (tasks if KEEPERS[strategy] == "buffer_size" else 1)
        trained = replace(base.training, **training)
        if self.quick:
            trained = replace(trained, epochs=1)
        settings = StrategySettings(strategy, options)
        return Cell(
            benchmark, replace(base, seed=seed, out=None, presets={}, strategy=settings, training=trained), variant
        )


def kept(base: ContinualConfig) -> int:
    """Samples of a task that all who keep any keep on a benchmark: what its configuration gives to the KL budget."""
    return int(base.presets.get(OURS, {}).get("states_per_task", 200))


def trials(strategy: str, count: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Training settings and options of a strategy's trials: at most `count` of its grid, always the same ones."""
    own = COEFFICIENTS[strategy]
    choices = [dict(zip(own, values, strict=True)) for values in itertools.product(*own.values())]
    grid = list(itertools.product(OPTIMIZERS, choices))
    random.Random(strategy).shuffle(grid)
    # every optimizer once before one comes twice
    rounds: dict[tuple[str, float], list[Any]] = {}
    for optimizer, options in grid:
        rounds.setdefault(optimizer, []).append(({"optimizer": optimizer[0], "learning_rate": optimizer[1]}, options))
    dealt = itertools.chain.from_iterable(zip(*rounds.values(), strict=True))
    return list(itertools.islice(dealt, count))


def plan_tuning(configs: Path, *, only: Sequence[str] = (), quick: bool = False) -> Plan:
    """What to run.

    Args:
        configs: folder whose `continual` holds the configurations; their presets are not used but for the samples kept.
        only: names of benchmarks, rivals and seeds ("seed0"); none of a kind means all of it, of the benchmarks those
            that need no files.
        quick: one epoch, two trials, one seed.

    Raises:
        NsrlError: an unknown name, an unreadable configuration.
    """
    seeds = {f"seed{seed}": seed for seed in SEEDS}
    known = (*BENCHMARKS, *FROM_FILES, *COEFFICIENTS, *seeds)
    unknown = [name for name in only if name not in known]
    if unknown:
        raise NsrlError(f"there is no benchmark, rival or seed {unknown[0]!r} here; there are {', '.join(known)}")
    wanted = [name for name in (*BENCHMARKS, *FROM_FILES) if name in only] or list(BENCHMARKS)
    rivals = [name for name in COEFFICIENTS if name in only] or list(COEFFICIENTS)
    reported = [seed for name, seed in seeds.items() if name in only] or list(SEEDS)
    bases = {name: load(ContinualConfig, configs / "continual" / f"{name}.yaml") for name in wanted}
    return Plan(bases, tuple(rivals), tuple(reported[:1] if quick else reported), quick, 2 if quick else TRIALS)


def run_tuning(
    plan: Plan,
    out: Path,
    *,
    workers: int = 2,
    again: bool = False,
    engine: str = "local",
    on_status: Callable[[Status], Any] | None = None,
) -> dict[str, Any]:
    """Tune, then run what was chosen; whatever is in `out` already is taken from there.

    Returns:
        As `nsrl.bench.studies.continual.run_cells`, and `grid`, `optimizers`, `trials` (one a trial, with the score
        that it was judged by and whether it was chosen).

    Raises:
        NsrlError: no run came to a result.
    """
    tried = plan.tuning_cells()
    first = run_cells(tried, out, workers=workers, again=again, engine=engine, on_status=on_status)
    scores = {cell.name: metrics for cell in tried if (metrics := cell.stored(out)) is not None}
    chosen = choose(tried, {name: metrics["acc_validation"] for name, metrics in scores.items()})
    content = run_cells(plan.final_cells(chosen), out, workers=workers, again=again, engine=engine, on_status=on_status)
    best = {cell.name for cell in chosen.values()}
    content["optimizers"] = [list(pair) for pair in OPTIMIZERS]
    content["grid"] = {
        rival: {key: list(values) for key, values in COEFFICIENTS[rival].items()} for rival in plan.rivals
    }
    content["trials"] = [_trial(cell, scores[cell.name], cell.name in best) for cell in tried if cell.name in scores]
    content["failures"] = {**first["failures"], **content["failures"]}
    return content


def choose(cells: Sequence[Cell], scores: dict[str, float]) -> dict[tuple[str, str], Cell]:
    """The best trial of every benchmark and rival; a score that is no number is the worst.

    Args:
        cells: the trials.
        scores: by the trial's name; those that came to no result are missing.
    """
    best: dict[tuple[str, str], tuple[float, Cell]] = {}
    for cell in cells:
        score = scores.get(cell.name, float("nan"))
        key = cell.benchmark, cell.config.strategy.name
        if score == score and (key not in best or score > best[key][0]):
            best[key] = score, cell
    return {key: cell for key, (_, cell) in best.items()}


def _trial(cell: Cell, metrics: dict[str, Any], chosen: bool) -> dict[str, Any]:
    training = cell.config.training
    return {
        "benchmark": cell.benchmark,
        "strategy": cell.config.strategy.name,
        "optimizer": training.optimizer,
        "learning_rate": training.learning_rate,
        "options": cell.config.strategy.options,
        "acc_validation": metrics["acc_validation"],
        "chosen": chosen,
    }
