"""The natural gradient of a rollout: its Fisher information in output space, and conjugate gradients on it.

With J the Jacobian of the policy outputs (logits, or mean and log standard deviation), whitened by the analytic Fisher
information of the outputs, F = J^T J is the Fisher information of the policy and the Hessian of the mean KL divergence
that a step makes. Two passes through the network multiply with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nsrl.projection.jacobians.matrix_free import Passes
from nsrl.projection.solvers.kfac import KroneckerPreconditioner, LayerFactors

Product = Callable[[Tensor], Tensor]

#: Relative residual, in the preconditioner's norm where there is one, at which conjugate gradients stop. On HalfCheetah
#: that is after 10 iterations, from where on the step's gain grows by 3 %; without a preconditioner, by 45 % after 15.
PRECISION = 0.1
#: Curvature v.Av / v.v that counts as none.
FLAT = 1e-12


class Products(Protocol):
    """A Jacobian as conjugate gradients need it."""

    def matvec(self, vector: Tensor) -> Tensor:
        """J v, shape (k,), for v of shape (P,)."""
        ...

    def rmatvec(self, rows: Tensor) -> Tensor:
        """J^T u, shape (P,), for u of shape (k,)."""
        ...

    def factors(self) -> list[LayerFactors]:
        """Kronecker factors of the blocks of J^T J that are known; none of the others."""
        ...


class PolicyJacobian:
    """Whitened Jacobian of a policy's outputs at one batch: J^T J is the Fisher information, a mean over states.

    A product with J^T J is two passes through the network and positive semi-definite by construction.

    Args:
        passes: through the actor, on N states.
        seeds: S, shape (N, R, O): S^T S / N is the Fisher information of a state's outputs, times its weight.
        log_std: columns, as start and stop, of a state-independent log standard deviation, which the network does
            not reach and whose Fisher information is 2; None without.
    """

    def __init__(self, passes: Passes, seeds: Tensor, log_std: tuple[int, int] | None = None):
        self._passes = passes
        self._seeds = seeds / math.sqrt(len(passes.outputs))
        self._log_std = log_std

    def matvec(self, vector: Tensor) -> Tensor:
        """J v for v of shape (P,): shape (N R + entries of log_std,)."""
        if self._log_std is None:
            return torch.einsum("nro,no->nr", self._seeds, self._passes.push(vector)).flatten()
        start, stop = self._log_std
        moved = self._passes.push(torch.cat([vector[:start], vector[stop:]]))
        rows = torch.einsum("nro,no->nr", self._seeds, moved).flatten()
        return torch.cat([rows, math.sqrt(2.0) * vector[start:stop]])

    def rmatvec(self, rows: Tensor) -> Tensor:
        """J^T u for such rows u: shape (P,)."""
        n, r, _ = self._seeds.shape
        cotangents = torch.einsum("nro,nr->no", self._seeds, rows[: n * r].view(n, r))
        pulled = self._passes.pull(cotangents)
        if self._log_std is None:
            return pulled
        start = self._log_std[0]
        return torch.cat([pulled[:start], math.sqrt(2.0) * rows[n * r :], pulled[start:]])

    def factors(self) -> list[LayerFactors]:
        """Kronecker factors of the blocks of J^T J: of linear layers in a chain, and of log_std."""
        found = self._passes.factors(self._seeds)
        if self._log_std is None:
            return found
        start, stop = self._log_std
        moved = [factors.shifted(lambda column: column + (stop - start if column >= start else 0)) for factors in found]
        identity = torch.eye(stop - start, dtype=self._seeds.dtype, device=self._seeds.device)
        return [*moved, LayerFactors(identity[:1, :1], 2.0 * identity, start, None)]


@dataclass(frozen=True)
class Solution:
    """What conjugate gradients found.

    Attributes:
        vector: x, in the Krylov space of the right-hand side, since they start at 0.
        residual: |b - A x| / |b| by recurrence, in the norm that was asked for; 0 for b = 0.
        directions: the search directions, at most one an iteration.
        curved: whether every direction had positive curvature (else they stopped there).
    """

    vector: Tensor
    residual: float
    directions: list[Tensor]
    curved: bool


def conjugate_gradients(product: Product, rhs: Tensor, iterations: int, precision: float = PRECISION,
                        precondition: Product | None = None) -> Solution:  # fmt: skip
    """Solve A x = b from x = 0 for a positive semi-definite A.

    Args:
        product: v -> A v.
        rhs: b, shape (P,).
        iterations: at most so many products.
        precision: relative residual to stop at.
        precondition: v -> M^-1 v for a positive definite M near A; residuals are then measured by |r|^2 = r^T M^-1 r,
            which is nearly what a step gains from going on.
    """
    solve = precondition or (lambda vector: vector)
    solution, residual = torch.zeros_like(rhs), rhs
    towards = solve(residual)
    first = squared = float(residual @ towards)
    directions: list[Tensor] = []
    if not 0.0 < first < math.inf:
        return Solution(solution, 0.0 if first == 0.0 else math.nan, directions, True)
    direction = towards
    curved = True
    for _ in range(iterations):
        image = product(direction)
        curvature = float(direction @ image)
        if not curvature > FLAT * float(direction @ direction):  # NaN too
            curved = False
            break
        directions.append(direction)
        solution = solution + (squared / curvature) * direction
        residual = residual - (squared / curvature) * image
        towards = solve(residual)
        previous, squared = squared, float(residual @ towards)
        if squared <= precision**2 * first:
            break
        direction = towards + (squared / previous) * direction
    return Solution(solution, math.sqrt(max(squared, 0.0) / first), directions, curved)


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

    Conjugate gradients are preconditioned by Kronecker factors of F where it has some, except in a null space, which
    a preconditioner would lead out of.
    """

    fisher: Products
    gradient: Tensor
    radius: float
    damping: float
    iterations: int
    precision: float = PRECISION

    def step(self) -> Step:
        """The natural-gradient step: all the way to the trust region's edge, whatever a buffer says."""
        return self.explore()[0]

    def explore(self) -> tuple[Step, list[Tensor]]:
        """The natural-gradient step, and the search directions that led to it."""
        divide = KroneckerPreconditioner(self.fisher.factors(), self.damping)
        found = conjugate_gradients(self._damped, -self.gradient, self.iterations, self.precision, divide)
        return self._scaled(found, 0.0, 1.0), found.directions

    def null_step(self, project: Product) -> Step:
        """The step in the null space that `project`, an orthogonal projector, leaves: CG on P F P."""
        gradient, size = project(self.gradient), float(self.gradient.norm())
        found = conjugate_gradients(lambda v: project(self._damped(v)), -gradient, self.iterations, self.precision)
        return self._scaled(found, math.inf, float(gradient.norm()) / size if size > 0.0 else 1.0)

    def _damped(self, vector: Tensor) -> Tensor:
        return self.fisher.rmatvec(self.fisher.matvec(vector)) + self.damping * vector

    def _scaled(self, found: Solution, multiplier: float, kept: float) -> Step:
        curvature = float(self.fisher.matvec(found.vector).double().square().sum())
        length = math.sqrt(2.0 * self.radius / curvature) if curvature > 0.0 else 0.0
        displacement = length * found.vector
        gain, kl = -float(self.gradient @ displacement), 0.5 * length**2 * curvature
        return Step(displacement, multiplier, kept, gain, kl, math.nan, found.residual, len(found.directions), length)
