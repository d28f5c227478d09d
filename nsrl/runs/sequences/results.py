"""The results of a sequence of tasks: the task x time matrix, and Continual World's metrics on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nsrl.errors import NsrlError
from nsrl.runs.sequences.config import SequenceConfig, SequenceTask

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
        `average_performance`, `forgetting` and `forward_transfer` with the same by task (`performance_by_task`, ...).
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


def performance(returns: ArrayLike, low: float, high: float) -> np.ndarray:
    """Returns as performance, same shape, (...,): 0 at `low` and below, 1 at `high` and above, linear between."""
    return np.clip((np.asarray(returns, dtype=np.float64) - low) / (high - low), 0.0, 1.0)


def average_performance(matrix: ArrayLike) -> float:
    """Mean performance over all tasks at the end, the paper's P(N Δ).

    Args:
        matrix: shape (N, N): row t is measured after task t, column i on task i.

    Raises:
        NsrlError: another shape.
    """
    return float(_square(matrix)[-1].mean())


def forgetting(matrix: ArrayLike) -> np.ndarray:
    """How much of each task's performance, right after it was learnt, is gone at the end: F_i = p_i(i Δ) - p_i(N Δ).

    Negative where later tasks helped; 0 for the last one by definition. The paper's F is the mean over all N.

    Args:
        matrix: as for `average_performance`; shape (N, N).

    Returns:
        F, shape (N,).
    """
    square = _square(matrix)
    return np.diagonal(square) - square[-1]


def area_under_curve(steps: Sequence[float], performances: ArrayLike) -> float:
    """Mean performance over a stretch of training, by the trapezoidal rule: (1/Δ) ∫ p dt, between 0 and 1.

    Args:
        steps: times of the measurements, increasing; the stretch is from the first to the last.
        performances: the same number of performances.

    Raises:
        NsrlError: fewer than two measurements, or times that do not increase.
    """
    times, values = np.asarray(steps, dtype=np.float64), np.asarray(performances, dtype=np.float64)
    if len(times) < 2 or times.shape != values.shape or not (np.diff(times) > 0).all():
        raise NsrlError(
            f"an area needs two or more measurements at increasing times, not {len(values)} at {times.tolist()}"
        )
    return float(((values[1:] + values[:-1]) / 2.0 * np.diff(times)).sum() / (times[-1] - times[0]))


def forward_transfer(area: float, reference: float) -> float | None:
    """What came before, as help in learning a task: FT_i = (AUC_i - AUC_i^ref) / (1 - AUC_i^ref).

    1 if the task was mastered from the first step on, 0 if it was learnt as fast as alone, negative if slower.

    Args:
        area: under the task's curve while it was learnt in the sequence.
        reference: under its curve when it is learnt alone, from scratch, for as many steps.

    Returns:
        FT_i; None where the reference is perfect throughout, so that nothing can be gained.
    """
    return None if reference >= 1.0 else (area - reference) / (1.0 - reference)


def _square(matrix: ArrayLike) -> np.ndarray:
    square = np.asarray(matrix, dtype=np.float64)
    if square.ndim != 2 or square.shape[0] != square.shape[1] or square.size == 0:
        raise NsrlError(f"the task x time matrix must have one row and one column a task, not the shape {square.shape}")
    return square
