"""Policies with a context among their inputs, and states of two tasks that it tells apart."""

from __future__ import annotations

from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from nsrl.rl.policies.actor_critic import policy_outputs
from tests.rl.builders import generators_left_alone

ACTIVATIONS = [nn.Tanh, nn.ReLU, nn.ELU, nn.SiLU]


def policy_of(
    activation: type[nn.Module] = nn.Tanh, widths: list[int] | None = None, actions: spaces.Space | None = None
) -> ActorCriticPolicy:
    with generators_left_alone():
        torch.manual_seed(0)
        policy = ActorCriticPolicy(
            spaces.Box(-9.0, 9.0, (4,)),
            actions or spaces.Discrete(3),
            lambda _: 1e-3,
            net_arch=widths or [48, 40],
            activation_fn=activation,
        )
        with torch.no_grad():  # a certain policy: its logits lead by much
            policy.action_net.weight.mul_(500.0)
        return policy


def states(policy: ActorCriticPolicy, context: float, count: int = 400, seed: int = 0) -> Tensor:
    """All entries vary but the last, which is the context."""
    size = policy.observation_space.shape[0]
    drawn = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    drawn[:, -1] = context
    return drawn


def measured(policy: ActorCriticPolicy, old: Tensor) -> Any:
    """KL(reference || now), the mean over the states, from torch.distributions."""
    with torch.no_grad():
        reference = torch.distributions.Categorical(logits=policy_outputs(policy, old).double())

    def divergence() -> float:
        with torch.no_grad():
            now = torch.distributions.Categorical(logits=policy_outputs(policy, old).double())
        return float(torch.distributions.kl_divergence(reference, now).mean())

    return divergence
