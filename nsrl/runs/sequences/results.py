"""The results of a sequence of tasks: the task x time matrix, and Continual World's metrics on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nsrl.runs.sequences.config import SequenceConfig, SequenceTask
from nsrl.runs.sequences.continual_metrics import (
    area_under_curve,
    average_performance,
    forgetting,
    forward_transfer,
    performance,
)

#: Steps and returns of a task learnt alone.
Reference = tuple[Sequence[int], Sequence[float]]


def continual_results(
    config: SequenceConfig,
    stages: Sequence[Mapping[str, Any]],
    curve: Mapping[str, Any],
    references: Mapping[str, Reference],
) -> dict[str, Any]:
    """Matrix and metrics of a sequence, as plain JSON.

    Performances are between 0 and 1 where every task says which returns these are; else the metrics are in returns, and
    there is no forward transfer.

    Args:
        config: of the sequence.
        stages: the metrics.json of each task's stage, in order.
        curve: as `read_curve` gives it.
        references: tasks learnt alone, by name; others have no forward transfer.

    Returns:
        `matrix` (mean returns; row t after task t, column i on task i), `unit`, `average_return`,
        `average_performance`, `forgetting` and `forward_transfer` with their `_by_task`.
    """
    matrix = np.array([[stage["returns"][label]["mean"] for label in config.labels] for stage in stages])
    scaled = all(task.low is not None for task in config.tasks)
    performances = matrix
    if scaled:
        columns = [_performance(task, matrix[:, i]) for i, task in enumerate(config.tasks)]
        performances = np.stack(columns, axis=1)
    lost = forgetting(performances)
    transfers: dict[str, float | None] = {}
    for task, stage in list(zip(config.tasks, stages, strict=True))[1:]:
        known = references.get(task.label) if scaled else None
        transfers[task.label] = None if known is None else _transfer(task, stage, curve, known)
    found = [value for value in transfers.values() if value is not None]
    return {
        "matrix": matrix.tolist(),
        "unit": "performance" if scaled else "return",
        "average_return": float(matrix[-1].mean()),
        "average_performance": average_performance(performances),
        "performance_by_task": dict(zip(config.labels, performances[-1].tolist(), strict=True)),
        "forgetting": float(lost.mean()),
        "forgetting_by_task": dict(zip(config.labels, lost.tolist(), strict=True)),
        "forward_transfer": float(np.mean(found)) if found else None,
        "forward_transfer_by_task": transfers,
    }


def _performance(task: SequenceTask, returns: Any) -> np.ndarray:
    assert task.low is not None and task.high is not None
    return performance(returns, task.low, task.high)


def _transfer(
    task: SequenceTask, stage: Mapping[str, Any], curve: Mapping[str, Any], reference: Reference
) -> float | None:
    """Forward transfer of one task: its curve while it was learnt against the one alone."""
    during = [i for i, step in enumerate(curve["timesteps"]) if stage["start"] <= step <= stage["end"]]
    returns = [curve["returns"][task.label][i] for i in during]
    area = area_under_curve([curve["timesteps"][i] for i in during], _performance(task, returns))
    return forward_transfer(area, area_under_curve(reference[0], _performance(task, reference[1])))
