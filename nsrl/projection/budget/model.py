"""The second-order model of the KL around a linearisation point, and a displacement that was projected into its budget.

KL(d) = KL(0) - 1/2 |rho|^2 + 1/2 |rho + J d|^2
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nsrl.projection.jacobians.factored import Jacobian
from nsrl.projection.solvers.certificate import Certificate


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
    """What the solvers of a budget share: J V^{1/2}, rho and the constant of the quadratic model."""

    def __init__(self, jacobian: Jacobian, residual: Tensor, divergence: float, scale: Tensor | None):
        rows, columns = jacobian.shape
        if residual.shape != (rows,):
            raise ValueError(
                f"the residual must have shape ({rows},), one entry a row of J, not {tuple(residual.shape)}"
            )
        if not bool(torch.isfinite(residual).all()) or not math.isfinite(divergence):
            raise ValueError("the residual or the divergence is NaN or infinite; the model's outputs have diverged")
        self.jacobian = jacobian
        self.scale: Tensor | None = None
        if scale is not None:
            if scale.shape != (columns,) or not bool((scale > 0.0).all()):
                raise ValueError(f"the scale must be {columns} positive numbers")
            self.jacobian, self.scale = jacobian.scaled(scale)
        self.residual = residual
        self.offset = divergence - 0.5 * float(residual.double().square().sum())

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
