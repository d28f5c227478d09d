"""Spectral filters: how much of each eigen-component of a displacement is removed.

A constraint is a quadratic form with eigenvalues s and an orthonormal eigenbasis B. A filter maps the eigenvalues to
fractions f in [0, 1], and the projected displacement is d - B diag(f) B^T d: one for a hard null space, something in
between for a soft one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from nsrl.projection.budget.model import solve_damping
from nsrl.projection.solvers.spectrum import tolerance


class Filter(Protocol):
    """Fractions to remove.

    Attributes:
        joint: the fractions depend on all layers together (a common budget), not on a layer's own eigenvalues.
    """

    joint: ClassVar[bool]

    def removed(self, values: Tensor, components: Tensor | None = None, protected: Tensor | None = None) -> Tensor:
        """The fraction of every component to remove, shape (r,), in [0, 1].

        Args:
            values: eigenvalues s >= 0 in any order, shape (r,), float64.
            components: components of the displacement in the eigenbasis, shape (r,); only `Budget` looks at them.
            protected: mask (r,) of directions that are removed whatever their eigenvalue.
        """
        ...


@dataclass(frozen=True)
class Hard:
    """Removes leading directions fully; without an argument, all whose eigenvalue is not round-off.

    Attributes:
        rank: remove this many leading directions, besides those protected already.
        tolerance: remove the directions with an eigenvalue above this share of the largest (and above round-off).
        energy: remove the smallest leading set that holds this share of the trace, together with the directions
            protected already (GPM's criterion, arXiv 2103.09762).
    """

    rank: int | None = None
    tolerance: float | None = None
    energy: float | None = None
    joint: ClassVar[bool] = False

    def __post_init__(self):
        if sum(choice is not None for choice in (self.rank, self.tolerance, self.energy)) > 1:
            raise ValueError("give Hard one of rank, tolerance and energy, not several")
        if self.rank is not None and self.rank < 0:
            raise ValueError(f"the rank must not be negative, but it is {self.rank}")
        if self.tolerance is not None and not 0.0 <= self.tolerance < 1.0:
            raise ValueError(f"the tolerance is a share of the largest eigenvalue in [0, 1), not {self.tolerance}")
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise ValueError(f"the energy is a share of the trace in (0, 1], not {self.energy}")

    def removed(self, values: Tensor, components: Tensor | None = None, protected: Tensor | None = None) -> Tensor:
        """Ones and zeros, (r,)."""
        if not values.numel():
            return torch.ones_like(values)
        held = torch.zeros_like(values, dtype=torch.bool) if protected is None else protected
        roundoff = tolerance(values.numel(), torch.float64)
        real = (values > max(self.tolerance or 0.0, roundoff) * values.max()) & ~held
        if self.rank is not None or self.energy is not None:
            order = torch.where(real, values, -torch.inf).argsort(descending=True, stable=True)
            real = real & (order.argsort() < self._count(values, real, held))
        return (real | held).to(values)

    def _count(self, values: Tensor, real: Tensor, held: Tensor) -> int:
        if self.rank is not None:
            return self.rank
        assert self.energy is not None
        reached = values[held].sum() + values[real].sort(descending=True).values.cumsum(0)
        wanted = self.energy * values.sum()
        # the round-off in the sum must not add a direction to an exact share
        missing = int((reached < wanted * (1.0 - 1e-12)).sum())
        return 0 if values[held].sum() >= wanted else missing + 1


@dataclass(frozen=True)
class Tikhonov:
    """Removes s / (s + damping): the damped projector I - J^T (J J^T + damping)^{-1} J.

    Attributes:
        damping: l > 0, in the units of the eigenvalues.
    """

    damping: float
    joint: ClassVar[bool] = False

    def __post_init__(self):
        if not self.damping > 0.0:
            raise ValueError(f"the damping must be positive, not {self.damping}; Hard() is its limit at 0")

    def removed(self, values: Tensor, components: Tensor | None = None, protected: Tensor | None = None) -> Tensor:
        """The fractions s / (s + l), (r,)."""
        return _with(protected, values / (values + self.damping))


@dataclass(frozen=True)
class ScaledGradient:
    """Removes (alpha + 1) sigma / (alpha sigma + sigma_max), sigma = sqrt(s): scaled gradient projection.

    The importance of a direction in SGP (arXiv 2302.01386), where sigma are the singular values of the
    features: 1 for the strongest direction, alpha -> infinity is the hard projection.

    Attributes:
        alpha: scale coefficient >= 0.
    """

    alpha: float = 10.0
    joint: ClassVar[bool] = False

    def __post_init__(self):
        if not self.alpha >= 0.0:
            raise ValueError(f"alpha must not be negative, but it is {self.alpha}")

    def removed(self, values: Tensor, components: Tensor | None = None, protected: Tensor | None = None) -> Tensor:
        """The importances, (r,)."""
        singular = values.sqrt()
        if not values.numel() or float(singular.max()) == 0.0:
            return _with(protected, torch.zeros_like(values))
        importance = (self.alpha + 1.0) * singular / (self.alpha * singular + singular.max())
        return _with(protected, importance.clamp_max(1.0))


@dataclass(frozen=True)
class Budget:
    """Tikhonov at the largest damping that keeps the quadratic form of the rest, 1/2 d^T F d, inside a budget.

    A displacement that is inside the budget already passes unchanged.

    Attributes:
        kl_budget: largest 1/2 sum s_i c_i^2 (l / (s_i + l))^2; 0 removes every direction.
    """

    kl_budget: float
    joint: ClassVar[bool] = True

    def __post_init__(self):
        if not self.kl_budget >= 0.0:
            raise ValueError(f"the budget must not be negative, but it is {self.kl_budget}")

    def removed(self, values: Tensor, components: Tensor | None = None, protected: Tensor | None = None) -> Tensor:
        """The fractions s / (s + l), (r,), at the damping l that spends the budget.

        Raises:
            ValueError: `components` are missing.
        """
        if components is None:
            raise ValueError("Budget needs the components of the displacement: what it removes depends on them")
        weights = values * components.double().square()
        if protected is not None:
            weights = weights.masked_fill(protected, 0.0)
        damping = solve_damping(values, weights, self.kl_budget, tolerance(values.numel(), torch.float64))
        if math.isinf(damping):
            fractions = torch.zeros_like(values)
        else:
            fractions = torch.where(values > 0.0, values / (values + damping), 0.0)
        return _with(protected, fractions)


@dataclass(frozen=True)
class SmallestMultiple:
    """Adam-NSCL's rule: keep the directions with s <= a s_min, remove the others fully. For comparison only.

    With fewer retained inputs than dimensions s_min is zero but for round-off, so nearly everything is removed; with
    more of them s_min becomes the smallest real eigenvalue and everything below a s_min is set free, protected before
    or not. The published log keeps 5 of 4608 dimensions after the first task and 1639 after the ninth, although nine
    times as much is to be protected (arXiv 2103.07113 and its code).

    Attributes:
        multiple: a >= 1.
    """

    multiple: float = 10.0
    joint: ClassVar[bool] = False

    def __post_init__(self):
        if not self.multiple >= 1.0:
            raise ValueError(f"the multiple of the smallest eigenvalue must be at least 1, not {self.multiple}")

    def removed(self, values: Tensor, components: Tensor | None = None, protected: Tensor | None = None) -> Tensor:
        """Ones and zeros, (r,)."""
        if not values.numel():
            return torch.ones_like(values)
        return _with(protected, (values > self.multiple * values.min()).to(values))


def _with(protected: Tensor | None, fractions: Tensor) -> Tensor:
    return fractions if protected is None else fractions.masked_fill(protected, 1.0)
