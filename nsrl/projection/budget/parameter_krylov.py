"""The budgeted restoration in the space of the parameters, for models of many more rows than parameters.

`KrylovProjection` keeps vectors of k rows; a policy of 4,672 actions has seven million on 2,048 states. Here the
vectors have P entries, and nothing of length k outlives a product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsrl.projection.budget.model import Quadratic, solve_damping
from nsrl.projection.jacobians.matrix_free import Products

#: Rows from which on this is the way to go, where there are fewer parameters.
MANY = 2**19


def pull_to_reference(
    model: Quadratic[Products], budget: float, iterations: int = 40, precision: float = 0.02
) -> Tensor:
    """The shortest displacement d at which the model's KL is the budget, shape (P,).

    It is d = -(J^T J + lambda)^{-1} J^T rho for the one lambda at which 1/2 |rho + J d|^2 + offset is the budget, by
    Lanczos on J^T J from J^T rho: in the Krylov space V with T = V^T J^T J V it is d = -V (T + lambda)^{-1} V^T J^T
    rho, and |rho + J d|^2 is known for every lambda.

    Args:
        model: of the KL.
        budget: to be reached; where it cannot be, d comes as near as the Krylov space does.
        iterations: largest Krylov dimension.
        precision: stop once the stationary point moves the modelled KL by less than this share of the budget.
    """
    jacobian, residual = model.jacobian, model.residual
    slope = jacobian.rmatvec(residual)
    norm, whole = float(slope.norm()), float(residual.double().square().sum())
    target = budget - model.offset
    if norm == 0.0 or 0.5 * whole <= target:
        return torch.zeros_like(slope)
    # Products are made in the residual's precision: smaller Ritz values are round-off.
    floor = 10 * torch.finfo(residual.dtype).eps
    basis = slope.new_empty(min(iterations, len(slope)), len(slope))
    basis[0] = slope / norm
    tri = torch.zeros(len(basis), len(basis), dtype=torch.float64)
    for step in range(1, len(basis) + 1):
        image = jacobian.rmatvec(jacobian.matvec(basis[step - 1]))
        tri[step - 1, step - 1] = float(basis[step - 1] @ image)
        for _ in range(2):  # full reorthogonalisation, twice: few vectors, exact arithmetic matters more
            image = image - basis[:step].T @ (basis[:step] @ image)
        beta = float(image.norm())
        small = _solve(tri[:step, :step], norm, whole, target, floor)
        # What the next direction would be asked for: the part of the gradient that is not in the space.
        left = (beta * float(small[-1])) ** 2 / max(float(tri.diagonal()[:step].max()), 1e-300)
        if step == len(basis) or beta <= 1e-10 * float(tri[0, 0]) or 0.5 * left <= precision * max(budget, 0.0):
            break
        tri[step, step - 1] = tri[step - 1, step] = beta
        basis[step] = image / beta
    return -(basis[:step].T @ small.to(slope))


def _solve(tri: Tensor, norm: float, whole: float, target: float, relative: float) -> Tensor:
    """(T + lambda)^{-1} |g| e_1 for the lambda of the target.

    A component g_i = |g| u_1i of J^T rho at the Ritz value s_i stands for one of rho of size g_i / sqrt(s_i); what is
    left of |rho|^2 lies outside of the range, and no displacement changes it.
    """
    values, vectors = torch.linalg.eigh(tri)
    real = values > relative * float(values.max())
    first = vectors[0] * norm
    inside = torch.where(real, first.square() / values.clamp_min(1e-300), 0.0)
    outside = torch.tensor([max(whole - float(inside.sum()), 0.0)], dtype=torch.float64)
    padded = torch.cat([values.clamp_min(0.0), torch.zeros(1, dtype=torch.float64)])
    damping = solve_damping(padded, torch.cat([inside, outside]), target, relative)
    inverse = 1.0 / (values + damping) if damping > 0.0 else 1.0 / values.clamp_min(1e-300)
    return vectors @ (first * torch.where(real, inverse, 0.0))
