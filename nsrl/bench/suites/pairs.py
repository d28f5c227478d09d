"""A suite: one task pair, several methods, several seeds; every method starts from the same agents and buffers.

A suite is a YAML file (configs/bench/*.yaml) naming a pretraining and a fine-tuning configuration and, for each
method, the settings in which it differs; or it names a sequence of tasks instead (`nsrl.bench.suites.sequences`):

    pretraining: ../pretrain_halfcheetah.yaml
    finetuning: ../halfcheetah_backward.yaml
    seeds: [0, 1, 2]
    methods: {plain PPO: {method: finetune}, KL penalty 1: {method: kl_penalty, penalty: 1.0}, KL budget 0.01: {}}
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nsrl.bench.suites.jobs import Job, Status, run_jobs
from nsrl.bench.suites.report import learning_curves
from nsrl.bench.suites.statistics import bootstrap
from nsrl.errors import NsrlError
from nsrl.files import read_lines, write_json
from nsrl.reading.limits import Unreadable, about, shown
from nsrl.reading.values import items, mapping, whole
from nsrl.runs.config import EvaluationSettings, FinetuneConfig, PretrainConfig
from nsrl.runs.folder import slug
from nsrl.runs.machine import describe_environment
from nsrl.runs.sequences.config import SequenceConfig
from nsrl.runs.settings import Config, build, check_keys, load, plain, read_yaml

KEYS = ("pretraining", "finetuning", "seeds", "methods")
SEQUENCE_KEYS = ("sequence", "seeds", "methods")
#: Timesteps of every run of a shortened suite.
QUICK_STEPS = 2048
#: What of a fine-tuning run's metrics.json goes into the suite's table.
MEASURED = ("old_return", "new_return", "kl_mean", "kl_heldout", "kl_max", "agreement")


@dataclass(frozen=True)
class Suite:
    """What is to be run.

    Attributes:
        name: of the suite, from its file.
        pretraining: of the agents, one a seed.
        methods: configuration by method, of fine-tuning on a pair or on a sequence of tasks.
        seeds: of agents, buffers and fine-tuning alike (paired over methods).
        references: train every later task of a sequence alone as well, once for all methods.
    """

    name: str
    pretraining: PretrainConfig
    methods: dict[str, FinetuneConfig] | dict[str, SequenceConfig]
    seeds: tuple[int, ...]
    references: bool = False

    @property
    def is_sequence(self) -> bool:
        """Whether the methods learn a sequence of tasks, and not a pair."""
        return any(isinstance(config, SequenceConfig) for config in self.methods.values())

    def shortened(self) -> Suite:
        """One seed, two rollouts or so of every run, few states and episodes: to try a suite out."""
        short = EvaluationSettings(every=QUICK_STEPS, episodes=2, final_episodes=2)

        def shorten(config: Config) -> Config:
            changes: dict[str, Any] = {"evaluation": short}
            if isinstance(config, SequenceConfig):
                changes["tasks"] = [replace(task, total_timesteps=QUICK_STEPS) for task in config.tasks]
            else:
                changes["total_timesteps"] = QUICK_STEPS
            if not isinstance(config, PretrainConfig):
                changes["states"] = replace(config.states, n_states=256)  # type: ignore[attr-defined]
            return replace(config, **changes)  # type: ignore[type-var]

        methods: Any = {name: shorten(config) for name, config in self.methods.items()}
        return replace(self, pretraining=shorten(self.pretraining), methods=methods, seeds=self.seeds[:1])

    def pretraining_jobs(self, out: Path) -> list[Job]:
        """One job a seed."""
        return [
            Job(
                f"pretrain seed {seed}",
                "pretrain",
                replace(self.pretraining, seed=seed, out=None),
                out / "pretrained" / f"seed{seed}",
            )
            for seed in self.seeds
        ]

    def finetuning_jobs(self, out: Path) -> list[Job]:
        """One job a seed and method, seeds outermost, so that a suite that is stopped early is balanced."""
        return [
            Job(
                f"{method} seed {seed}",
                "sequence" if self.is_sequence else "finetune",
                replace(config, seed=seed, out=None, agent=str(out / "pretrained" / f"seed{seed}")),
                out / slug(method) / f"seed{seed}",
            )
            for seed in self.seeds
            for method, config in self.methods.items()
        ]


def read_suite(path: str | Path) -> Suite:
    """A suite from its YAML file; the configurations that it names are relative to it.

    Raises:
        NsrlError: unknown or missing keys, in the suite or in what it names.
    """
    path = Path(path)
    try:
        values = mapping(read_yaml(path), "it")
        keys = SEQUENCE_KEYS if "sequence" in values else KEYS
        seeds = tuple(whole(seed, "a seed") for seed in items(values.get("seeds", []), "seeds"))
        methods = mapping(values.get("methods", {}), "methods")
        files = {key: Path(values[key]) for key in ("sequence", "pretraining", "finetuning") if key in values}
    except Unreadable as error:
        raise NsrlError(about(path, error)) from error
    except TypeError as error:
        raise NsrlError(f"{path} must name the files of its configurations as text") from error
    unknown, missing = set(values) - set(keys), set(keys) - set(values)
    if unknown or missing:
        raise NsrlError(
            f"{path} must hold exactly the keys {', '.join(keys)}; "
            f"{', '.join(sorted(unknown | missing))} is {'unknown' if unknown else 'missing'}"
        )
    if "sequence" in values:
        base = load(SequenceConfig, path.parent / files["sequence"])
        sequences = _methods(replace(base, references=False), methods, path)
        return Suite(path.stem, base.first(), sequences, seeds, base.references)
    pretraining = load(PretrainConfig, path.parent / files["pretraining"])
    pairs = _methods(load(FinetuneConfig, path.parent / files["finetuning"]), methods, path)
    return Suite(path.stem, pretraining, pairs, seeds)


def run_suite(
    suite: Suite,
    out: Path,
    *,
    workers: int = 2,
    engine: str = "local",
    on_status: Callable[[Status], Any] | None = None,
) -> dict[str, Any]:
    """Run whatever of a suite is not finished yet, and gather it.

    Returns:
        environment, configurations, one row a run, and one summary row a method with 95 % bootstrap intervals.
    """
    run_jobs(suite.pretraining_jobs(out), workers=workers, engine=engine, on_status=on_status)
    jobs = suite.finetuning_jobs(out)
    run_jobs(jobs, workers=workers, engine=engine, on_status=on_status)
    return summarise(suite, jobs)


def summarise(suite: Suite, jobs: list[Job]) -> dict[str, Any]:
    """Gather finished jobs: rows and summary."""
    rows = []
    for job in jobs:
        metrics = job.run.read_metrics()
        method = job.name.rpartition(" seed ")[0]
        row: dict[str, Any] = {"method": method, "seed": job.config.seed}
        for stage in ("before", "after"):
            for key in MEASURED:
                value = metrics[stage].get(key)
                row[f"{stage}/{key}"] = value["mean"] if isinstance(value, dict) else value
        kls = [entry["kl_mean"] for entry in read_lines(job.run.history) if entry.get("kl_mean") is not None]
        row["largest_kl_mean"] = max(kls, default=None)
        row["budget"] = metrics.get("kl_budget")
        for key in ("wall_seconds", "training_seconds"):
            row[key] = metrics.get(key)
        for key in ("overhead_fraction", "rollbacks"):
            row[key] = metrics["retention"][key]
        rows.append(row)
    # Where several algorithms are fine-tuned without a constraint, the first is the yardstick.
    plainly = next((name for name, config in suite.methods.items() if config.method == "finetune"), None)
    plain_returns = {row["seed"]: row["after/new_return"] for row in rows if row["method"] == plainly}
    return {
        "suite": suite.name,
        "environment": describe_environment(),
        "pretraining": portable(plain(suite.pretraining)),
        "methods": {name: portable(plain(config)) for name, config in suite.methods.items()},
        "rows": rows,
        "summary": [
            _summary(method, [row for row in rows if row["method"] == method], plain_returns)
            for method in suite.methods
        ],
        "curves": learning_curves(jobs),
    }


def write_suite(content: dict[str, Any], path: Path) -> None:
    """Write the gathered results as JSON."""
    write_json(path, content)


def _summary(method: str, rows: list[dict[str, Any]], plain_returns: dict[int, float]) -> dict[str, Any]:
    summary: dict[str, Any] = {"method": method, "seeds": len(rows)}
    for key in (
        "before/old_return",
        "before/new_return",
        "after/old_return",
        "after/new_return",
        "after/kl_mean",
        "after/kl_heldout",
        "after/agreement",
    ):
        values = [row[key] for row in rows if row[key] is not None]
        if values:
            interval = bootstrap(values)
            summary[key] = {
                "mean": interval.estimate,
                "low": interval.low,
                "high": interval.high,
                "minimum": min(values),
            }
    kept = [row["after/old_return"] / row["before/old_return"] for row in rows]
    summary["old_return_kept"] = {"mean": sum(kept) / len(kept), "minimum": min(kept)}
    # Of the same seeds' sums, not the mean of ratios: plain PPO's return can be near zero on one of them.
    plain = sum(plain_returns[row["seed"]] for row in rows if row["seed"] in plain_returns)
    if plain > 0:
        summary["new_return_of_plain"] = {"mean": sum(row["after/new_return"] for row in rows) / plain}
    return summary


def _methods(base: Config, changes: dict[str, Any], path: Path) -> dict[str, Config]:
    """A configuration by method: the base, and in what the method differs."""
    methods = {}
    for method, own in changes.items():
        check_keys(own or {}, type(base), f"{path}, method {method}")
        try:
            methods[method] = build(type(base), _merged(plain(base), own or {}))
        except (TypeError, AttributeError) as error:  # values of other types than the settings'
            raise NsrlError(f"{path}, method {shown(method)}: {shown(str(error), 200)}") from error
    return methods


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _merged(value, changes.get(key) or {}) if isinstance(value, dict) else changes.get(key, value)
        for key, value in base.items()
    }


def portable(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without paths, which mean nothing on another machine."""
    return {key: value for key, value in config.items() if key not in ("agent", "buffer", "out")}
