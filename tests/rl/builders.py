"""Small agents and buffers for the tests of the retention engine; nothing is trained for long."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from nsrl.rl.buffer import RetentionBuffer

SMALL: dict[str, Any] = {"n_steps": 64, "batch_size": 64, "n_epochs": 3, "learning_rate": 3e-3}
OLD = {"discrete": "nsrl/CartPole-v0", "box": "nsrl/Pendulum-v0"}
NEW = {"discrete": "nsrl/CartPoleSwapped-v0", "box": "nsrl/PendulumReversed-v0"}


def build_agent(kind: str = "discrete", seed: int = 0, **options: Any) -> PPO:
    """An agent that has seen a few rollouts of the old task."""
    envs = make_vec_env(OLD[kind], 2, seed=seed)
    return PPO("MlpPolicy", envs, seed=seed, device="cpu", **{**SMALL, **options}).learn(256)


@lru_cache(maxsize=4)
def cached_buffer(kind: str = "discrete", states: int = 160) -> tuple[PPO, RetentionBuffer]:
    """An agent and its buffer, shared by tests that leave both alone."""
    agent = build_agent(kind)
    return agent, RetentionBuffer.collect(agent, OLD[kind], n_states=states, n_envs=2)


class SpikyReward(gym.RewardWrapper):
    """Random rewards of a size that makes PPO take violent steps."""

    def __init__(self, env: gym.Env, size: float = 10.0, seed: int = 0):
        super().__init__(env)
        self._size = size
        self._random = np.random.default_rng(seed)

    def reward(self, reward: Any) -> float:
        return float(self._size * self._random.standard_normal())
