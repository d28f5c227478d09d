"""What keeping, resetting or warming up the critic does: both tasks' returns over the runs of a finished suite.

nsrl bench cartpole_critics
python -m nsrl.bench.critics configs/bench/cartpole_critics.yaml runs/bench/cartpole_critics
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nsrl.bench.report import Table, number
from nsrl.bench.runs import read_lines
from nsrl.bench.statistics import bootstrap
from nsrl.bench.suites import Suite
from nsrl.errors import NsrlError

#: Evaluations after the start that have a column of their own: a misleading critic shows early or never.
EARLY = 4


def critic_curves(suite: Suite, out: Path) -> list[dict[str, Any]]:
    """Returns at every evaluation, one row a run: method, seed, and the lists timesteps, new and old.

    Raises:
        NsrlError: a run of the suite has not been evaluated.
    """
    rows = []
    for job in suite.finetuning_jobs(out):
        measured = [line for line in read_lines(job.run.history) if line.get("return/new") is not None]
        if not measured:
            raise NsrlError(f"{job.folder} holds no evaluations; run the suite first: nsrl bench {suite.name}")
        rows.append({
            "method": job.name.rpartition(" seed ")[0], "seed": job.config.seed,
            "timesteps": [line["timesteps"] for line in measured],
            "new": [line["return/new"] for line in measured],
            "old": [line["return/old"] for line in measured],
        })  # fmt: skip
    return rows


def critic_table(rows: list[dict[str, Any]], title: str = "") -> Table:
    """New-task return at the first evaluations and over the whole run, and the old task's lowest, of every method.

    Means over seeds with 95 % bootstrap intervals; "over the run" is the mean of a run's evaluations after its start.
    """
    steps = rows[0]["timesteps"][1 : 1 + EARLY]
    head = ("critic", *(f"new, {step:,} steps" for step in steps), "new, over the run", "old, lowest")
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        runs = [row for row in rows if row["method"] == method]
        early = [[run["new"][index] for run in runs] for index in range(1, 1 + len(steps))]
        whole = [sum(run["new"][1:]) / len(run["new"][1:]) for run in runs]
        lines.append((method, *map(_interval, [*early, whole]), number(min(min(run["old"]) for run in runs))))
    return Table(head, tuple(lines), title)


def _interval(values: list[float]) -> str:
    found = bootstrap(values)
    return f"{found.estimate:.0f} [{found.low:.0f}, {found.high:.0f}]"
