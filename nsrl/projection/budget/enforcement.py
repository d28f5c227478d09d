"""How a measured budget is kept: restore while that helps, and fall back where it does not.

A projection holds a second-order model of the KL inside the budget, not the KL. After the steps it is therefore
measured; where it is over the budget, Gauss-Newton steps on the model, each made only as far as the measured KL falls,
bring it back; and where those do not, the parameters go back along the segment to the last feasible ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nsrl.projection.budget.model import Quadratic
from nsrl.projection.budget.parameter_krylov import MANY, pull_to_reference
from nsrl.projection.budget.projection import KrylovProjection
from nsrl.projection.optimizer import FlatParameters

#: A restoration that leaves more than this share of the KL has not helped.
HELPED = 0.99
#: Halvings of a restoration's step on the measured KL.
HALVINGS = 5


class Retained(Protocol):
    """Behaviour that is to be kept: a KL that can be measured, and a model of it that can be solved."""

    @property
    def parameters(self) -> FlatParameters:
        """What moves."""
        ...

    def binding_divergence(self) -> float:
        """The KL that counts against the budget, nats; infinity where the model has diverged."""
        ...

    def restoration(self) -> Quadratic[Any]:
        """The model that a restoration is solved on, at the present parameters."""
        ...


@dataclass(frozen=True)
class Kept:
    """What it took to keep a budget.

    Attributes:
        kl: measured last.
        restored: restorations made.
        fell_back: whether the parameters went back towards the feasible ones.
    """

    kl: float
    restored: int
    fell_back: bool


@dataclass(frozen=True)
class Enforcement:
    """Brings behaviour back inside its budget.

    Attributes:
        retained: the behaviour.
        limit: largest KL that is accepted.
        aim: KL that a restoration aims at, below the limit.
        steps: restorations tried before falling back.
        bisections: of the segment to the last feasible parameters.
    """

    retained: Retained
    limit: float
    aim: float
    steps: int
    bisections: int = 12

    def keep(self, feasible: Tensor) -> Kept:
        """Measure; restore; and where that does not do, go back towards feasible parameters (P,) and measure again.

        Whatever is raised on the way leaves the feasible parameters.
        """
        try:
            kl, restored = self.restore_inside(self.retained.binding_divergence())
            fell_back = kl > self.limit
            if fell_back:
                self.fall_back(feasible)
                kl = self.retained.binding_divergence()
        except BaseException:
            self.retained.parameters.write(feasible)
            raise
        return Kept(kl, restored, fell_back)

    def restore_inside(self, kl: float) -> tuple[float, int]:
        """Restore while that helps and a measured KL is over the limit; returns the KL reached and how often."""
        made = 0
        while kl > self.limit and made < self.steps and math.isfinite(kl):
            better = self.restore(kl)
            made += 1
            if better >= HELPED * kl:
                return min(kl, better), made
            kl = better
        return kl, made

    def restore(self, kl: float) -> float:
        """One Gauss-Newton step towards the reference, backtracking on the measured KL; returns the KL reached.

        Args:
            kl: the measured KL now, finite.
        """
        flat, model = self.retained.parameters, self.retained.restoration()
        here = flat.read()
        # The model sees some of what the budget holds for: aim lower by the measured difference.
        aim = self.aim * min(1.0, model.divergence / kl)
        step = _pull(model, torch.zeros_like(here), aim)
        length = 1.0
        for _ in range(HALVINGS):
            flat.write(here + length * step)
            reached = self.retained.binding_divergence()
            if reached < kl:
                return reached
            length *= 0.5
        flat.write(here)
        return kl

    def fall_back(self, feasible: Tensor) -> None:
        """Bisect the segment from feasible parameters (P,) to the present ones for the farthest point inside."""
        flat = self.retained.parameters
        way = torch.nan_to_num(flat.read() - feasible, nan=0.0, posinf=0.0, neginf=0.0)
        low, high = 0.0, 1.0
        for _ in range(self.bisections):
            middle = 0.5 * (low + high)
            flat.write(feasible + middle * way)
            if self.retained.binding_divergence() <= self.limit:
                low = middle
            else:
                high = middle
        flat.write(feasible + low * way)


def _pull(model: Quadratic[Any], nowhere: Tensor, aim: float) -> Tensor:
    """The displacement towards the reference at which the model's KL is the aim, shape (P,)."""
    rows, columns = model.jacobian.shape
    if rows > max(MANY, columns):
        return pull_to_reference(model, aim)
    return KrylovProjection.of(model).project(nowhere, aim).displacement
