"""Tiny float64 policies over all action families and kinds of network, and dense oracles on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import kl_divergence
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from torch import Tensor, nn

ACTIONS = {
    "discrete": spaces.Discrete(3),
    "box": spaces.Box(-1.0, 1.0, (2,)),
    "multi_discrete": spaces.MultiDiscrete([2, 3]),
    "multi_binary": spaces.MultiBinary(3),
}


class Flat(FlattenExtractor):
    """SB3 casts observations to float32."""

    def forward(self, observations: Tensor) -> Tensor:
        return super().forward(observations).double()


class Combined(CombinedExtractor):
    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        return super().forward(observations).double()


class Images(NatureCNN):
    def forward(self, observations: Tensor) -> Tensor:
        return super().forward(observations.double())


VECTOR = spaces.Box(-1.0, 1.0, (4,))
NETWORKS: dict[str, tuple[spaces.Space, dict[str, Any]]] = {
    "tanh": (VECTOR, {"features_extractor_class": Flat}),
    "relu": (VECTOR, {"features_extractor_class": Flat, "activation_fn": nn.ReLU, "net_arch": {"pi": [7], "vf": [3]}}),
    "silu": (VECTOR, {"features_extractor_class": Flat, "activation_fn": nn.SiLU}),
    "linear": (VECTOR, {"features_extractor_class": Flat, "net_arch": []}),
    "dict": (spaces.Dict({"a": VECTOR, "b": spaces.Discrete(3)}), {"features_extractor_class": Combined}),
    "shared cnn": (
        spaces.Box(0, 255, (1, 36, 36), np.uint8),
        {"features_extractor_class": Images, "features_extractor_kwargs": {"features_dim": 8}, "net_arch": [4]},
    ),
}


def build_policy(actions: str = "discrete", network: str = "tanh", seed: int = 0) -> ActorCriticPolicy:
    observation_space, options = NETWORKS[network]
    torch.manual_seed(seed)
    policy = ActorCriticPolicy(observation_space, ACTIONS[actions], lambda _: 1e-3, **{"net_arch": [6, 5], **options})
    policy.double().set_training_mode(False)
    with torch.no_grad():  # away from the near-uniform initial policy
        for parameter in policy.action_net.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        if actions == "box":
            policy.log_std.add_(0.3 * torch.randn_like(policy.log_std))
    return policy


def draw_observations(policy: ActorCriticPolicy, count: int) -> Any:
    space = policy.observation_space
    space.seed(0)
    drawn = [space.sample() for _ in range(count)]
    if isinstance(space, spaces.Dict):
        return {key: torch.as_tensor(np.stack([sample[key] for sample in drawn])) for key in space.spaces}
    return torch.as_tensor(np.stack(drawn))


def draw_rollout(policy: ActorCriticPolicy, count: int = 12) -> SimpleNamespace:
    """Samples as a rollout buffer gives them."""
    observations = draw_observations(policy, count)
    with torch.no_grad():
        actions, values, log_prob = policy(observations)
    return SimpleNamespace(
        observations=observations,
        actions=actions.view(count, -1).to(torch.float64),
        old_log_prob=log_prob,
        advantages=torch.randn(count, dtype=torch.float64),
        returns=torch.randn(count, dtype=torch.float64),
        old_values=values.flatten(),
    )


def dense_jacobian(policy: nn.Module, compute: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
    """Jacobian (N * O, P) of outputs (N, O), one backward pass a row."""
    outputs = compute().flatten()
    rows = [torch.autograd.grad(out, parameters, retain_graph=True, allow_unused=True) for out in outputs]
    filled = [
        [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, row, strict=True)] for row in rows
    ]
    return torch.stack([torch.cat([grad.flatten() for grad in row]) for row in filled])


def joint_kl(old: Any, new: Any) -> Tensor:
    """KL(old || new) of two SB3 distributions, shape (N,), of the joint action."""
    kl = kl_divergence(old, new)
    return kl.sum(-1) if kl.ndim > 1 else kl
