"""The budgeted projection: the closest displacement that keeps a second-order KL model inside its budget.

Around the linearisation point the measured KL of a displacement d is modelled as

    KL(d) = KL(0) - 1/2 |rho|^2 + 1/2 |rho + J d|^2                                                   (DESIGN, section 2)

and the closest displacement to a proposal d0 (in the metric V^{-1}) with KL(d) <= budget is

    d* = d0 - V J^T (J V J^T + lambda I)^{-1} (J d0 + rho)

with the unique lambda at which the model equals the budget: infinity when d0 is inside already (d* = d0), zero for
budget 0 (the hard null space plus a Gauss-Newton pull to the reference). Because rho + J d0 is all that matters, d0
may be any displacement *from the linearisation point*: projecting the running total projects every step.

Two solvers: `SpectralProjection` decomposes the Gram matrix once and answers many proposals; `KrylovProjection` never
forms it and answers one proposal in some tens of products with J, whatever the number of rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from nsrl.projection.jacobian import Jacobian
from nsrl.projection.spectrum import Spectrum, spectrum


@dataclass(frozen=True)
class Projection:
    """A projected displacement and its certificate.

    Attributes:
        displacement: d*, shape (P,).
        damping: lambda; infinity when the proposal was inside the budget, 0 for the hard null space.
        predicted: the model's KL at d*.
        kept: |d*| / |d0|, the share of the proposed displacement's norm that survives.
        residual: |K y + lambda y - b| / |b| of the solve behind d* (0 when nothing was to solve).
        iterations: Krylov dimension, or 1.
        seconds: wall time.
    """

    displacement: Tensor
    damping: float
    predicted: float
    kept: float
    residual: float
    iterations: int
    seconds: float

    @property
    def multiplier(self) -> float:
        """1 / lambda: the Lagrange multiplier of the budget, in units of (displacement in V^{-1}) / (gradient)."""
        return 0.0 if math.isinf(self.damping) else 1.0 / max(self.damping, 1e-300)


def _kept(projected: Tensor, proposal: Tensor) -> float:
    norm = float(proposal.norm())
    return float(projected.norm()) / norm if norm > 0 else 1.0


def solve_damping(values: Tensor, weights: Tensor, target: float) -> float:
    """The lambda at which 1/2 sum weights (lambda / (values + lambda))^2 equals `target`.

    Monotone in lambda, so bisection on log lambda brackets and Newton finishes; O(k) an evaluation.

    Args:
        values: eigenvalues s >= 0, shape (k,).
        weights: squared components b^2 of J d0 + rho in the eigenbasis, shape (k,).
        target: what the quadratic term may amount to.

    Returns:
        lambda in [0, infinity]; 0 when even the hard projection leaves more than `target`.
    """
    total = 0.5 * float(weights.sum())
    if total <= target:
        return math.inf
    top = float(values.max()) if values.numel() else 0.0
    if top <= 0.0:
        return 0.0
    low, high = math.log(top) - 60.0, math.log(top) + 0.5 * math.log(max(total / max(target, 1e-300), 1.0)) + 60.0

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


class SpectralProjection:
    """Budgeted projection through one eigen-decomposition of the Gram matrix.

    Args:
        jacobian: J at the linearisation point, shape (k, P).
        residual: rho, shape (k,).
        divergence: KL(0) at the linearisation point, on the same states.
        scale: V^{1/2}, shape (P,), or None for the Euclidean metric. Linear layers use its rank-one fit.
        passes: projection passes of the hard null space; two reach 1e-9 in float32 (DESIGN, section 3).
    """

    def __init__(self, jacobian: Jacobian, residual: Tensor, divergence: float, scale: Tensor | None = None,
                 passes: int = 2):  # fmt: skip
        self.jacobian = jacobian
        self.scale: Tensor | None = None
        if scale is not None:
            self.jacobian, self.scale = jacobian.scaled(scale)
        self.residual = residual
        self.offset = divergence - 0.5 * float(residual.double().square().sum())
        self.passes = passes
        self.spectrum: Spectrum = spectrum(self.jacobian.gram(), jacobian.shape[1], residual.dtype)

    def project(self, proposal: Tensor, budget: float) -> Projection:
        """The closest displacement to `proposal` (P,) whose modelled KL is at most `budget` (0: hard null space)."""
        start = perf_counter()
        if budget <= 0.0:
            return self._harden(proposal, start)
        moved = self.residual.double() + self.jacobian.matvec(self._whitened(proposal)).double()
        components = self.spectrum.vectors.T @ moved
        damping = solve_damping(self.spectrum.values, components.square(), budget - self.offset)
        if math.isinf(damping):
            predicted = self.offset + 0.5 * float(moved.square().sum())
            return Projection(proposal, damping, predicted, 1.0, 0.0, 0, perf_counter() - start)
        if damping == 0.0:
            return self._harden(proposal, start)
        filtered = self.spectrum.vectors @ (components / (self.spectrum.values + damping))
        displacement = proposal - self._pulled(filtered)
        left = (components * (damping / (self.spectrum.values + damping))).square().sum()
        predicted = self.offset + 0.5 * float(left)
        return Projection(displacement, damping, predicted, _kept(displacement, proposal), 0.0, 1,
                          perf_counter() - start)  # fmt: skip

    def null(self, vector: Tensor, damping: float = 0.0) -> Tensor:
        """Remove the protected directions from a vector, without the pull to the reference.

        `damping` 0 is the hard projector I - V J^T (J V J^T)^+ J; larger values soften it.
        """
        result = vector
        for _ in range(self.passes if damping == 0.0 else 1):
            moved = self.spectrum.vectors.T @ self.jacobian.matvec(self._whitened(result)).double()
            result = result - self._pulled(self.spectrum.vectors @ (moved * self._inverse(damping)))
        return result

    def _harden(self, proposal: Tensor, start: float) -> Projection:
        displacement = proposal
        for _ in range(self.passes):
            moved = self.residual.double() + self.jacobian.matvec(self._whitened(displacement)).double()
            components = (self.spectrum.vectors.T @ moved) * self._inverse(0.0)
            displacement = displacement - self._pulled(self.spectrum.vectors @ components)
        left = self.residual.double() + self.jacobian.matvec(self._whitened(displacement)).double()
        predicted = self.offset + 0.5 * float(left.square().sum())
        return Projection(displacement, 0.0, predicted, _kept(displacement, proposal), 0.0, self.passes,
                          perf_counter() - start)  # fmt: skip

    def _inverse(self, damping: float) -> Tensor:
        values = self.spectrum.values
        if damping > 0.0:
            return 1.0 / (values + damping)
        kept = torch.arange(values.numel(), device=values.device) < self.spectrum.rank
        return torch.where(kept, 1.0 / values.clamp_min(1e-300), torch.zeros_like(values))

    # The scaled Jacobian is J V^{1/2}: a displacement enters it as V^{-1/2} d and a pull leaves it as V^{1/2} (...).
    def _whitened(self, vector: Tensor) -> Tensor:
        return vector if self.scale is None else vector / self.scale

    def _pulled(self, rows: Tensor) -> Tensor:
        pulled = self.jacobian.rmatvec(rows.to(self.residual.dtype))
        return pulled if self.scale is None else pulled * self.scale


class KrylovProjection:
    """Budgeted projection of one proposal by Lanczos on K = J V J^T, started at b = J d0 + rho.

    In the Krylov basis the filter lambda (K + lambda)^{-1} b is known for *every* lambda from one small tridiagonal
    matrix, so the root costs nothing; the true residual of the model is tracked exactly.

    Args:
        jacobian, residual, divergence, scale: as for `SpectralProjection`.
        iterations: largest Krylov dimension.
        tolerance: stop when the unresolved part of the modelled KL is below this share of the budget.
    """

    def __init__(self, jacobian: Jacobian, residual: Tensor, divergence: float, scale: Tensor | None = None,
                 iterations: int = 40, tolerance: float = 0.02):  # fmt: skip
        self.jacobian = jacobian
        self.scale: Tensor | None = None
        if scale is not None:
            self.jacobian, self.scale = jacobian.scaled(scale)
        self.residual = residual
        self.offset = divergence - 0.5 * float(residual.double().square().sum())
        self.iterations = iterations
        self.tolerance = tolerance

    def project(self, proposal: Tensor, budget: float) -> Projection:
        """The closest displacement to `proposal` whose modelled KL is at most `budget`, up to the Krylov tolerance."""
        start = perf_counter()
        moved = self.residual.double() + self.jacobian.matvec(self._whitened(proposal)).double()
        norm = float(moved.norm())
        target = budget - self.offset
        if 0.5 * norm**2 <= target or norm == 0.0:
            return Projection(proposal, math.inf, self.offset + 0.5 * norm**2, 1.0, 0.0, 0, perf_counter() - start)
        basis = [moved / norm]
        diagonal: list[float] = []
        beside: list[float] = []
        damping, small, left = 0.0, torch.zeros(0), math.inf
        for step in range(1, self.iterations + 1):
            image = self._gram_product(basis[-1])
            diagonal.append(float(basis[-1] @ image))
            stacked = torch.stack(basis)
            for _ in range(2):  # full reorthogonalisation, twice: few vectors, exact arithmetic matters more
                image = image - stacked.T @ (stacked @ image)
            beta = float(image.norm())
            damping, small, left = _filter(diagonal, beside, beta, norm, target)
            unresolved = 0.5 * (beta * float(small[-1])) ** 2
            resolved = unresolved <= self.tolerance * max(budget, 0.0) or beta <= 1e-10 * diagonal[0]
            if resolved or step in (self.iterations, len(moved)):
                break
            beside.append(beta)
            basis.append(image / beta)
        stacked = torch.stack(basis)
        displacement = proposal - self._pulled(stacked.T @ small.to(stacked))
        residual = beta * abs(float(small[-1])) / norm
        return Projection(displacement, damping, self.offset + left, _kept(displacement, proposal), residual,
                          len(basis), perf_counter() - start)  # fmt: skip

    def _gram_product(self, rows: Tensor) -> Tensor:
        return self.jacobian.matvec(self.jacobian.rmatvec(rows.to(self.residual.dtype))).double()

    def _whitened(self, vector: Tensor) -> Tensor:
        return vector if self.scale is None else vector / self.scale

    def _pulled(self, rows: Tensor) -> Tensor:
        pulled = self.jacobian.rmatvec(rows.to(self.residual.dtype))
        return pulled if self.scale is None else pulled * self.scale


def _filter(
    diagonal: list[float], beside: list[float], beta: float, norm: float, target: float
) -> tuple[float, Tensor, float]:
    """Root of the budget in the Krylov space: lambda, y = |b| (T + lambda)^{-1} e_1, and the modelled 1/2 |b - K y|^2."""
    size = len(diagonal)
    tri = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        off = torch.tensor(beside[: size - 1], dtype=torch.float64)
        tri += torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(tri)
    values = values.clamp_min(0.0)
    first = vectors[0] * norm
    damping = solve_damping(values, first.square(), max(target, 0.0))
    floor = 1e-12 * float(values.max())
    small = vectors @ (first / (values + max(damping, floor)))
    inside = 0.5 * float((first * (damping / (values + max(damping, floor)))).square().sum())
    return damping, small, inside + 0.5 * (beta * float(small[-1])) ** 2
