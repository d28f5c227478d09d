"""The budgeted projection: the closest displacement that keeps a second-order KL model inside its budget.

Around the linearisation point the measured KL of a displacement d is modelled as

    KL(d) = KL(0) - 1/2 |rho|^2 + 1/2 |rho + J d|^2

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
from nsrl.projection.spectrum import Spectrum, spectrum, tolerance


@dataclass(frozen=True)
class Projection:
    """A projected displacement and its certificate.

    Attributes:
        displacement: d*, shape (P,).
        damping: lambda; infinity when the proposal was inside the budget, 0 for the hard null space.
        predicted: the model's KL at d*.
        kept: |d*| / |d0|, the share of the proposed displacement's norm that survives.
        residual: |K y + lambda y - b| / |b| of the solve behind d*, measured (0 when nothing was to solve).
        iterations: Krylov dimension, or passes.
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
    """
    total = 0.5 * float(weights.sum())
    if total <= target:
        return math.inf
    top = float(values.max()) if values.numel() else 0.0
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


class _Projector:
    """What both solvers share: J V^{1/2}, rho and the constant of the quadratic model."""

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
        """Rho + J d, float64."""
        return self.residual.double() + self.jacobian.matvec(self._whitened(displacement)).double()

    # The scaled Jacobian is J V^{1/2}: a displacement enters it as V^{-1/2} d and a pull leaves it as V^{1/2} (...).
    def _whitened(self, vector: Tensor) -> Tensor:
        return vector if self.scale is None else vector / self.scale

    def _pulled(self, rows: Tensor) -> Tensor:
        pulled = self.jacobian.rmatvec(rows.to(self.residual.dtype))
        return pulled if self.scale is None else pulled * self.scale

    def _inside(self, proposal: Tensor, reached: Tensor, start: float) -> Projection:
        """The proposal as it is: its model is within the budget."""
        predicted = self.offset + 0.5 * float(reached.square().sum())
        return Projection(proposal, math.inf, predicted, 1.0, 0.0, 0, perf_counter() - start)


class SpectralProjection(_Projector):
    """Budgeted projection through one eigen-decomposition of the Gram matrix.

    Args:
        jacobian: J at the linearisation point, shape (k, P).
        residual: rho, shape (k,).
        divergence: KL(0) at the linearisation point, on the same states.
        scale: V^{1/2}, positive, shape (P,), or None for the Euclidean metric. Linear layers use its rank-one fit.
        passes: largest number of projection passes; two reach 1e-9 in float32 up to condition number 1e5.

    Raises:
        ValueError: wrong shapes, a scale that is not positive, NaN or infinite entries.
    """

    def __init__(self, jacobian: Jacobian, residual: Tensor, divergence: float, scale: Tensor | None = None,
                 passes: int = 2):  # fmt: skip
        super().__init__(jacobian, residual, divergence, scale)
        self.passes = passes
        self.spectrum: Spectrum = spectrum(self.jacobian.gram(), residual.dtype)
        self._floor = tolerance(len(residual), residual.dtype)

    def project(self, proposal: Tensor, budget: float) -> Projection:
        """The closest displacement to `proposal` (P,) whose modelled KL is at most `budget` (0: hard null space)."""
        start = perf_counter()
        self._check(proposal, budget)
        reached = self._reached(proposal)
        target = budget - self.offset
        if budget > 0.0 and 0.5 * float(reached.square().sum()) <= target:
            return self._inside(proposal, reached, start)
        damping = 0.0
        if budget > 0.0:
            components = self.spectrum.vectors.T @ reached
            damping = solve_damping(self.spectrum.values, components.square(), target, self._floor)
        return self._damped(proposal, reached, damping, start)

    def null(self, vector: Tensor, damping: float = 0.0) -> Tensor:
        """Remove the protected directions from a vector, without the pull to the reference.

        `damping` 0 is the hard projector I - V J^T (J V J^T)^+ J; larger values soften it.
        """
        result = vector
        for _ in range(self.passes if damping == 0.0 else 1):
            result = result - self._pulled(self._solve(self.jacobian.matvec(self._whitened(result)).double(), damping))
        return result

    def _damped(self, proposal: Tensor, reached: Tensor, damping: float, start: float) -> Projection:
        """d0 - V J^T y with (K + lambda) y = b, refined until rho + J d = lambda y, as the exact solution has it."""
        norm = float(reached.norm())
        displacement, dual, wrong = proposal, torch.zeros_like(reached), reached
        passes = 0
        while passes < self.passes and float(wrong.norm()) > 1e-9 * norm:
            correction = self._solve(wrong, damping)
            displacement = displacement - self._pulled(correction)
            dual = dual + correction
            reached = self._reached(displacement)
            wrong = reached - damping * dual
            passes += 1
        predicted = self.offset + 0.5 * float(reached.square().sum())
        residual = float(wrong.norm()) / norm if norm > 0.0 else 0.0
        return Projection(displacement, damping, predicted, _kept(displacement, proposal), residual, passes,
                          perf_counter() - start)  # fmt: skip

    def _solve(self, rows: Tensor, damping: float) -> Tensor:
        """(K + lambda)^{-1} times rows; for lambda 0 the pseudo-inverse at the numerical rank."""
        values = self.spectrum.values
        if damping > 0.0:
            inverse = 1.0 / (values + damping)
        else:
            kept = torch.arange(values.numel(), device=values.device) < self.spectrum.rank
            inverse = torch.where(kept, 1.0 / values.clamp_min(1e-300), torch.zeros_like(values))
        return self.spectrum.vectors @ ((self.spectrum.vectors.T @ rows) * inverse)


class KrylovProjection(_Projector):
    """Budgeted projection of one proposal by Lanczos on K = J V J^T, started at b = J d0 + rho.

    In the Krylov basis the filter lambda (K + lambda)^{-1} b is known for *every* lambda from one small tridiagonal
    matrix, so the root costs nothing; the true residual of the model is tracked exactly.

    Args:
        jacobian, residual, divergence, scale: as for `SpectralProjection`.
        iterations: largest Krylov dimension.
        precision: stop when the unresolved part of the modelled KL is below this share of the budget.

    Raises:
        ValueError: as `SpectralProjection`.
    """

    def __init__(self, jacobian: Jacobian, residual: Tensor, divergence: float, scale: Tensor | None = None,
                 iterations: int = 40, precision: float = 0.02):  # fmt: skip
        super().__init__(jacobian, residual, divergence, scale)
        self.iterations = iterations
        self.precision = precision

    def project(self, proposal: Tensor, budget: float) -> Projection:
        """The closest displacement to `proposal` whose modelled KL is at most `budget`, up to the Krylov precision."""
        start = perf_counter()
        self._check(proposal, budget)
        reached = self._reached(proposal)
        norm = float(reached.norm())
        target = budget - self.offset
        if 0.5 * float(reached.square().sum()) <= target or norm == 0.0:
            return self._inside(proposal, reached, start)
        # K enters through products in the factors' precision: smaller Ritz values are round-off.
        floor = 10 * torch.finfo(self.residual.dtype).eps
        basis = [reached / norm]
        diagonal: list[float] = []
        beside: list[float] = []
        for step in range(1, self.iterations + 1):
            image = self._gram_product(basis[-1])
            diagonal.append(float(basis[-1] @ image))
            stacked = torch.stack(basis)
            for _ in range(2):  # full reorthogonalisation, twice: few vectors, exact arithmetic matters more
                image = image - stacked.T @ (stacked @ image)
            beta = float(image.norm())
            damping, small = _filter(diagonal, beside, norm, target, floor)
            unresolved = 0.5 * (beta * float(small[-1])) ** 2
            resolved = unresolved <= self.precision * max(budget, 0.0) or beta <= 1e-10 * diagonal[0]
            if resolved or step in (self.iterations, len(reached)):
                break
            beside.append(beta)
            basis.append(image / beta)
        stacked = torch.stack(basis)
        displacement = proposal - self._pulled(stacked.T @ small.to(stacked))
        residual = beta * abs(float(small[-1])) / norm
        predicted = self.offset + 0.5 * float(self._reached(displacement).square().sum())
        return Projection(displacement, damping, predicted, _kept(displacement, proposal), residual,
                          len(basis), perf_counter() - start)  # fmt: skip

    def _gram_product(self, rows: Tensor) -> Tensor:
        return self.jacobian.matvec(self.jacobian.rmatvec(rows.to(self.residual.dtype))).double()


def _filter(
    diagonal: list[float], beside: list[float], norm: float, target: float, relative: float
) -> tuple[float, Tensor]:
    """Root of the budget in the Krylov space: lambda and y = |b| (T + lambda)^{-1} e_1."""
    size = len(diagonal)
    tri = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        off = torch.tensor(beside[: size - 1], dtype=torch.float64)
        tri += torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(tri)
    values = values.clamp_min(0.0)
    first = vectors[0] * norm
    damping = solve_damping(values, first.square(), target, relative)
    if math.isinf(damping):
        return damping, torch.zeros_like(first)
    # Out of reach: the pseudo-inverse, without the Ritz values that are round-off.
    real = values > relative * float(values.max())
    inverse = 1.0 / (values + damping) if damping > 0.0 else torch.where(real, 1.0 / values.clamp_min(1e-300), 0.0)
    return damping, vectors @ (first * inverse)
