"""LunarLander under another gravity or in wind."""

from typing import Any

import gymnasium as gym

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
