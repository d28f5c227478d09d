"""Power laws: the exponent fitted in log-log coordinates, with its confidence interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from nsrl.errors import NsrlError


@dataclass(frozen=True)
class Slope:
    """y = exp(intercept) x^slope, by least squares on the logarithms.

    Attributes:
        slope: the exponent.
        intercept: natural logarithm of the prefactor.
        low: lower end of the exponent's interval (Student's t).
        high: upper end.
        confidence: of the interval.
        points: number of points fitted.
    """

    slope: float
    intercept: float
    low: float
    high: float
    confidence: float
    points: int

    def __str__(self) -> str:
        return f"{self.slope:.3f} [{self.low:.3f}, {self.high:.3f}]"


def fit_slope(x: Sequence[float], y: Sequence[float], confidence: float = 0.95) -> Slope:
    """Fit log y = slope log x + intercept.

    Raises:
        NsrlError: fewer than three points, different lengths, or numbers that are not positive and finite.
    """
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if xs.shape != ys.shape or xs.ndim != 1 or xs.size < 3:
        raise NsrlError(f"a slope needs three or more points (x, y), not {xs.shape} and {ys.shape} numbers")
    if not (np.isfinite(xs) & np.isfinite(ys) & (xs > 0) & (ys > 0)).all():
        raise NsrlError("a log-log slope needs positive finite numbers only; leave the others out")
    fit = stats.linregress(np.log(xs), np.log(ys))
    half = fit.stderr * stats.t.ppf((1 + confidence) / 2, xs.size - 2)
    return Slope(
        float(fit.slope), float(fit.intercept), float(fit.slope - half), float(fit.slope + half), confidence, xs.size
    )
