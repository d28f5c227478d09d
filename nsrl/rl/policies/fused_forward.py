"""What a policy does at a step of a roll-out, bit for bit, without modules and distribution objects.

The operations are SB3's and torch's own in their order, and random numbers are drawn as they draw them: the same
actions, values and log-probabilities. Only what is looked up, built and validated around them is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from nsrl.projection.hooks import MODULE_HOOKS
from nsrl.rl.policies.actor_critic import critic_layers, hidden_layers
from nsrl.rl.policies.chains import chains_of

Drawn = tuple[Tensor, Tensor]

#: As the modules compute them; `Activation` of the hand-written passes rounds otherwise.
ACTIVATIONS: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {nn.Tanh: torch.tanh, nn.ReLU: F.relu}


@contextmanager
def fused_forward(policy: ActorCriticPolicy) -> Iterator[None]:
    """For a roll-out: calls of the policy take the short way, where its networks are known."""
    if chains_of(policy) is None:
        yield
        return
    policy.forward = FusedForward(policy)  # type: ignore[method-assign]
    try:
        yield
    finally:
        vars(policy).pop("forward", None)


class FusedForward:
    """The `forward` of a policy that `chains_of` knows.

    Args:
        policy: the policy; its parameters are read at every call, and where its modules are called by others or
            changed meanwhile, SB3's own forward is.
    """

    def __init__(self, policy: ActorCriticPolicy):
        self._policy: Any = policy
        hidden, critic = hidden_layers(policy), critic_layers(policy)
        assert hidden is not None and critic is not None
        self._actor, self._critic = _pairs([*hidden, policy.action_net]), _pairs(critic)
        self._heads = policy.action_net, policy.value_net
        inner = [module for module in policy.modules() if module is not policy]
        self._hooks = [getattr(module, name) for module in inner for name in MODULE_HOOKS]

    def __call__(self, obs: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Actions, values (N, 1) and log-probabilities (N,), as `ActorCriticPolicy.forward`.

        Raises:
            ValueError: the outputs are no distribution's parameters, as SB3 raises it.
        """
        policy = self._policy
        heads = policy._modules["action_net"], policy._modules["value_net"]
        if deterministic or torch.is_grad_enabled() or any(self._hooks) or heads != self._heads:
            return type(policy).forward(policy, obs, deterministic)
        features = policy.extract_features(obs)
        pi_features, vf_features = features if isinstance(features, tuple) else (features, features)
        outputs = _run(self._actor, pi_features)
        if not math.isfinite(float(outputs.sum())):
            return type(policy).forward(policy, obs)  # which says what is wrong, or nothing is
        values = _run(self._critic, vf_features)
        actions, log_prob = self._draw(outputs)
        return actions.reshape((-1, *policy.action_space.shape)), values, log_prob

    def _draw(self, outputs: Tensor) -> Drawn:
        policy = self._policy
        kind = type(policy.action_dist)
        if kind is DiagGaussianDistribution:
            std = torch.ones_like(outputs) * policy.log_std.exp()
            if not bool((std > 0.0).all()):
                raise ValueError("the standard deviation of the policy is not above 0: log_std has diverged")
            return _normal(outputs, std)
        if kind is BernoulliDistribution:
            bits = torch.bernoulli(torch.sigmoid(outputs))
            return bits, -F.binary_cross_entropy_with_logits(outputs, bits, reduction="none").sum(dim=1)
        if kind is CategoricalDistribution:
            return _categorical(outputs)
        assert kind is MultiCategoricalDistribution
        drawn = [_categorical(head) for head in torch.split(outputs, list(policy.action_dist.action_dims), dim=1)]
        return torch.stack([one[0] for one in drawn], dim=1), torch.stack([one[1] for one in drawn], dim=1).sum(dim=1)


def _pairs(layers: list[nn.Module]) -> list[tuple[dict[str, Any], Callable[[Tensor], Tensor] | None]]:
    """Parameters of linear layers, each with the activation behind it."""
    pairs: list[tuple[dict[str, Any], Callable[[Tensor], Tensor] | None]] = []
    for layer in layers:
        if type(layer) in ACTIVATIONS:
            pairs[-1] = (pairs[-1][0], ACTIVATIONS[type(layer)])
        else:
            pairs.append((layer._parameters, None))
    return pairs


def _run(pairs: list[tuple[dict[str, Any], Callable[[Tensor], Tensor] | None]], values: Tensor) -> Tensor:
    for parameters, activation in pairs:
        values = F.linear(values, parameters["weight"], parameters["bias"])
        if activation is not None:
            values = activation(values)
    return values


def _categorical(outputs: Tensor) -> Drawn:
    """One choice a row and its log-probability, as `torch.distributions.Categorical`."""
    logits = outputs - outputs.logsumexp(dim=-1, keepdim=True)
    choices = torch.multinomial(F.softmax(logits, dim=-1), 1, True)
    return choices.squeeze(1), logits.gather(-1, choices).squeeze(-1)


def _normal(mean: Tensor, std: Tensor) -> Drawn:
    """Values around the means and their log-density, as `torch.distributions.Normal`."""
    values = mean + torch.empty_like(mean).normal_() * std
    log_density = -((values - mean) ** 2) / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))
    return values, log_density.sum(dim=1)
