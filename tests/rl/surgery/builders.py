"""Small agents for the tests of surgery, and the functions that they compute."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, PPO

TINY: dict[str, Any] = {"n_steps": 8, "batch_size": 8, "device": "cpu", "seed": 0}
VECTOR = spaces.Box(-np.inf, np.inf, (4,), np.float32)


class Still(gym.Env):
    """An environment for its spaces only."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        return self.observation_space.sample(), 1.0, True, False, {}


def build(
    observations: spaces.Space = VECTOR, actions: spaces.Space | None = None, algorithm: Any = PPO, **policy_kwargs: Any
) -> Any:
    """An agent with weights of ordinary size: SB3's untrained heads say the same on all observations."""
    policy = "MultiInputPolicy" if isinstance(observations, spaces.Dict) else "MlpPolicy"
    options = {key: TINY[key] for key in TINY if algorithm is not A2C or key != "batch_size"}
    env = Still(observations, actions or spaces.Discrete(3))
    model = algorithm(policy, env, policy_kwargs={"net_arch": [16, 16], **policy_kwargs}, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def function_of(model: Any, observations: Any) -> torch.Tensor:
    """Distribution parameters and values by stock SB3's own code, (N, O + 1)."""
    tensors, _ = model.policy.obs_to_tensor(observations)
    with torch.no_grad():
        distribution = model.policy.get_distribution(tensors).distribution
        outputs = distribution.logits if hasattr(distribution, "logits") else distribution.loc
        return torch.cat([outputs, model.policy.predict_values(tensors)], 1)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
