"""The Lagrange multiplier of a KL budget."""

from __future__ import annotations

import math

#: Below this the multiplier (times the budget) counts as zero and nothing is added to the gradient.
FLOOR = 1e-4
CEILING = 1e4


class Multiplier:
    """Lagrange multiplier of the budget, driven by measured KL: proportional-integral control of its logarithm.

    Follows Stooke et al. 2020 (PID Lagrangian methods), in log space because the multiplier's natural size, about
    0.01 / budget for PPO's normalised advantages, spans orders of magnitude.
    """

    def __init__(self, target: float, rate: float, damping: float):
        self.target = target
        self.rate = rate
        self.damping = damping
        self.integral = FLOOR

    def update(self, kl: float) -> float:
        """The multiplier for a measured KL; 0 while the constraint is inactive."""
        if not self.target > 0.0:
            return 0.0
        # NaN is a policy that has diverged: as far over the budget as can be, and not to be remembered for good
        excess = 2.0 if math.isnan(kl) else min(max(kl / self.target - 1.0, -1.0), 2.0)
        self.integral = min(max(self.integral * math.exp(self.rate * excess), FLOOR), CEILING)
        if self.integral <= FLOOR and excess < -0.5:
            return 0.0
        return self.integral / self.target * math.exp(self.damping * excess)
