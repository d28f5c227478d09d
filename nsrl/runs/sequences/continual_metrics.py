"""Average performance, forgetting and forward transfer of a sequence of tasks, as Continual World defines them.

Wołczyk et al. 2021 (arXiv 2105.10919), section 3. N tasks are learnt one after the other; p_i(t) in [0, 1] is the
performance on task i at time t. There it is a success rate, here a return between two that count as 0 and as 1.

The first task may have been learnt before the sequence begins, by an agent of any origin. It has its forgetting, but no
forward transfer, and the mean forward transfer is over the tasks behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from nsrl.errors import NsrlError


def performance(returns: ArrayLike, low: float, high: float) -> np.ndarray:
    """Returns as performance: 0 at `low` and below, 1 at `high` and above, linear between."""
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
