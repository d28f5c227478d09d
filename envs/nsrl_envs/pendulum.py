"""Pendulum swing-up, and the same with its torque reversed."""

from typing import Any

import gymnasium as gym
from gymnasium.envs.classic_control.pendulum import PendulumEnv

from nsrl_envs.actions import ReverseActions
from nsrl_envs.context import TaskContext


def pendulum(reversed_torque: bool = False, **kwargs: Any) -> gym.Env:
    """Make Pendulum-v1 with a context entry, observations (4,).

    Args:
        reversed_torque: Whether a positive action turns clockwise; also the context's value.
        kwargs: Passed on to the base environment.
    """
    env: gym.Env = PendulumEnv(**kwargs)
    return TaskContext(ReverseActions(env) if reversed_torque else env, value=float(reversed_torque))
