"""The dual variable of the KL budget."""

from __future__ import annotations

import math


class Multiplier:
    """A Lagrange multiplier driven by measured KL: proportional-integral control of its logarithm.

    Follows Stooke et al. 2020 (PID Lagrangian methods), in log space: its natural size spans orders of magnitude.
    """

    # a larger one would only make noise: the restoration keeps the budget
    LOWEST, HIGHEST = 1e-3, 30.0

    def __init__(self, start: float, target: float, rate: float, damping: float):
        self.value = start
        self.target = target
        self.rate = rate
        self.damping = damping

    def update(self, kl: float) -> float:
        """The multiplier to use after a measured KL."""
        # NaN is a policy that has diverged: as far over the budget as can be, and not to be remembered for good
        excess = 2.0 if math.isnan(kl) else min(max(kl / self.target - 1.0, -1.0), 2.0)
        self.value = min(max(self.value * math.exp(self.rate * excess), self.LOWEST), self.HIGHEST)
        return self.value * math.exp(self.damping * excess)
