"""The budgeted projection: the closest displacement that keeps a second-order KL model inside its budget.

Around the linearisation point the measured KL of a displacement d is modelled as

    KL(d) = KL(0) - 1/2 |rho|^2 + 1/2 |rho + J d|^2

and the closest displacement to a proposal d0 (in the metric V^{-1}) with KL(d) <= budget is

    d* = d0 - V J^T (J V J^T + lambda I)^{-1} (J d0 + rho)

with the unique lambda at which the model equals the budget: infinity when d0 is inside already (d* = d0), zero for
budget 0 (the hard null space plus a Gauss-Newton pull to the reference). Because rho + J d0 is all that matters, d0
may be any displacement *from the linearisation point*: projecting the running total projects every step.

Two solvers: `SpectralProjection` decomposes the Gram matrix (or J^T J, for fewer parameters than rows) once and answers
many proposals; `KrylovProjection` never forms either and answers one proposal in some tens of products with J.
"""

from __future__ import annotations

import math
from time import perf_counter

import torch
from torch import Tensor

from nsrl.projection.budget.model import Projection, Projector, solve_damping
from nsrl.projection.jacobians.factored import Jacobian, doubled, is_whole, storage
from nsrl.projection.solvers.direct import ParameterBasis
from nsrl.projection.solvers.plan import plan
from nsrl.projection.solvers.solver import Certificate
from nsrl.projection.solvers.spectrum import Spectrum, spectrum, tolerance


class SpectralProjection(Projector):
    """Budgeted projection through one eigen-decomposition, of K = J V J^T or of V^{1/2} J^T J V^{1/2}.

    Args:
        jacobian: J at the linearisation point, shape (k, P). Products with it are made with its factors in float64: in
            float32 their round-off, amplified by K^{-1}, would end up in the displacement.
        residual: rho, shape (k,).
        divergence: KL(0) at the linearisation point, on the same states.
        scale: V^{1/2}, positive, shape (P,), or None for the Euclidean metric. Linear layers use its rank-one fit.
        passes: largest number of projection passes.
        method: "dual" or "primal"; default what `plan` chooses: primal for fewer parameters than rows.
        memory: bytes that the decomposition may use; default half of what is free.

    Attributes:
        spectrum: the decomposition. Eigenvalues but for zeros, rank and effective dimension are those of K either way.

    Raises:
        ValueError: wrong shapes, a scale that is not positive, NaN or infinite entries, a J too large to be decomposed.
    """

    def __init__(
        self,
        jacobian: Jacobian,
        residual: Tensor,
        divergence: float,
        scale: Tensor | None = None,
        passes: int = 2,
        *,
        method: str | None = None,
        memory: float | None = None,
    ):
        super().__init__(doubled(jacobian), residual, divergence, scale)
        self.passes = passes
        self.dtype, device = storage(jacobian)
        methods = ("dual", "primal") if is_whole(jacobian) else ("dual",)
        chosen = plan(jacobian.shape, method=method, methods=methods, memory=memory, device=device)
        self.method = chosen.method
        self._basis = ParameterBasis(self.jacobian, self.dtype) if self.method == "primal" else None
        self.spectrum: Spectrum = (
            spectrum(self.jacobian.gram(), self.dtype) if self._basis is None else self._basis.spectrum
        )
        self._floor = tolerance(len(residual), self.dtype)

    def project(self, proposal: Tensor, budget: float) -> Projection:
        """The closest displacement to `proposal` (P,) whose modelled KL is at most `budget` (0: hard null space)."""
        start = perf_counter()
        self._check(proposal, budget)
        reached = self._reached(proposal)
        target = budget - self.offset
        if budget > 0.0 and 0.5 * float(reached.square().sum()) <= target:
            return self._made(proposal, proposal, reached, self._certificate(0.0, math.inf, 0, start))
        damping = solve_damping(*self._weights(reached), target, self._floor) if budget > 0.0 else 0.0
        solve = self._by_rows if self._basis is None else self._by_parameters
        displacement, reached, residual, passes = solve(proposal, reached, damping)
        return self._made(displacement, proposal, reached, self._certificate(residual, damping, passes, start))

    def null(self, vector: Tensor, damping: float = 0.0) -> Tensor:
        """Remove the protected directions from a vector, (P,), without the pull to the reference.

        `damping` 0 is the hard projector I - V J^T (J V J^T)^+ J; larger values soften it.
        """
        result = self._whitened(vector.double())
        seen = self.jacobian.matvec(result).double()
        enough = max(1e-12 * float(seen.norm()), self._rounding(result, vector.dtype))
        passes = self.passes if damping == 0.0 and not self._one_pass_suffices(vector.dtype) else 1
        for number in range(1, passes + 1):
            if float(seen.norm()) <= enough:
                break
            if self._basis is None:
                result = result - self.jacobian.rmatvec(self.spectrum.solve(seen, damping)).double()
            else:
                result = result - self._basis.relaxed(self.jacobian.rmatvec(seen).double(), damping)
            if number < passes:
                seen = self.jacobian.matvec(result).double()
        return self._unwhitened(result).to(vector.dtype)

    def _weights(self, reached: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues of K and squared components of rho + J d0."""
        if self._basis is None:
            return self.spectrum.values, (self.spectrum.vectors.T @ reached).square()
        # What lies outside the range of J has the eigenvalue zero: no displacement changes it.
        inside = self._basis.components(self.jacobian.rmatvec(reached).double()).square()
        outside = (reached.square().sum() - inside.sum()).clamp_min(0.0).unsqueeze(0)
        return torch.cat([self._basis.values, torch.zeros_like(outside)]), torch.cat([inside, outside])

    def _by_rows(self, proposal: Tensor, reached: Tensor, damping: float) -> tuple[Tensor, Tensor, float, int]:
        """d0 - V J^T y with (K + lambda) y = b, refined until rho + J d = lambda y, as the exact solution has it.

        Returns:
            d, rho + J d, the residual and the passes made.
        """
        moved, displacement, norm = self._whitened(proposal.double()), proposal, float(reached.norm())
        dual, wrong, passes = torch.zeros_like(reached), reached, 0
        while passes < self.passes and float(wrong.norm()) > max(1e-9 * norm, self._rounding(moved, proposal.dtype)):
            correction = self.spectrum.solve(wrong, damping)
            moved = moved - self.jacobian.rmatvec(correction).double()
            dual = dual + correction
            displacement = self._unwhitened(moved).to(proposal.dtype)
            reached = self._reached(displacement)
            wrong = reached - damping * dual
            passes += 1
        return displacement, reached, float(wrong.norm()) / norm if norm > 0.0 else 0.0, passes

    def _by_parameters(self, proposal: Tensor, reached: Tensor, damping: float) -> tuple[Tensor, Tensor, float, int]:
        """The same by Newton steps on 1/2 |rho + J d|^2 + lambda/2 |d - d0|^2: one is exact but for round-off."""
        assert self._basis is not None
        begin = moved = self._whitened(proposal.double())
        displacement, norm = proposal, float(reached.norm())
        gradient = first = self.jacobian.rmatvec(reached).double()
        top, passes = float(self.spectrum.values[:1].sum()), 0
        while passes < self.passes and float(gradient.norm()) > max(
            1e-9 * float(first.norm()), math.sqrt(top) * self._rounding(moved, proposal.dtype)
        ):
            moved = moved - self._basis.relaxed(gradient, damping)
            displacement = self._unwhitened(moved).to(proposal.dtype)
            reached = self._reached(displacement)
            gradient = self.jacobian.rmatvec(reached).double() + damping * (moved - begin)
            passes += 1
        left, whole = (float(gradient.norm()), float(first.norm())) if damping > 0.0 else (float(reached.norm()), norm)
        return displacement, reached, left / whole if whole > 0.0 else 0.0, passes

    def _rounding(self, moved: Tensor, dtype: torch.dtype) -> float:
        """Size of what rounding a displacement to its dtype does to J d: no pass can remove it."""
        mean_square = float(self.spectrum.values.sum()) / max(1, moved.numel())
        return torch.finfo(dtype).eps * math.sqrt(mean_square) * float(moved.norm())

    def _one_pass_suffices(self, dtype: torch.dtype) -> bool:
        """Whether the round-off of a float64 solve, amplified by the condition number, is lost in that of `dtype`."""
        values, rank = self.spectrum.values, self.spectrum.rank
        if self._basis is not None or rank == 0:
            return False
        condition = float(values[0] / values[rank - 1])
        return 100 * torch.finfo(torch.float64).eps * condition < torch.finfo(dtype).eps

    def _certificate(self, residual: float, damping: float, passes: int, start: float) -> Certificate:
        method = "dual/eigh" if self._basis is None else "primal"
        effective = self.spectrum.effective_dimension(damping)
        return Certificate(
            method, residual, self.spectrum.rank, effective, damping, self.dtype, passes, perf_counter() - start
        )


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

    def __init__(
        self,
        jacobian: Jacobian,
        residual: Tensor,
        divergence: float,
        scale: Tensor | None = None,
        iterations: int = 40,
        precision: float = 0.02,
    ):
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
        return Certificate(
            "krylov", residual, len(values), effective, damping, self.residual.dtype, passes, perf_counter() - start
        )

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
