"""Is a network lazy: does its tangent kernel stay put while it learns (Chizat, Oyallon and Bach 2019)?"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsrl.errors import NsrlError
from nsrl.ntk.functions import ParameterFunction
from nsrl.projection.jacobians.fallback import Forward
from nsrl.projection.jacobians.linearise import jacobian


@dataclass(frozen=True)
class Laziness:
    """kappa and what it is made of.

    Attributes:
        kappa: |f - y| |Hess f| / |J|^2; far below 1, the model trains as its linearisation does.
        residual_norm: |f - y| over all outputs of all samples.
        hessian_norm: sup of |D^2 f [u, v]| over unit u, v. A lower bound, as every power iteration gives.
        jacobian_norm: sup of |J u| over unit u.
        converged: both iterations met the tolerance.
    """

    kappa: float
    residual_norm: float
    hessian_norm: float
    jacobian_norm: float
    converged: bool


class ScaledModel(nn.Module):
    """alpha * (f(x; w) - f(x; w0)): the output scale that makes any model lazy, with zero output at first.

    Attributes:
        model: f, the module itself, whose parameters are trained.
        alpha: the scale.
    """

    def __init__(self, model: nn.Module, alpha: float = 1.0):
        super().__init__()
        self.model = model
        self.alpha = alpha
        self._origin = copy.deepcopy(model).requires_grad_(False)

    def forward(self, inputs: Any) -> Tensor:
        """Outputs of the model's own shape, (N, O)."""
        return self.alpha * (self.model(inputs) - self._origin(inputs))


def kappa(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    *,
    forward: Forward | None = None,
    parameters: tuple[str, ...] | None = None,
    tolerance: float = 1e-4,
    iterations: int = 200,
    starts: int = 2,
    seed: int = 0,
) -> Laziness:
    """Measure kappa = |f - y| |Hess f| / |J|^2 at the model's present parameters, by power iterations.

    Neither the Jacobian nor a Hessian is formed: a step on |J| is a product with J and one with J^T; a step on
    |Hess f|, an N * O x P x P tensor, is a second directional derivative and two Hessian-vector products.

    Args:
        model: in eval mode.
        targets: y, (N, O), like the outputs.
        forward: function (model, inputs) -> outputs (N, O); default `model(inputs)`.
        parameters: names of those that are differentiated in; default all trainable ones.
        tolerance: relative change of a norm in one step at which its iteration ends.
        iterations: most steps.
        starts: random starts of the Hessian's iteration, which can end in a local maximum; the largest result counts.
        seed: of the starts.

    Raises:
        NsrlError: targets of another shape than the outputs, a zero Jacobian, or derivatives that are not finite.
        JacobianError: as `nsrl.projection.jacobian`.
    """
    J = jacobian(model, inputs, forward=forward, parameters=parameters)
    if targets.shape != J.outputs.shape:
        raise NsrlError(f"the targets have shape {tuple(targets.shape)}, the outputs {tuple(J.outputs.shape)}")
    function = ParameterFunction(model, forward, parameters)
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return _unit(torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like))

    def jacobian_step(state: tuple[Tensor, ...]) -> tuple[float, tuple[Tensor, ...]]:
        product = J.matvec(state[0])
        return float(product.norm()), (_unit(J.rmatvec(_unit(product))),)

    def hessian_step(state: tuple[Tensor, ...]) -> tuple[float, tuple[Tensor, ...]]:
        u, v = state
        curvature = function.second_order(inputs, u, v)
        rows = _unit(curvature)
        u = _unit(function.hessian_product(inputs, rows, v))
        return float(curvature.norm()), (u, _unit(function.hessian_product(inputs, rows, u)))

    limits = tolerance, iterations
    # A sum of row gradients: random directions of a large network are almost orthogonal to its few rows.
    start = _unit(J.rmatvec(normal(J.outputs).flatten()))
    jacobian_norm, jacobian_settled = _climb(jacobian_step, (start,), *limits)
    hessians = [
        _climb(hessian_step, (normal(function.origin), normal(function.origin)), *limits) for _ in range(starts)
    ]
    if not all(math.isfinite(norm) for norm in (jacobian_norm, *(norm for norm, _ in hessians))):
        raise NsrlError("a norm of the model's derivatives is NaN or infinite; the model has diverged")
    hessian_norm, hessian_settled = max(hessians)
    if jacobian_norm == 0.0:
        raise NsrlError("the Jacobian is zero at these inputs, so kappa is infinite; the model does not learn at all")
    residual_norm = float((J.outputs - targets.to(J.outputs)).norm())
    return Laziness(
        residual_norm * hessian_norm / jacobian_norm**2,
        residual_norm,
        hessian_norm,
        jacobian_norm,
        jacobian_settled and hessian_settled,
    )


def kernel_drift(kernel: Tensor, origin: Tensor) -> float:
    """|K_t - K_0| / |K_0| in the Frobenius norm.

    Raises:
        NsrlError: kernels of different shapes.
    """
    if kernel.shape != origin.shape:
        raise NsrlError(
            f"the kernels have shapes {tuple(kernel.shape)} and {tuple(origin.shape)}; drift needs equal ones"
        )
    return float((kernel - origin).norm() / origin.norm())


def relative_weight_change(model: nn.Module, origin: nn.Module) -> float:
    """|w - w0| / |w0| over the trainable parameters of the model; `origin` is a copy made before training.

    Raises:
        NsrlError: a parameter that the origin lacks, or has in another shape.
    """
    before = dict(origin.named_parameters())
    moved, norm = 0.0, 0.0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name not in before or before[name].shape != parameter.shape:
            raise NsrlError(f"the origin has no parameter {name} of the same shape; it must be a copy of the model")
        moved += float((parameter.detach() - before[name].detach()).double().square().sum())
        norm += float(before[name].detach().double().square().sum())
    return (moved / norm) ** 0.5


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm().clamp_min(torch.finfo(vector.dtype).tiny)


Step = Callable[[tuple[Tensor, ...]], tuple[float, tuple[Tensor, ...]]]


def _climb(step: Step, state: tuple[Tensor, ...], tolerance: float, iterations: int) -> tuple[float, bool]:
    """Repeat a step that never lowers its value; the last value, and whether it settled."""
    value = 0.0
    for _ in range(iterations):
        before = value
        value, state = step(state)
        if abs(value - before) <= tolerance * value:
            return value, True
    return value, False
