"""The scalar root behind the budget."""

from __future__ import annotations

import math

from torch import Tensor


def solve_damping(values: Tensor, weights: Tensor, target: float, floor: float = 0.0) -> float:
    """The lambda at which 1/2 sum weights (lambda / (values + lambda))^2 equals `target`.

    Monotone in lambda, so bisection on log lambda finds it; O(k) an evaluation.

    Args:
        values: eigenvalues s >= 0, shape (k,).
        weights: squared components b^2 of J d0 + rho in the eigenbasis, shape (k,).
        target: what the quadratic term may amount to.
        floor: share of the largest eigenvalue that is round-off; a smaller lambda would invert noise.

    Returns:
        lambda in [0, infinity]; 0 when even the hard projection leaves more than `target`.

    Raises:
        ValueError: NaN or infinite eigenvalues or components, or a target that is NaN: bisection would end anywhere.
    """
    total = 0.5 * float(weights.sum())
    top = float(values.max()) if values.numel() else 0.0
    if not (math.isfinite(total) and math.isfinite(top)) or math.isnan(target):
        raise ValueError("the eigenvalues, components or target of a budget are NaN or infinite; a model has diverged")
    if total <= target:
        return math.inf
    if top <= 0.0:
        return 0.0
    low = math.log(top) + max(math.log(floor) if floor > 0.0 else -60.0, -60.0)
    high = math.log(top) + 0.5 * math.log(max(total / max(target, 1e-300), 1.0)) + 60.0

    def excess(log_damping: float) -> float:
        damping = math.exp(log_damping)
        return 0.5 * float((weights * (damping / (values + damping)).square()).sum()) - target

    if excess(low) > 0.0:
        return 0.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        if excess(middle) > 0.0:
            high = middle
        else:
            low = middle
        if high - low < 1e-7:
            break
    return math.exp(low)
