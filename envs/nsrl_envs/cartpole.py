"""CartPole, and CartPole with its two actions swapped."""

from typing import Any

import gymnasium as gym
from gymnasium.envs.classic_control.cartpole import CartPoleEnv

from nsrl_envs.actions import SwapActions
from nsrl_envs.context import TaskContext


def cartpole(swapped: bool = False, **kwargs: Any) -> gym.Env:
    """Make CartPole-v1 with a context entry, observations (5,).

    Args:
        swapped: Whether action 0 pushes to the right and action 1 to the left; also the context's value.
        kwargs: Passed on to the base environment.
    """
    env: gym.Env = CartPoleEnv(**kwargs)
    return TaskContext(SwapActions(env) if swapped else env, value=float(swapped))
