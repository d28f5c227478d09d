"""The value function's fit to a rollout, without what a minibatch of a small critic does not need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn
from torch.optim.adam import adam

from nsrl.rl.policies.actor_critic import Observation, critic_head

Stepper = Callable[[list[Tensor]], Any]


@torch.no_grad()
def fit_values(
    policy: ActorCriticPolicy,
    observations: Observation,
    returns: Tensor,
    parameters: Sequence[nn.Parameter],
    *,
    epochs: int,
    batch_size: int,
) -> float:
    """Minimise the mean squared error of the values by the policy's own optimizer; returns its mean.

    Args:
        policy: the policy; its gradients are cleared first, so that nothing but the critic moves.
        observations: of the rollout, as the policy takes them.
        returns: targets, shape (N,).
        parameters: of the critic alone. Features that they do not shape are extracted once for all minibatches.
        epochs: passes over the rollout, each in a new random order.
        batch_size: states in a minibatch.
    """
    head, step = critic_head(policy, observations, parameters), _stepper(policy.optimizer, parameters)
    errors = []
    for _ in range(epochs):
        order = torch.randperm(len(returns), device=returns.device)
        targets = returns[order].unsqueeze(1).split(batch_size)
        for passes, target in zip(head.minibatches(order, batch_size), targets, strict=True):
            error = passes.outputs - target
            step(passes.pieces(error * (2.0 / len(error))))
            errors.append(error)
    return float(torch.cat(errors).square().mean())


def _stepper(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> Stepper:
    """A function that takes gradients, one a parameter, and makes one step of the optimizer.

    Plain Adam on the CPU, SB3's default, is stepped in one kernel on its own state: `Optimizer.step` spends four times
    as long on bookkeeping as that kernel on a 64 x 64 critic.
    """
    optimizer.zero_grad()
    if _is_plain_adam(optimizer):
        return _fused_adam(optimizer, parameters)

    def step(gradients: list[Tensor]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()

    return step


def _is_plain_adam(optimizer: torch.optim.Optimizer) -> bool:
    group = optimizer.param_groups[0]
    return (
        type(optimizer) is torch.optim.Adam
        and len(optimizer.param_groups) == 1
        and not (group["amsgrad"] or group["maximize"] or group["capturable"] or group["differentiable"])
        and not isinstance(group["lr"], Tensor)
        and all(parameter.device.type == "cpu" for parameter in group["params"])
    )


def _fused_adam(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> Stepper:
    (group,) = optimizer.param_groups
    states = [optimizer.state[parameter] for parameter in parameters]
    for parameter, state in zip(parameters, states, strict=True):
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    moved: list[Tensor] = list(parameters)
    first, second, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
    beta1, beta2 = group["betas"]

    def step(gradients: list[Tensor]) -> None:
        adam(
            moved,
            gradients,
            first,
            second,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    return step
