"""Small agents and buffers for the tests of the retention engine; nothing is trained for long."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from nsrl.rl.policies.actor_critic import policy_outputs
from nsrl.rl.retention.buffer import RetentionBuffer

SMALL: dict[str, Any] = {"n_steps": 64, "batch_size": 64, "n_epochs": 3, "learning_rate": 3e-3}
#: What is tested of the budget is tested where updates have to share the network with the old task.
SHARED: dict[str, Any] = {**SMALL, "confine": "off"}
OLD = {"discrete": "nsrl/CartPole-v0", "box": "nsrl/Pendulum-v0"}
NEW = {"discrete": "nsrl/CartPoleSwapped-v0", "box": "nsrl/PendulumReversed-v0"}


def build_agent(kind: str = "discrete", seed: int = 0, **options: Any) -> PPO:
    """An agent that has seen a few rollouts of the old task."""
    envs = make_vec_env(OLD[kind], 2, seed=seed)
    return PPO("MlpPolicy", envs, seed=seed, device="cpu", **{**SMALL, **options}).learn(256)


def trained(kind: str = "discrete", states: int = 160) -> tuple[PPO, RetentionBuffer]:
    """An agent and its buffer, trained once and a copy for every test: what one does to them, no other sees.

    Random numbers go on where they were, so that a test does not depend on which one has asked first.
    """
    with generators_left_alone():
        content, buffer = _trained(kind, states)
        return unzipped(content, kind), copy.deepcopy(buffer)


@lru_cache(maxsize=4)
def _trained(kind: str, states: int) -> tuple[bytes, RetentionBuffer]:
    agent = build_agent(kind)
    return zipped(agent), RetentionBuffer.collect(agent, OLD[kind], n_states=states, n_envs=2)


def certain(gap: float = 30.0, states: int = 160) -> tuple[PPO, RetentionBuffer]:
    """A CartPole agent whose likelier action leads by `gap` nats at half of the states, and its buffer."""
    agent, buffer = trained()
    with torch.no_grad(), generators_left_alone():
        logits = policy_outputs(agent.policy, buffer.inputs())
        for parameter in agent.policy.action_net.parameters():
            parameter.mul_(gap / (logits[:, 0] - logits[:, 1]).abs().median())
        return agent, RetentionBuffer.collect(agent, OLD["discrete"], n_states=states, n_envs=2)


def narrow(log_std: float = -3.0, states: int = 160) -> tuple[PPO, RetentionBuffer]:
    """A Pendulum agent that hardly varies its actions, and its buffer."""
    agent, _ = trained("box")
    with torch.no_grad(), generators_left_alone():
        agent.policy.log_std.fill_(log_std)
        return agent, RetentionBuffer.collect(agent, OLD["box"], n_states=states, n_envs=2)


def zipped(agent: PPO) -> bytes:
    """An agent as it can be kept and handed out again and again."""
    stream = io.BytesIO()
    agent.save(stream)
    return stream.getvalue()


def unzipped(content: bytes, kind: str = "discrete") -> PPO:
    """A fresh copy of it, on the old task."""
    return PPO.load(io.BytesIO(content), make_vec_env(OLD[kind], 2, seed=0), device="cpu")


@contextmanager
def generators_left_alone() -> Iterator[None]:
    """Put Python's, numpy's and torch's generators back to where they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class SpikyReward(gym.RewardWrapper):
    """Random rewards of a size that makes PPO take violent steps."""

    def __init__(self, env: gym.Env, size: float = 10.0, seed: int = 0):
        super().__init__(env)
        self._size = size
        self._random = np.random.default_rng(seed)

    def reward(self, reward: Any) -> float:
        return float(self._size * self._random.standard_normal())
