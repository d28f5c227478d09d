"""The value function's fit to a rollout, without what a minibatch of a small critic does not need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from nsrl.projection.jacobians.workspace import ChainWorkspace
from nsrl.rl.algorithms.adam import AdamStep, is_plain_adam
from nsrl.rl.policies.actor_critic import Head, Observation, critic_head

Stepper = Callable[[Sequence[Tensor]], Any]


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
    head = critic_head(policy, observations, parameters)
    policy.optimizer.zero_grad()
    if head.stages is not None and is_plain_adam(policy.optimizer):
        return _fit_chain(head, returns, AdamStep(policy.optimizer, parameters), epochs, batch_size)
    step = _stepper(policy.optimizer, parameters)
    errors = []
    for _ in range(epochs):
        order = torch.randperm(len(returns), device=returns.device)
        targets = returns[order].unsqueeze(1).split(batch_size)
        for passes, target in zip(head.minibatches(order, batch_size), targets, strict=True):
            error = passes.outputs - target
            step(passes.pieces(error * (2.0 / len(error))))
            errors.append(error)
    return float(torch.cat(errors).square().mean())


def _fit_chain(head: Head, returns: Tensor, adam: AdamStep, epochs: int, batch_size: int) -> float:
    """The same where the critic is a chain of linear layers and the optimizer plain Adam: bit for bit, without detours.

    A small critic's minibatch is a dozen operations of some microseconds each; looking up, allocating and counting
    around them takes as long.
    """
    assert head.stages is not None and isinstance(head.inputs, Tensor)
    count = len(returns)
    workspace = ChainWorkspace(head.stages, head.parameters, min(batch_size, count))
    errors = returns.new_empty(epochs * count, 1)
    with adam.in_a_row(workspace.gradients) as step:
        for epoch in range(epochs):
            order = torch.randperm(count, device=returns.device)
            batches = (
                head.inputs[order].split(batch_size),
                returns[order].unsqueeze(1).split(batch_size),
                errors[epoch * count : (epoch + 1) * count].split(batch_size),
            )
            for inputs, target, error in zip(*batches, strict=True):
                rows = inputs.shape[0]
                passes = workspace.batch(rows)
                torch.sub(passes.push(inputs), target, out=error)
                torch.mul(error, 2.0 / rows, out=passes.cotangents)
                passes.pull(inputs)
                step()
    return float(errors.square().mean())


def _stepper(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> Stepper:
    """A function that takes gradients, one a parameter, and makes one step of the optimizer."""
    if is_plain_adam(optimizer):
        return AdamStep(optimizer, parameters)

    def step(gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()

    return step
