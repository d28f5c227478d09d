"""A deterministic task, callbacks that act at a given step, and a run that is there to be killed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

from nsrl.rl.algorithms.ppo import NullSpacePPO
from nsrl.rl.retention.buffer import RetentionBuffer
from nsrl.rl.training.checkpoint import Checkpoint

OLD, NEW = "nsrl/CartPole-v0", "nsrl/CartPoleSwapped-v0"
N_STEPS, N_ENVS = 32, 2
ROLLOUT = N_STEPS * N_ENVS


class Clockwork(gym.Env):
    """Deterministic resets and 16-step episodes, so that all end with the rollout; noise from an own generator."""

    observation_space, action_space = spaces.Box(-4.0, 4.0, (3,), np.float32), spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.time, self.state = 0, np.full(3, 0.1, np.float32)
        return self.state, {}

    def step(self, action: Any) -> Any:
        self.time += 1
        self.state = np.clip(self.state + 0.1 * self.np_random.normal(size=3) + (0.1 if action else -0.1), -4, 4)
        self.state = self.state.astype(np.float32)
        return self.state, float(self.state[0]), False, self.time == 16, {}


class At(BaseCallback):
    """Calls `action(model)` before the first environment step at or after `step`, once."""

    def __init__(self, step: int, action: Callable[[Any], Any]):
        super().__init__()
        self.step, self.action = step, action

    def _on_step(self) -> bool:
        if self.action is not None and self.num_timesteps > self.step:
            action, self.action = self.action, None
            action(self.model)
        return True


class Clock(BaseCallback):
    """Calls `action(model)` at every environment step."""

    def __init__(self, action: Callable[[Any], Any]):
        super().__init__()
        self.action = action

    def _on_step(self) -> bool:
        self.action(self.model)
        return True


class AtBoundary(At):
    """Calls `action(model)` before the first rollout that begins at or after `step`, once."""

    def _on_rollout_start(self) -> None:
        if self.action is not None and self.model.num_timesteps >= self.step:
            action, self.action = self.action, None
            action(self.model)

    def _on_step(self) -> bool:
        return True


def build_expert() -> PPO:
    return PPO("MlpPolicy", OLD, n_steps=32, batch_size=32, n_epochs=2, device="cpu", seed=2)


def build_buffer(agent: PPO) -> RetentionBuffer:
    return RetentionBuffer.collect(agent, OLD, n_states=64, n_envs=2, seed=3)


def build_model(
    agent: PPO | Path, buffer: RetentionBuffer | None = None, env: VecEnv | None = None, **options: Any
) -> NullSpacePPO:
    options = {
        "kl_budget": 1e-4,
        "n_steps": N_STEPS,
        "seed": 5,
        "learning_rate": LinearSchedule(2e-3, 1e-4, 1.0),
        "clip_range": LinearSchedule(0.3, 0.1, 1.0),
        "trust_buffer": True,
        "opening": "off",  # roll-outs begin at multiples of their length
        **options,
    }
    env = make_vec_env(NEW, N_ENVS) if env is None else env
    return NullSpacePPO.from_pretrained(agent, env, retain=buffer, **options)


def learn_without_end(path: Path, agent: Path, buffer: Path | None = None) -> None:
    """Learn, with a checkpoint a rollout, until the process is killed.

    Agent and buffer come in files: collected anew, with another number of threads, they would be others.
    """
    model = build_model(agent, None if buffer is None else RetentionBuffer.load(buffer))
    model.learn(10**9, callback=Checkpoint(path, every=ROLLOUT))


if __name__ == "__main__":
    torch.set_num_threads(1)
    learn_without_end(*map(Path, sys.argv[1:]))
