"""Solve (K + lambda I) y = b for K = J J^T, and project onto the null space of J with it: one interface, three ways.

`factorise` makes the plan (`nsrl.projection.solvers.plan`) and the factorisation, which answers many right-hand sides.
Vectors are float64 whatever the factors. A lambda of 0 means the pseudo-inverse at the numerical rank: no jitter is
ever added to K. Every answer has a certificate.
"""

from __future__ import annotations

from torch import Tensor

from nsrl.projection.jacobians.factored import Jacobian, is_whole, storage
from nsrl.projection.solvers.direct import DualSolver, PrimalSolver
from nsrl.projection.solvers.nystrom import NystromSolver
from nsrl.projection.solvers.plan import METHODS, SHARE, free_memory, largest_sketch, plan
from nsrl.projection.solvers.solver import Solution, Solver


def factorise(
    jacobian: Jacobian,
    damping: float = 0.0,
    *,
    method: str | None = None,
    memory: float | None = None,
    effective_dimension: float | None = None,
    passes: int = 2,
) -> Solver:
    """Prepare (K + lambda)^+ by the method that `plan` chooses.

    Args:
        jacobian: J, shape (k, P).
        damping: lambda; 0 for the pseudo-inverse at the numerical rank.
        method: "dual", "primal" or "nystrom", whatever it costs.
        memory: bytes that may be used; default half of what is free. It bounds the sketch of "nystrom", too: one that
            is too small for the effective dimension costs iterations, and what they leave is in the certificate.
        effective_dimension: sum s / (s + lambda), if known.
        passes: largest number of refinement passes.

    Raises:
        ValueError: as `Solver` and `plan`.
    """
    device = storage(jacobian)[1]
    limit = SHARE * free_memory(device) if memory is None else memory
    methods = METHODS if is_whole(jacobian) else ("dual", "nystrom")
    chosen = plan(
        jacobian.shape,
        spectral=damping == 0.0,
        method=method,
        methods=methods,
        memory=limit,
        effective_dimension=effective_dimension,
        device=device,
    )
    if chosen.method == "nystrom":
        return NystromSolver(jacobian, damping, passes, largest=largest_sketch(jacobian.shape[0], limit))
    return {"dual": DualSolver, "primal": PrimalSolver}[chosen.method](jacobian, damping, passes)


def solve(
    jacobian: Jacobian, rows: Tensor, damping: float = 0.0, *, method: str | None = None, memory: float | None = None
) -> Solution:
    """Solve (J J^T + lambda) y = b for b of shape (k,) or (k, c); see `factorise` and `Solver.solve`."""
    return factorise(jacobian, damping, method=method, memory=memory).solve(rows)


def null_projection(
    jacobian: Jacobian, vector: Tensor, damping: float = 0.0, *, method: str | None = None, memory: float | None = None
) -> Solution:
    """Project v of shape (P,) to v - J^T (J J^T + lambda)^+ J v; see `factorise` and `Solver.null`."""
    return factorise(jacobian, damping, method=method, memory=memory).null(vector)
