"""A sequence of tasks over methods and seeds: run as jobs, gathered into one table and one figure.

The YAML file names a sequence, whose first task is trained once a seed for all methods, and, if the sequence has
references, so is every other task alone:

    sequence: ../sequence_cartpole.yaml
    seeds: [0, 1, 2]
    methods: {plain PPO: {method: finetune}, KL budget 0.01: {}}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nsrl.bench.suites.jobs import Job, Status, run_jobs
from nsrl.bench.suites.pairs import Suite, portable
from nsrl.bench.suites.statistics import bootstrap
from nsrl.runs.folder import RunFolder
from nsrl.runs.machine import describe_environment
from nsrl.runs.report import Table, scientific
from nsrl.runs.sequences.config import SequenceConfig
from nsrl.runs.sequences.report import draw_sequence
from nsrl.runs.sequences.results import Reference, continual_results
from nsrl.runs.sequences.stages import read_reference
from nsrl.runs.settings import plain

#: What of a sequence's metrics.json goes into a row as it is.
COPIED = ("kl_by_task", "largest_share", "rollbacks", "overhead_fraction", "training_seconds", "curve")
#: What the summary has mean and interval of.
SUMMARISED = ("average_performance", "forgetting", "forward_transfer", "average_return", "largest_share")


def run_sequence_suite(
    suite: Suite,
    out: Path,
    *,
    workers: int = 2,
    engine: str = "local",
    on_status: Callable[[Status], Any] | None = None,
) -> dict[str, Any]:
    """Run whatever of a suite is not finished yet, and gather it.

    Returns:
        Environment, configurations, tasks, one row a run, and one summary row a method with 95 % bootstrap intervals.
    """
    run_jobs(suite.pretraining_jobs(out), workers=workers, engine=engine, on_status=on_status)
    jobs = suite.finetuning_jobs(out)
    run_jobs([*reference_jobs(suite, out), *jobs], workers=workers, engine=engine, on_status=on_status)
    return summarise_sequences(suite, jobs, out)


def reference_jobs(suite: Suite, out: Path) -> list[Job]:
    """Every task but the first alone, from scratch: one job a seed and task, where the sequence has references."""
    config = next(iter(suite.methods.values()))
    if not isinstance(config, SequenceConfig) or not suite.references:
        return []
    return [
        Job(
            f"{task.label} alone seed {seed}",
            "pretrain",
            replace(config, seed=seed).reference(task),
            _reference(out, task.label, seed).path,
        )
        for seed in suite.seeds
        for task in config.tasks[1:]
    ]


def summarise_sequences(suite: Suite, jobs: list[Job], out: Path) -> dict[str, Any]:
    """Gather finished sequences: rows and summary."""
    rows, tasks = [], []
    for job in jobs:
        assert isinstance(job.config, SequenceConfig)
        config, metrics = job.config, job.run.read_metrics()
        seed, tasks = config.seed, metrics["tasks"]
        references: dict[str, Reference] = {}
        if suite.references:
            references = {task: read_reference(_reference(out, task, seed)) for task in config.labels[1:]}
        stages = [{**task, "returns": found} for task, found in zip(tasks, metrics["returns"], strict=True)]
        rows.append(
            {
                "method": job.name.rpartition(" seed ")[0],
                "seed": seed,
                **continual_results(config, stages, metrics["curve"], references),
                **{key: metrics[key] for key in COPIED},
            }
        )
    return {
        "suite": suite.name,
        "environment": describe_environment(),
        "pretraining": portable(plain(suite.pretraining)),
        "methods": {name: portable(plain(config)) for name, config in suite.methods.items()},
        "tasks": tasks,
        "rows": rows,
        "summary": [_summary(method, [row for row in rows if row["method"] == method]) for method in suite.methods],
    }


def sequence_suite_table(content: Mapping[str, Any]) -> Table:
    """Mean and 95 % bootstrap interval over seeds of every method, and the mean return on every task at the end.

    Performances are in percent. KL / budget is the largest of any task and seed after any update.
    """
    names = [task["name"] for task in content["tasks"]]
    scaled = content["rows"][0]["unit"] == "performance"
    rows = [
        (
            entry["method"],
            *(_interval(entry.get(key), 100.0 if scaled else 1.0) for key in SUMMARISED[:3]),
            " / ".join(f"{entry['final_returns'][name]:.0f}" for name in names),
            scientific(entry["largest_share"]["maximum"]),
        )
        for entry in content["summary"]
    ]
    head = ("method", "average", "forgetting", "transfer", "final returns", "KL / budget")
    unit = "%, " if scaled else ""
    title = (
        f"{content['suite']} ({', '.join(names)}): {content['summary'][0]['seeds']} seeds, {unit}mean [95 % interval]"
    )
    return Table(head, tuple(rows), title)


def draw_sequence_suite(content: Mapping[str, Any], path: Path) -> Path:
    """The curves of all methods, mean and range over seeds."""
    return draw_sequence({"name": content["suite"], "tasks": content["tasks"]}, content["rows"], path)


def _summary(method: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {"method": method, "seeds": len(rows)}
    for key in SUMMARISED:
        values = [row[key] for row in rows if row[key] is not None]
        if values:
            interval = bootstrap(values)
            summary[key] = {
                "mean": interval.estimate,
                "low": interval.low,
                "high": interval.high,
                "minimum": min(values),
                "maximum": max(values),
            }
    for key in ("forgetting_by_task", "performance_by_task"):
        summary[key] = {task: sum(row[key][task] for row in rows) / len(rows) for task in rows[0][key]}
    last = [row["matrix"][-1] for row in rows]
    names = rows[0]["forgetting_by_task"]
    summary["final_returns"] = {name: sum(row[i] for row in last) / len(last) for i, name in enumerate(names)}
    return summary


def _interval(value: Mapping[str, float] | None, factor: float) -> str:
    if value is None:
        return "-"
    mean, low, high = (factor * value[key] for key in ("mean", "low", "high"))
    return f"{mean:.0f} [{low:.0f}, {high:.0f}]"


def _reference(out: Path, label: str, seed: int) -> RunFolder:
    return RunFolder(out / "references" / label / f"seed{seed}")
