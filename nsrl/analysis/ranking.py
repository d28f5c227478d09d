"""Rank correlation of a forecast with the outcome, also where the settings are alike, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nsrl.errors import NsrlError

#: Resamples of an interval, and the fewest clusters that it is drawn from.
RESAMPLES = 1000
FEWEST = 4


@dataclass(frozen=True)
class RankAgreement:
    """How well one quantity ranks another over some runs.

    Attributes:
        spearman: rank correlation over all runs; None where one of the two is the same in all.
        spearman_interval: its 95 % interval; None for too few clusters, or where it is not defined.
        partial: rank correlation within groups of equal settings, pooled: of ranks from which each group's mean is
            taken. What the settings alone explain is not in it; None where the forecast is the same in all of a group.
        partial_interval: its 95 % interval.
    """

    spearman: float | None
    spearman_interval: tuple[float, float] | None
    partial: float | None
    partial_interval: tuple[float, float] | None


def rank_agreement(
    said: Sequence[float], measured: Sequence[float], groups: Sequence[str], clusters: Sequence[str], seed: int = 0
) -> RankAgreement:
    """Spearman's rank correlation, over all and within groups.

    The intervals are percentiles over resampled clusters, not runs: runs of one task share what is peculiar to it, and
    are no independent witnesses.

    Args:
        said: forecast of n runs.
        measured: outcome of them.
        groups: what is held equal, by run.
        clusters: what is resampled whole, by run.
        seed: of the resampling.

    Raises:
        NsrlError: sequences of different lengths, or numbers that are not finite.
    """
    x, y = np.asarray(said, dtype=float), np.asarray(measured, dtype=float)
    if not len(x) == len(y) == len(groups) == len(clusters):
        lengths = f"{len(x)}, {len(y)}, {len(groups)} and {len(clusters)}"
        raise NsrlError(f"a rank correlation needs sequences of equal lengths, not {lengths}")
    if not (np.isfinite(x) & np.isfinite(y)).all():
        raise NsrlError("a rank correlation needs finite numbers; a run may have diverged")
    kinds = np.unique(np.asarray(groups), return_inverse=True)[1]
    members = [np.flatnonzero(np.asarray(clusters) == name) for name in dict.fromkeys(clusters)]
    random = np.random.default_rng(seed)
    draws = [
        np.concatenate([members[i] for i in random.integers(len(members), size=len(members))])
        for _ in range(RESAMPLES if len(members) >= FEWEST else 0)
    ]

    def overall(chosen: np.ndarray) -> float:
        return _spearman(x[chosen], y[chosen], np.zeros(len(chosen), dtype=int))

    def partial(chosen: np.ndarray) -> float:
        return _spearman(x[chosen], y[chosen], kinds[chosen])

    everyone = np.arange(len(x))
    return RankAgreement(
        _defined(overall(everyone)),
        _interval([overall(draw) for draw in draws]),
        _defined(partial(everyone)),
        _interval([partial(draw) for draw in draws]),
    )


def _spearman(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> float:
    """Correlation of ranks that are taken within groups, relative to the group's mean and size."""
    from scipy.stats import rankdata

    ranks = np.zeros((2, len(x)))
    for group in np.unique(groups):
        chosen = groups == group
        for row, values in zip(ranks, (x, y), strict=True):
            row[chosen] = (rankdata(values[chosen]) - (chosen.sum() + 1) / 2) / chosen.sum()
    norms = np.linalg.norm(ranks, axis=1)
    return float(ranks[0] @ ranks[1] / norms.prod()) if norms.all() else float("nan")


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else value


def _interval(values: list[float]) -> tuple[float, float] | None:
    if not values or np.isnan(values).any():
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
