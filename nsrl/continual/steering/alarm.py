"""Which learnt tasks may leave their budget by a step: a guess at every draw, a measurement where it is near.

Measuring the KL of every task on all of its retained inputs at every step would cost more than the step. A draw of
retained inputs, which a step computes anyway, tells how much the KL of *these inputs* has changed since their task was
last measured; their task's KL is then what was measured plus the mean change (a control variate: as long as little has
moved, the change varies far less over the inputs than the KL itself). The root of a KL is the length of a way in the
space of outputs, and grows by about the length of a step: a task is measured behind a step if its root, guessed high,
could have come to that of the budget by twice the longest step seen lately.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Steps as long as the longest seen lately that have to fit between a guessed root and the budget's.
AHEAD = 2.0
#: What is remembered of the longest step from one measurement of a task to the next.
REMEMBERED = 0.9
#: A horizon beyond which nobody looks ahead, steps.
FAR = 10**6


class Alarm:
    """Guesses and measurements of every task's KL, and how fast it grows.

    Args:
        limit: largest KL of a task, nats a sample.

    Attributes:
        measured: KL of every task when it was measured last, (tasks,), float64.
    """

    def __init__(self, limit: float):
        self.limit = limit
        self.measured = self._guesses = self._speeds = torch.zeros(0, dtype=torch.float64)
        self._then = self.measured  # KL of every retained input at its task's last measurement, (n,)
        self._measured_at = self._guessed_at = torch.zeros(0, dtype=torch.long)
        self._none = torch.zeros(0, dtype=torch.long)
        self._steps, self._quiet = 0, 0  # steps made, and the first behind which a task could be near

    def __len__(self) -> int:
        return len(self.measured)

    def begin(self, kl: Tensor, owner: Tensor) -> None:
        """All were measured just now, and the steps to come are of unknown length.

        Args:
            kl: of every retained input, (n,).
            owner: the task of each, (n,) int64.
        """
        count = int(owner[-1]) + 1
        self._then = kl.double()
        self.measured = means(self._then, owner, count)
        self._guesses = self.measured.clone()
        self._speeds = torch.full_like(self.measured, math.sqrt(self.limit))
        self._measured_at = torch.full_like(self.measured, self._steps, dtype=torch.long)
        self._guessed_at = self._measured_at.clone()
        self._none = self._none.to(kl.device)
        self._quiet = 0

    def drawn(self, kl: Tensor, indices: Tensor, owner: Tensor) -> None:
        """Guess anew from some retained inputs: measured KL, mean change of these and its standard error.

        Args:
            kl: of each now, (m,).
            indices: which of the retained inputs, (m,) int64.
            owner: the task of each, (m,) int64.
        """
        change = kl.double().sub_(self._then.index_select(0, indices))
        zeros = torch.zeros_like(self.measured)
        count = zeros.index_add(0, owner, torch.ones_like(change))
        mean = zeros.index_add(0, owner, change).div_(count)
        square = zeros.index_add(0, owner, change.square()).div_(count)
        error = square.addcmul_(mean, mean, value=-1.0).clamp_min_(0.0).div_(count - 1.0).sqrt_()
        told = count > 1.0  # a task that has fewer inputs in this draw keeps the guess it has
        self._guesses = torch.where(told, mean.add_(self.measured).add_(error), self._guesses)
        self._guessed_at = self._guessed_at.masked_fill(told, self._steps)
        self._quiet = 0

    def near(self) -> Tensor:
        """Count a step that was just made; tasks that may have left the budget by it, (r,) int64."""
        self._steps += 1
        if self._steps < self._quiet:
            return self._none
        room = math.sqrt(self.limit) - self._guesses.clamp_min(0.0).sqrt_()
        fitting = self._guessed_at + room.div_(self._speeds.mul(AHEAD))  # the last step that fits
        far = fitting > self._steps
        # what is infinite or no number is near, too; those that are near will be measured before the next step
        if bool(far.all()):
            self._quiet = math.ceil(min(float(fitting.min()), self._steps + FAR))
            return self._none
        return far.logical_not_().nonzero().squeeze(1)

    def take(self, tasks: Tensor, kl: Tensor, indices: Tensor, owner: Tensor) -> Tensor:
        """Measurements of some tasks, on all of their retained inputs; returns their KL, (r,).

        Args:
            tasks: which, (r,) int64.
            kl: of every retained input of these, (m,).
            indices: which inputs, (m,).
            owner: the task of each, (m,).
        """
        kl = kl.double()
        self._then[indices] = kl
        found = means(kl, owner, len(self))[tasks]
        growth = found.sqrt().sub_(self.measured[tasks].sqrt()).abs_()
        lately = growth.div_((self._steps - self._measured_at[tasks]).clamp_min(1))
        self._speeds[tasks] = torch.maximum(lately, REMEMBERED * self._speeds[tasks])
        self.measured[tasks] = self._guesses[tasks] = found
        self._measured_at[tasks] = self._guessed_at[tasks] = self._steps
        return found


def means(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """Mean of the values (n,) of every owner (n,) int64, shape (count,); 0 for owners of none."""
    sums = torch.zeros(count, dtype=values.dtype, device=values.device).index_add_(0, owner, values)
    return sums / torch.bincount(owner, minlength=count).clamp_min(1)
