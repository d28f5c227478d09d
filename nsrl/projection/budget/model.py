"""The second-order model of the KL around a linearisation point, and a displacement that was projected into its budget.

KL(d) = KL(0) - 1/2 |rho|^2 + 1/2 |rho + J d|^2
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from nsrl.projection.jacobians.factored import Jacobian
from nsrl.projection.jacobians.matrix_free import Products
from nsrl.projection.solvers.solver import Certificate

if TYPE_CHECKING:
    from typing_extensions import Self


#: A Jacobian whose Gram matrix can be formed, or one that only multiplies.
J = TypeVar("J", bound=Jacobian | Products, covariant=True)


@dataclass(frozen=True)
class Quadratic(Generic[J]):
    """The second-order model of the mean KL on some states: KL(0) - 1/2 |rho|^2 + 1/2 |rho + J d|^2.

    Attributes:
        jacobian: J, whitened, shape (k, P).
        residual: rho, shape (k,).
        divergence: KL(0).
    """

    jacobian: J
    residual: Tensor
    divergence: float

    @property
    def offset(self) -> float:
        """KL(0) - 1/2 |rho|^2: what is left where the outputs meet the reference."""
        return self.divergence - 0.5 * float(self.residual.double().square().sum())

    def predict(self, displacement: Tensor) -> float:
        """KL after a displacement (P,)."""
        change = self.jacobian.matvec(displacement).double()
        return self.divergence + float(change @ self.residual.double()) + 0.5 * float(change @ change)


@dataclass(frozen=True)
class Projection:
    """A projected displacement and what it is worth.

    Attributes:
        displacement: d*, shape (P,).
        predicted: the model's KL at d*.
        kept: |d*| / |d0|, the share of the proposed displacement's norm that survives.
        certificate: of the solve behind d*. Its residual, 0 when nothing was to solve, is measured at d* in the dtype
            of d*: |rho + J d* - lambda y| / |rho + J d0|. A damped "primal" solve has no y; there it is the same after
            multiplication with J^T, the gradient that is left.
    """

    displacement: Tensor
    predicted: float
    kept: float
    certificate: Certificate

    @property
    def damping(self) -> float:
        """Lambda; infinity when the proposal was inside the budget, 0 for the hard null space."""
        return self.certificate.damping

    @property
    def multiplier(self) -> float:
        """1 / lambda: the Lagrange multiplier of the budget, in units of (displacement in V^{-1}) / (gradient)."""
        return 0.0 if math.isinf(self.damping) else 1.0 / max(self.damping, 1e-300)

    @property
    def residual(self) -> float:
        """Of the certificate."""
        return self.certificate.residual

    @property
    def rank(self) -> int:
        """Of the certificate."""
        return self.certificate.rank

    @property
    def effective_dimension(self) -> float:
        """Of the certificate."""
        return self.certificate.effective_dimension

    @property
    def iterations(self) -> int:
        """Krylov dimension, or passes."""
        return self.certificate.passes

    @property
    def seconds(self) -> float:
        """Wall time."""
        return self.certificate.seconds


def _kept(projected: Tensor, proposal: Tensor) -> float:
    norm = float(proposal.norm())
    return float(projected.norm()) / norm if norm > 0 else 1.0


class Projector:
    """What the solvers of a budget share: the quadratic model, in coordinates in which the metric is Euclidean.

    Attributes:
        model: with J V^{1/2} for the Jacobian.
        scale: V^{1/2}, or None for the Euclidean metric.
    """

    def __init__(self, jacobian: Jacobian, residual: Tensor, divergence: float, scale: Tensor | None):
        rows, columns = jacobian.shape
        if residual.shape != (rows,):
            raise ValueError(
                f"the residual must have shape ({rows},), one entry a row of J, not {tuple(residual.shape)}"
            )
        if not bool(torch.isfinite(residual).all()) or not math.isfinite(divergence):
            raise ValueError("the residual or the divergence is NaN or infinite; the model's outputs have diverged")
        self.scale: Tensor | None = None
        if scale is not None:
            if scale.shape != (columns,) or not bool((scale > 0.0).all()):
                raise ValueError(f"the scale must be {columns} positive numbers")
            jacobian, self.scale = jacobian.scaled(scale)
        self.model = Quadratic(jacobian, residual, divergence)
        self.jacobian, self.residual, self.offset = jacobian, residual, self.model.offset

    @classmethod
    def of(cls, model: Quadratic[Jacobian], scale: Tensor | None = None) -> Self:
        """The projector of a model, with the default settings of the class."""
        return cls(model.jacobian, model.residual, model.divergence, scale)

    def _check(self, proposal: Tensor, budget: float) -> None:
        if math.isnan(budget):
            raise ValueError("the budget is NaN")
        if proposal.shape != (self.jacobian.shape[1],) or not bool(torch.isfinite(proposal).all()):
            raise ValueError(f"the proposal must be {self.jacobian.shape[1]} finite numbers")

    def _reached(self, displacement: Tensor) -> Tensor:
        """Rho + J d, float64.

        Raises:
            ValueError: NaN or infinite entries, of which a comparison with the budget would say nothing.
        """
        reached = self.residual.double() + self.jacobian.matvec(self._whitened(displacement)).double()
        if not bool(torch.isfinite(reached).all()):
            raise ValueError("the Jacobian's product with a displacement is NaN or infinite; one of them has diverged")
        return reached

    # The scaled Jacobian is J V^{1/2}: a displacement enters it as V^{-1/2} d and a pull leaves it as V^{1/2} (...).
    def _whitened(self, vector: Tensor) -> Tensor:
        return vector if self.scale is None else vector / self.scale

    def _unwhitened(self, vector: Tensor) -> Tensor:
        return vector if self.scale is None else vector * self.scale

    def _made(self, displacement: Tensor, proposal: Tensor, reached: Tensor, certificate: Certificate) -> Projection:
        predicted = self.offset + 0.5 * float(reached.square().sum())
        return Projection(displacement, predicted, _kept(displacement, proposal), certificate)


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
