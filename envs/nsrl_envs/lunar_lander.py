"""LunarLander under another gravity, in wind, or with engines that answer to other actions."""

from typing import Any

import gymnasium as gym

from nsrl_envs.actions import ReverseActions, SwapActions
from nsrl_envs.context import TaskContext
from nsrl_envs.optional import load_environment


def lunar_lander(**kwargs: Any) -> gym.Env:
    """Make LunarLander-v3, no context, observations (8,).

    Args:
        kwargs: Passed on to the base environment: `gravity` in (-12, 0), `enable_wind`, `wind_power`, ...

    Raises:
        MissingExtra: If Box2D is not installed.
    """
    environment = load_environment("gymnasium.envs.box2d.lunar_lander:LunarLander", extra="box2d")
    return environment(**kwargs)


def told_lunar_lander(swapped: bool = False, continuous: bool = False, **kwargs: Any) -> gym.Env:
    """Make LunarLander-v3 with a context entry, observations (9,).

    Args:
        swapped: Whether the engines answer to other actions: of the four discrete ones, k does what 3 - k did;
            continuous ones are negated. Also the context's value.
        continuous: Whether actions are the throttles of the engines, (2,).
        kwargs: Passed on to the base environment.

    Raises:
        MissingExtra: If Box2D is not installed.
    """
    env = lunar_lander(continuous=continuous, **kwargs)
    turn = ReverseActions if continuous else SwapActions
    return TaskContext(turn(env) if swapped else env, value=float(swapped))
