"""The natural gradient of a rollout: its Fisher information in output space, and conjugate gradients on it.

With J the Jacobian of the policy outputs (logits, or mean and log standard deviation), whitened by the analytic Fisher
information of the outputs, F = J^T J is the Fisher information of the policy and the Hessian of the mean KL divergence
that a step makes. Two passes through the network multiply with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from nsrl.projection.jacobians.matrix_free import Product, Products
from nsrl.projection.solvers.conjugate_gradients import PRECISION, KrylovSolution, conjugate_gradients
from nsrl.projection.solvers.kfac import KroneckerPreconditioner


@dataclass(frozen=True)
class Step:
    """A displacement that both quadratic models allow.

    Attributes:
        displacement: d, shape (P,).
        multiplier: mu; 0 where the retention budget does not bind, infinity in the hard null space.
        gain: -g.d, what the linearised surrogate improves by.
        kept: share of the unconstrained step's gain that is left; in the hard null space of the gradient's norm.
        kl: the model's KL on the rollout, 1/2 d^T F d.
        retained: the model's KL on the buffer; NaN without one.
        residual: of the stationarity condition, relative, in the preconditioner's norm where there is one.
        iterations: products with F.
        scale: s in (F + damping + mu K) d = -(s g + mu J_ret^T rho).
    """

    displacement: Tensor
    multiplier: float
    kept: float
    gain: float
    kl: float
    retained: float
    residual: float
    iterations: int
    scale: float


@dataclass(frozen=True)
class LocalModel:
    """The linearised loss and the quadratic trust region of one rollout.

    Attributes:
        fisher: whitened Jacobian J of the rollout, F = J^T J.
        gradient: g, of the loss (which falls), shape (P,).
        radius: largest 1/2 d^T F d.
        damping: added to F for the direction, not for its length.
        iterations: of one run of conjugate gradients, at most.
        precision: relative residual at which they stop.
        free: 1 for parameters that may move, 0 for others, shape (P,); None for all.

    Conjugate gradients are preconditioned by Kronecker factors of F where it has some, except in a null space, which
    a preconditioner would lead out of.
    """

    fisher: Products
    gradient: Tensor
    radius: float
    damping: float
    iterations: int
    precision: float = PRECISION
    free: Tensor | None = None

    def step(self) -> Step:
        """The natural-gradient step: all the way to the trust region's edge, whatever a buffer says."""
        return self.explore()[0]

    def explore(self) -> tuple[Step, list[Tensor]]:
        """The natural-gradient step, and the search directions that led to it."""
        factors = self.fisher.factors()
        if self.free is not None:
            factors = [layer.restricted(self.free) for layer in factors]
        divide = KroneckerPreconditioner(factors, self.damping)
        gradient = self._confined(self.gradient)
        found = conjugate_gradients(
            lambda v: self._confined(self._damped(v)),
            -gradient,
            self.iterations,
            self.precision,
            lambda v: self._confined(divide(v)),
        )
        return self._scaled(found, 0.0, 1.0), found.directions

    def null_step(self, project: Product) -> Step:
        """The step in the null space that `project`, an orthogonal projector, leaves: CG on P F P."""
        gradient, size = project(self.gradient), float(self.gradient.norm())
        found = conjugate_gradients(lambda v: project(self._damped(v)), -gradient, self.iterations, self.precision)
        return self._scaled(found, math.inf, float(gradient.norm()) / size if size > 0.0 else 1.0)

    def _damped(self, vector: Tensor) -> Tensor:
        return self.fisher.rmatvec(self.fisher.matvec(vector)) + self.damping * vector

    def _confined(self, vector: Tensor) -> Tensor:
        return vector if self.free is None else vector * self.free

    def _scaled(self, found: KrylovSolution, multiplier: float, kept: float) -> Step:
        curvature = float(self.fisher.matvec(found.vector).double().square().sum())
        length = math.sqrt(2.0 * self.radius / curvature) if curvature > 0.0 else 0.0
        displacement = length * found.vector
        gain, kl = -float(self.gradient @ displacement), 0.5 * length**2 * curvature
        return Step(displacement, multiplier, kept, gain, kl, math.nan, found.residual, len(found.directions), length)
