"""The dual variable of a KL budget."""

from __future__ import annotations

import math

#: Below this a multiplier in units of 1 / budget counts as zero, and nothing is added to the gradient.
FLOOR = 1e-4
CEILING = 1e4


class Multiplier:
    """Lagrange multiplier of a budget, driven by measured KL: proportional-integral control of its logarithm.

    Follows Stooke et al. 2020 (PID Lagrangian methods), in log space: its natural size spans orders of magnitude. It is
    about 0.01 / budget for PPO's normalised advantages, where it is counted in units of 1 / target, and zero while the
    constraint is inactive.

    Args:
        target: the KL that it aims at, nats.
        rate: integral gain of its logarithm, an update, on the relative excess of the KL.
        damping: proportional gain.
        start: of the integral.
        floor, ceiling: the integral stays between them.
        relative: counts in units of 1 / target, and is zero at the floor while the KL is below half the target.

    Attributes:
        integral: what is remembered from one update to the next.
    """

    def __init__(
        self,
        target: float,
        rate: float,
        damping: float,
        *,
        start: float = FLOOR,
        floor: float = FLOOR,
        ceiling: float = CEILING,
        relative: bool = True,
    ):
        self.target = target
        self.rate = rate
        self.damping = damping
        self.integral = start
        self._floor, self._ceiling, self._relative = floor, ceiling, relative

    def update(self, kl: float) -> float:
        """The multiplier to use after a measured KL."""
        if not self.target > 0.0:
            return 0.0
        # NaN is a model that has diverged: as far over the budget as can be, and not to be remembered for good
        excess = 2.0 if math.isnan(kl) else min(max(kl / self.target - 1.0, -1.0), 2.0)
        self.integral = min(max(self.integral * math.exp(self.rate * excess), self._floor), self._ceiling)
        boost = math.exp(self.damping * excess)
        if not self._relative:
            return self.integral * boost
        if self.integral <= self._floor and excess < -0.5:
            return 0.0
        return self.integral / self.target * boost
