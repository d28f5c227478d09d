"""Means over seeds and how sure they are: mean, interquartile mean, and bootstrap intervals, after rliable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nsrl.errors import NsrlError

Statistic = Callable[..., np.ndarray]
#: Entries of resampled scores held at a time, which bounds the memory of a bootstrap at about 32 MB.
CHUNK = 4_000_000


def mean(scores: ArrayLike, axis: int | None = None) -> np.ndarray:
    """Arithmetic mean over all entries, shape (), or along one axis."""
    return np.asarray(np.mean(np.asarray(scores, dtype=np.float64), axis=axis))


def interquartile_mean(scores: ArrayLike, axis: int | None = None) -> np.ndarray:
    """Mean of the middle half: the floor(n / 4) smallest and as many largest entries are left out.

    Agarwal et al. 2021 (arXiv 2108.13264) recommend it over the median, which wastes data, and the mean, which one
    outlier moves. The same as `scipy.stats.trim_mean(scores, 0.25)`.
    """
    array = np.asarray(scores, dtype=np.float64)
    array = np.sort(array.reshape(-1) if axis is None else np.moveaxis(array, axis, -1), axis=-1)
    cut = array.shape[-1] // 4
    return np.asarray(np.mean(array[..., cut : array.shape[-1] - cut], axis=-1))


@dataclass(frozen=True)
class Interval:
    """An estimate and its bootstrap percentile interval."""

    estimate: float
    low: float
    high: float


def bootstrap(
    scores: ArrayLike,
    statistic: Statistic = mean,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """A statistic of scores over seeds, with its percentile interval.

    Args:
        scores: shape (runs,), or (runs, tasks): runs are then drawn anew within each task (stratified), and the
            statistic is taken over all entries, as in rliable.
        statistic: `mean`, `interquartile_mean`, or any function of an array that takes an `axis`.
        level: coverage of the interval.
        resamples: bootstrap samples.
        seed: of the draws; the same seed gives the same interval.

    Raises:
        NsrlError: no scores, or NaN among them.
    """
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim not in (1, 2) or array.size == 0 or not np.isfinite(array).all():
        raise NsrlError(
            f"scores of shape {array.shape} cannot be resampled: expected at least one run and finite numbers"
        )
    if array.ndim == 1:
        array = array[:, None]
    runs, tasks = array.shape
    generator = np.random.default_rng(seed)
    drawn = []
    step = max(1, CHUNK // array.size)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        rows = generator.integers(runs, size=(count, runs, tasks))
        drawn.append(statistic(array[rows, np.arange(tasks)].reshape(count, -1), axis=1))
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(np.concatenate(drawn), [tail, 1.0 - tail])
    return Interval(float(statistic(array.reshape(1, -1), axis=1)[0]), float(low), float(high))


def summarise(scores: ArrayLike, *, resamples: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """Mean and interquartile mean of one score per run, each with its 95 % interval, as plain JSON."""
    array = np.asarray(scores, dtype=np.float64)
    summary: dict[str, Any] = {"runs": int(array.shape[0])}
    for name, statistic in (("mean", mean), ("iqm", interquartile_mean)):
        found = bootstrap(array, statistic, resamples=resamples, seed=seed)
        summary |= {name: found.estimate, f"{name}_low": found.low, f"{name}_high": found.high}
    return summary | {"min": float(array.min()), "max": float(array.max())}


def paired_difference(
    ours: ArrayLike, theirs: ArrayLike, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of `ours - theirs` over runs that share seed and pretrained agent; far tighter than two separate intervals.

    Raises:
        NsrlError: the two differ in length.
    """
    first, second = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if first.shape != second.shape:
        raise NsrlError(f"paired scores need one of each per run, but have shapes {first.shape} and {second.shape}")
    return bootstrap(first - second, mean, level=level, resamples=resamples, seed=seed)
