"""What an optimizer multiplies gradients by, read from its own state: the part of a step that has an owner."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def gradient_scale(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], lag: int = 0, first: bool = False
) -> Tensor | float | None:
    """S such that the step just made holds -S * (the gradient of `lag` steps ago), (P,) or one number for all.

    SGD with momentum, Nesterov and dampening; Adam, AdamW, AMSGrad and RMSprop by their realised denominators. Weight
    decay is no sample's doing and stays out.

    Args:
        optimizer: after its step.
        parameters: the P entries, in order.
        lag: steps between the gradient and this one.
        first: the gradient was the first that the optimizer saw, which SGD does not dampen.

    Returns:
        None for an optimizer that is not one of these: nothing of its steps is then attributed.
    """
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    kind = type(optimizer)
    if kind is torch.optim.SGD:
        scales = [_sgd(groups[p], lag, first) for p in parameters]
        if len(set(scales)) == 1:
            return scales[0]
        return torch.cat([torch.full_like(p, s).flatten() for p, s in zip(parameters, scales, strict=True)])
    if kind in (torch.optim.Adam, torch.optim.AdamW):
        return torch.cat([_adam(groups[p], optimizer.state.get(p, {}), p, lag).flatten() for p in parameters])
    # stable_baselines3's RMSpropTFLike, A2C's optimizer, has its epsilon inside the root
    inside = kind.__name__ == "RMSpropTFLike"
    if kind is torch.optim.RMSprop or inside:
        return torch.cat(
            [_rmsprop(groups[p], optimizer.state.get(p, {}), p, lag, inside).flatten() for p in parameters]
        )
    return None


def _sign(group: dict) -> float:
    return -1.0 if group.get("maximize") else 1.0


def _sgd(group: dict, lag: int, first: bool) -> float:
    rate, momentum, kept = float(group["lr"]) * _sign(group), group["momentum"], 1.0 - group["dampening"] * (not first)
    if momentum == 0.0:
        return rate if lag == 0 else 0.0
    if group["nesterov"]:
        return rate * (1.0 + momentum) if lag == 0 else rate * momentum ** (lag + 1)
    return rate * kept * momentum**lag


def _adam(group: dict, state: dict, parameter: nn.Parameter, lag: int) -> Tensor:
    if "exp_avg_sq" not in state:
        return torch.zeros_like(parameter)
    first, second = (float(beta) for beta in group["betas"])
    steps = float(state["step"])
    if lag >= steps:
        return torch.zeros_like(parameter)
    square = state.get("max_exp_avg_sq", state["exp_avg_sq"])
    denominator = (square / (1.0 - second**steps)).sqrt() + group["eps"]
    share = (1.0 - first) * first**lag / (1.0 - first**steps)
    return _sign(group) * float(group["lr"]) * share / denominator


def _rmsprop(group: dict, state: dict, parameter: nn.Parameter, lag: int, inside: bool) -> Tensor:
    if "square_avg" not in state:
        return torch.zeros_like(parameter)
    variance = state["square_avg"]
    if group["centered"]:
        variance = variance - state["grad_avg"].square()
    root = (variance + group["eps"]).sqrt() if inside else variance.sqrt() + group["eps"]
    # A momentum buffer would add up gradients over the denominators of their own steps; only the present one is known.
    return _sign(group) * float(group["lr"]) * (1.0 if lag == 0 else 0.0) / root
