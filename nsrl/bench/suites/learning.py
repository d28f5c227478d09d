"""How fast the methods of a suite learn: both tasks' returns over its runs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from nsrl.bench.suites.jobs import Job
from nsrl.bench.suites.statistics import bootstrap
from nsrl.errors import NsrlError
from nsrl.runs.folder import read_lines
from nsrl.runs.report import Table, number

#: Evaluations after the start that have a column of their own: a misleading critic shows early or never.
EARLY = 4


def learning_curves(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Returns at every evaluation, one row a run: method, seed, and the lists timesteps, new and old.

    Args:
        jobs: finished fine-tuning runs, named "METHOD seed N".

    Raises:
        NsrlError: a run that has not been evaluated.
    """
    rows = []
    for job in jobs:
        measured = [line for line in read_lines(job.run.history) if line.get("return/new") is not None]
        if not measured:
            raise NsrlError(f"{job.folder} holds no evaluations; run its suite first, by nsrl bench")
        rows.append({
            "method": job.name.rpartition(" seed ")[0], "seed": job.config.seed,
            "timesteps": [line["timesteps"] for line in measured],
            "new": [line["return/new"] for line in measured],
            "old": [line["return/old"] for line in measured],
        })  # fmt: skip
    return rows


def learning_table(rows: list[dict[str, Any]], title: str = "") -> Table:
    """New-task return at the first evaluations and over the whole run, and the old task's lowest, of every method.

    Means over seeds, the one over the run with a 95 % bootstrap interval; "whole run" is the mean of a run's
    evaluations after its start. Runs are evaluated between rollouts, whose lengths can differ: the columns are the
    evaluations of the first run, and of the others those nearest to them.
    """
    steps = rows[0]["timesteps"][1 : 1 + EARLY]
    head = ("method", *(f"{step / 1000:.0f}k" for step in steps), "whole run", "old, lowest")
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        runs = [row for row in rows if row["method"] == method]
        early = [number(fmean(_return_near(run, step) for run in runs), 0) for step in steps]
        whole = bootstrap([fmean(run["new"][1:]) for run in runs])
        lines.append((method, *early, f"{whole.estimate:.0f} [{whole.low:.0f}, {whole.high:.0f}]",
                      number(min(min(run["old"]) for run in runs), 0)))  # fmt: skip
    return Table(head, tuple(lines), title)


def _return_near(run: dict[str, Any], step: int) -> float:
    nearest = min(range(len(run["timesteps"])), key=lambda index: abs(run["timesteps"][index] - step))
    return run["new"][nearest]
