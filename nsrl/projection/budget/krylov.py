"""The budgeted projection of one proposal by products with J alone."""

from __future__ import annotations

import math
from time import perf_counter

import torch
from torch import Tensor

from nsrl.projection.budget.damping import solve_damping
from nsrl.projection.budget.model import Projection, Projector
from nsrl.projection.jacobians.factored import Jacobian
from nsrl.projection.solvers.certificate import Certificate


class KrylovProjection(Projector):
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
            return self._made(proposal, proposal, reached, self._certificate(0.0, math.inf, 0, start, reached[:0]))
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
            damping, small, values = _filter(diagonal, beside, norm, target, floor)
            unresolved = 0.5 * (beta * float(small[-1])) ** 2
            resolved = unresolved <= self.precision * max(budget, 0.0) or beta <= 1e-10 * diagonal[0]
            if resolved or step in (self.iterations, len(reached)):
                break
            beside.append(beta)
            basis.append(image / beta)
        stacked = torch.stack(basis)
        pulled = self.jacobian.rmatvec((stacked.T @ small.to(stacked)).to(self.residual.dtype))
        displacement = proposal - self._unwhitened(pulled)
        residual = beta * abs(float(small[-1])) / norm
        certificate = self._certificate(residual, damping, len(basis), start, values)
        return self._made(displacement, proposal, self._reached(displacement), certificate)

    def _certificate(self, residual: float, damping: float, passes: int, start: float, values: Tensor) -> Certificate:
        """Rank and effective dimension are those of the Ritz values: lower bounds, for they interlace."""
        effective = 0.0 if math.isinf(damping) else float((values / (values + damping)).sum())
        return Certificate("krylov", residual, len(values), effective, damping, self.residual.dtype, passes,
                           perf_counter() - start)  # fmt: skip

    def _gram_product(self, rows: Tensor) -> Tensor:
        return self.jacobian.matvec(self.jacobian.rmatvec(rows.to(self.residual.dtype))).double()


def _filter(
    diagonal: list[float], beside: list[float], norm: float, target: float, relative: float
) -> tuple[float, Tensor, Tensor]:
    """Root of the budget in the Krylov space: lambda, y = |b| (T + lambda)^{-1} e_1, Ritz values above round-off."""
    size = len(diagonal)
    tri = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        off = torch.tensor(beside[: size - 1], dtype=torch.float64)
        tri += torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(tri)
    values = values.clamp_min(0.0)
    first = vectors[0] * norm
    damping = solve_damping(values, first.square(), target, relative)
    real = values > relative * float(values.max())
    if math.isinf(damping):
        return damping, torch.zeros_like(first), values[real]
    # Out of reach: the pseudo-inverse, without the Ritz values that are round-off.
    inverse = 1.0 / (values + damping) if damping > 0.0 else torch.where(real, 1.0 / values.clamp_min(1e-300), 0.0)
    return damping, vectors @ (first * inverse), values[real]
