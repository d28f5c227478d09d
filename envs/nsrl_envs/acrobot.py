"""Acrobot swing-up, and the same with its torques swapped."""

from typing import Any

import gymnasium as gym
from gymnasium.envs.classic_control.acrobot import AcrobotEnv

from nsrl_envs.actions import SwapActions
from nsrl_envs.context import TaskContext


def acrobot(swapped: bool = False, **kwargs: Any) -> gym.Env:
    """Make Acrobot-v1 with a context entry, observations (7,).

    Args:
        swapped: Whether actions 0 and 2 do what the other did, action 1 (no torque) nothing; also the context's value.
        kwargs: Passed on to the base environment.
    """
    env: gym.Env = AcrobotEnv(**kwargs)
    return TaskContext(SwapActions(env) if swapped else env, value=float(swapped))
