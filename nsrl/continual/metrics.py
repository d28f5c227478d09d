"""Metrics of a sequence of tasks, all from one matrix: R[i, j] is the accuracy on task j after training on task i.

Definitions, for T tasks counted from 1 (papers differ in signs and ranges; these are the ones meant here):

    ACC                  mean_j R[T, j]                                       Lopez-Paz & Ranzato 2017
    BWT                  mean_{j<T} (R[T, j] - R[j, j])                       the same; negative is forgetting
    FWT                  mean_{j>1} (R[j-1, j] - b[j])                        the same; b: the untrained model
    forgetting           mean_{j<T} (max_{j<=l<T} R[l, j] - R[T, j])          Chaudhry et al. 2018, from task j on
    learning accuracy    mean_j R[j, j]                                       Riemer et al. 2019, De Lange et al. 2021
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from nsrl.errors import NsrlError


@dataclass(frozen=True)
class SequenceMetrics:
    """All of them; NaN where a single task (or no baseline) leaves one undefined.

    Attributes:
        acc: average accuracy at the end.
        bwt: backward transfer.
        fwt: forward transfer.
        forgetting: mean drop from the best.
        learning: learning accuracy, right after each task.
    """

    acc: float
    bwt: float
    fwt: float
    forgetting: float
    learning: float


def sequence_metrics(matrix: ArrayLike, untrained: ArrayLike | None = None) -> SequenceMetrics:
    """The metrics of an accuracy matrix.

    Args:
        matrix: R, shape (T, T): row i after training on task i, column j evaluated on task j. Entries above the
            diagonal are read by the forward transfer only and may be NaN without it.
        untrained: b, shape (T,): accuracy of the model before any training; None leaves FWT undefined.

    Raises:
        NsrlError: another shape, or NaN where a metric needs a number.
    """
    trained = _square(matrix)
    return SequenceMetrics(
        acc=average_accuracy(trained),
        bwt=backward_transfer(trained),
        fwt=np.nan if untrained is None else forward_transfer(trained, untrained),
        forgetting=forgetting(trained),
        learning=learning_accuracy(trained),
    )


def average_accuracy(matrix: ArrayLike) -> float:
    """ACC: mean of the last row."""
    return float(_square(matrix)[-1].mean())


def backward_transfer(matrix: ArrayLike) -> float:
    """BWT: mean change on earlier tasks since each was learnt; NaN for one task."""
    square = _square(matrix)
    return _mean(square[-1, :-1] - np.diagonal(square)[:-1])


def forward_transfer(matrix: ArrayLike, untrained: ArrayLike) -> float:
    """FWT: mean head start on a task just before it is learnt, over the untrained model; NaN for one task.

    Raises:
        NsrlError: not one untrained score a task, or the matrix lacks one that is needed.
    """
    square, base = _square(matrix), np.asarray(untrained, dtype=np.float64)
    if base.shape != (len(square),):
        raise NsrlError(f"untrained accuracies must have shape ({len(square)},), one a task, not {base.shape}")
    before = np.diagonal(square, offset=1)
    if np.isnan(before).any():
        raise NsrlError("forward transfer needs every task evaluated before it is learnt, but the matrix has NaN there")
    return _mean(before - base[1:])


def forgetting(matrix: ArrayLike) -> float:
    """Mean drop of earlier tasks from their best since they were learnt; NaN for one task."""
    square = _square(matrix)
    drops = [square[j:-1, j].max() - square[-1, j] for j in range(len(square) - 1)]
    return _mean(np.asarray(drops))


def learning_accuracy(matrix: ArrayLike) -> float:
    """Mean of the diagonal."""
    return float(np.diagonal(_square(matrix)).mean())


def _square(matrix: ArrayLike) -> np.ndarray:
    square = np.asarray(matrix, dtype=np.float64)
    if square.ndim != 2 or square.shape[0] != square.shape[1] or not square.size:
        raise NsrlError(f"an accuracy matrix is square, tasks x tasks, not of shape {square.shape}")
    if np.isnan(square[np.tril_indices(len(square))]).any():
        raise NsrlError("the accuracy matrix has NaN on or below its diagonal: a task that was learnt is not evaluated")
    return square


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else np.nan
