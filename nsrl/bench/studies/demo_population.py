"""The demo for twenty pretrained agents: does it hold for all of them, and on another instruction set?

    nsrl bench demo_population
    ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=AVX2 nsrl bench demo_population

Every agent is pretrained as the demo's is, from a seed of its own, and fine-tuned by NullSpacePPO as in the demo. The
results of every instruction set stand side by side in one file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nsrl.bench.suites.jobs import Job, Status, run_jobs
from nsrl.files import write_json
from nsrl.reading.documents import read_results
from nsrl.runs.config import DemoConfig
from nsrl.runs.machine import describe_environment
from nsrl.runs.report import Table, number, percent, scientific
from nsrl.runs.tasks import resolve_tasks

SEEDS = tuple(range(20))
#: What both returns have to be at least.
GOOD = 475.0


def instruction_set() -> str:
    """What torch's kernels use here, as ATEN_CPU_CAPABILITY would name it."""
    return torch.backends.cpu.get_cpu_capability().lower()


def plan_jobs(out: Path, seeds: tuple[int, ...] = SEEDS) -> tuple[list[Job], list[Job]]:
    """Pretraining and fine-tuning of every seed."""
    demo = DemoConfig()
    tasks = resolve_tasks(replace(demo.finetuning, pair=demo.pair))
    first, second = [], []
    for seed in seeds:
        agent = out / f"agent_{seed}"
        pretraining = replace(demo.pretraining, env=tasks.old, seed=seed)
        finetuning = replace(demo.finetuning, pair=demo.pair, agent=str(agent), seed=seed, method="null_space")
        first.append(Job(f"agent {seed}", "pretrain", pretraining, agent))
        second.append(Job(f"NullSpacePPO {seed}", "finetune", finetuning, out / f"nullspace_{seed}"))
    return first, second


def run_population(
    out: Path,
    results: Path,
    *,
    workers: int = 2,
    quick: bool = False,
    engine: str = "local",
    on_status: Callable[[Status], Any] | None = None,
) -> dict[str, Any]:
    """Run what is missing, and put this instruction set's rows into the results.

    Args:
        out: where the runs go, a folder an instruction set.
        results: JSON of all instruction sets.
        workers: processes at a time.
        quick: two agents.
        engine: where they run (`nsrl.bench.engine`); with "ray", all machines should have this instruction set.
        on_status: told how the runs come on.
    """
    first, second = plan_jobs(out / instruction_set(), SEEDS[:2] if quick else SEEDS)
    run_jobs(first, workers=workers, engine=engine, on_status=on_status)
    run_jobs(second, workers=workers, engine=engine, on_status=on_status)
    rows = [_row(job) for job in second]
    content = dict(read_results(results)) if results.is_file() else {}
    content[instruction_set()] = {"environment": describe_environment(), "rows": rows}
    write_json(results, content)
    return content


def _row(job: Job) -> dict[str, Any]:
    metrics = job.run.read_metrics()
    kept = metrics["retention"]
    return {
        "seed": metrics["seed"],
        "old_before": metrics["before"]["old_return"]["mean"],
        "old": metrics["after"]["old_return"]["mean"],
        "new_before": metrics["before"]["new_return"]["mean"],
        "new": metrics["after"]["new_return"]["mean"],
        "chosen": metrics["chosen"],
        "kl": metrics["after"]["kl_mean"],
        "kl_most": kept["kl_most"],
        "held": kept["held"],
        "updates": kept["updates"],
        "opening": kept["opening"],
        "seconds": metrics["training_seconds"],
    }


def population_table(content: dict[str, Any]) -> Table:
    """One line an instruction set."""
    head = ("", "agents", "both good", "worst old", "worst new", "KL, most", "held", "opened from")
    lines = []
    for name, found in content.items():
        rows = found["rows"]
        good = sum(row["old"] >= GOOD and row["new"] >= GOOD for row in rows)
        share = sum(row["held"] for row in rows) / sum(row["updates"] for row in rows)
        lines.append(
            (
                name,
                str(len(rows)),
                str(good),
                number(min(row["old"] for row in rows)),
                number(min(row["new"] for row in rows)),
                scientific(max(row["kl_most"] for row in rows)),
                percent(share),
                percent(sum(row["opening"]["before"] for row in rows) / len(rows)),
            )
        )
    return Table(head, tuple(lines), f"the demo's NullSpacePPO: both returns at least {GOOD:g}")
