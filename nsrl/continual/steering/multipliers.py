"""Dual variables of a KL budget that holds for every task: one each, driven by that task's KL."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Samples after which a running mean of a task's KL has forgotten two thirds of what was before.
MEMORY = 32.0
#: Bounds of what is remembered of a multiplier; above, the restoration keeps the budget with less noise.
FLOOR, CEILING = 1e-3, 10.0
#: Excess over the aim, in parts of it, that counts: a task far over it is not to be held for good.
LEAST, MOST = -1.0, 2.0
#: Steps with the most excess that one counts for in which a task had to be held back.
PUSHED = 4.0
#: A KL beyond so many times the aim, as that of a model that has diverged, is taken for that.
BEYOND = 30.0


class Multipliers:
    """One Lagrange multiplier a task: proportional-integral control of its logarithm, as `Multiplier` has it for one.

    With one for all, driven by the mean over the tasks, the task that has moved most goes over the budget while the
    mean is inside; it is then the restoration that has to bring it back, at the cost of the task at hand.

    Args:
        aim: KL of every task, nats a sample.
        rate: integral gain, a step, on the relative excess of the KL.
        damping: proportional gain.
        start: of a task's multiplier.

    Attributes:
        integrals: what is remembered of each, (tasks,).
        divergences: running mean of each task's KL on drawn samples, or what was measured last, (tasks,).
    """

    def __init__(self, aim: float, rate: float, damping: float, start: float):
        self.aim = aim
        self.rate = rate
        self.damping = damping
        self.start = start
        self.integrals = self.divergences = torch.zeros(0)

    def add(self, like: Tensor) -> None:
        """Begin with one more task, on the device of a tensor."""
        begun = torch.tensor([self.start], device=like.device)
        self.integrals = torch.cat([self.integrals.to(begun), begun])
        self.divergences = torch.cat([self.divergences.to(begun), torch.zeros_like(begun)])

    def measured(self, divergences: Tensor) -> None:
        """Take measured KL, (tasks,), for the running means."""
        self.divergences = self._bounded(divergences.to(self.divergences))

    def pushed(self, tasks: Tensor) -> None:
        """Some tasks, (r,) int64, were held at their budget against a step.

        What is measured behind it does not tell how far the step would have gone, and the next one will push as hard.
        """
        self.integrals[tasks] = (self.integrals[tasks] * math.exp(PUSHED * self.rate * MOST)).clamp_(max=CEILING)

    def update(self, divergences: Tensor, owner: Tensor, steps: int = 1) -> Tensor:
        """The multipliers to use after a draw, (tasks,).

        Args:
            divergences: KL of the drawn samples, (n,).
            owner: the task of each, (n,) int64.
            steps: that have passed since the last draw.
        """
        divergences = divergences.to(self.integrals)
        counts = torch.zeros_like(self.integrals).index_add_(0, owner, torch.ones_like(divergences))
        sums = torch.zeros_like(self.integrals).index_add_(0, owner, divergences)
        means = self._bounded(sums / counts.clamp_min(1.0))
        self.divergences = self.divergences.lerp(means, -torch.expm1(-counts / MEMORY))
        excess = (self.divergences / self.aim - 1.0).clamp_(LEAST, MOST)
        self.integrals = (self.integrals * (self.rate * steps * excess).exp_()).clamp_(FLOOR, CEILING)
        return self.integrals * (self.damping * excess).exp_()

    def largest(self) -> float:
        """The largest of those that are remembered; 0 without a task."""
        return float(self.integrals.max()) if len(self.integrals) else 0.0

    def _bounded(self, divergences: Tensor) -> Tensor:
        most = BEYOND * self.aim
        return divergences.nan_to_num(nan=most, posinf=most).clamp(max=most)
