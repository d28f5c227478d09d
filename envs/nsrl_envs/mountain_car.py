"""MountainCar, discrete and continuous, and the same with its pushes swapped."""

from typing import Any

import gymnasium as gym
from gymnasium.envs.classic_control.continuous_mountain_car import Continuous_MountainCarEnv
from gymnasium.envs.classic_control.mountain_car import MountainCarEnv

from nsrl_envs.actions import ReverseActions, SwapActions
from nsrl_envs.context import TaskContext


def mountain_car(swapped: bool = False, **kwargs: Any) -> gym.Env:
    """Make MountainCar-v0 with a context entry, observations (3,).

    Args:
        swapped: Whether actions 0 and 2 push the other way, action 1 (no push) nothing; also the context's value.
        kwargs: Passed on to the base environment.
    """
    env: gym.Env = MountainCarEnv(**kwargs)
    return TaskContext(SwapActions(env) if swapped else env, value=float(swapped))


def continuous_mountain_car(reversed_force: bool = False, **kwargs: Any) -> gym.Env:
    """Make MountainCarContinuous-v0 with a context entry, observations (3,).

    Args:
        reversed_force: Whether the force acts the other way; also the context's value.
        kwargs: Passed on to the base environment.
    """
    env: gym.Env = Continuous_MountainCarEnv(**kwargs)
    return TaskContext(ReverseActions(env) if reversed_force else env, value=float(reversed_force))
