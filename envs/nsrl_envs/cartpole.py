"""CartPole, and CartPole whose actions or instruments do the opposite of what they did."""

from typing import Any

import gymnasium as gym
from gymnasium.envs.classic_control.cartpole import CartPoleEnv

from nsrl_envs.actions import SwapActions
from nsrl_envs.context import TaskContext
from nsrl_envs.errors import TaskError
from nsrl_envs.observations import ReverseSensors

#: Context of each task of the trio: zero for the first, then one entry each.
_CONTEXTS = {"stock": (0.0, 0.0), "swapped": (1.0, 0.0), "reversed_angle": (0.0, 1.0)}
_POLE_ANGLE = 2


def cartpole(swapped: bool = False, **kwargs: Any) -> gym.Env:
    """Make CartPole-v1 with a context entry, observations (5,).

    Args:
        swapped: Whether action 0 pushes to the right and action 1 to the left; also the context's value.
        kwargs: Passed on to the base environment.
    """
    env: gym.Env = CartPoleEnv(**kwargs)
    return TaskContext(SwapActions(env) if swapped else env, value=float(swapped))


def cartpole_of_trio(task: str = "stock", **kwargs: Any) -> gym.Env:
    """Make CartPole-v1 with two context entries, observations (6,).

    A policy that does not look at the context can do well on at most one of the three: swapped actions turn every
    good action into the bad one, and the reversed angle does where the angle decides and not where the angular
    velocity does.

    Args:
        task: "stock"; "swapped", where the two actions are; or "reversed_angle", where the gauge of the pole's angle
            shows its negative.
        kwargs: Passed on to the base environment.

    Raises:
        TaskError: If there is no such task.
    """
    if task not in _CONTEXTS:
        raise TaskError(f"there is no CartPole task {task!r} in the trio; its tasks are {', '.join(_CONTEXTS)}")
    env: gym.Env = CartPoleEnv(**kwargs)
    if task == "swapped":
        env = SwapActions(env)
    elif task == "reversed_angle":
        env = ReverseSensors(env, entries=(_POLE_ANGLE,))
    return TaskContext(env, value=_CONTEXTS[task], size=2)
