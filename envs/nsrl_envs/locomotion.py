"""MuJoCo bodies that run forward or backward, one with a heavy torso, and one under another gravity."""

from typing import Any

import gymnasium as gym

from nsrl_envs.body_mass import ScaleBodyMass
from nsrl_envs.context import TaskContext
from nsrl_envs.gravity import ScaleGravity
from nsrl_envs.optional import load_environment

_CLASSES = {
    "HalfCheetah": "gymnasium.envs.mujoco.half_cheetah_v5:HalfCheetahEnv",
    "Swimmer": "gymnasium.envs.mujoco.swimmer_v5:SwimmerEnv",
    "Ant": "gymnasium.envs.mujoco.ant_v5:AntEnv",
    "Hopper": "gymnasium.envs.mujoco.hopper_v5:HopperEnv",
}


def runner(body: str, backward: bool = False, **kwargs: Any) -> gym.Env:
    """Make a v5 locomotion environment with a context entry.

    Args:
        body: "HalfCheetah", "Swimmer" or "Ant".
        backward: Whether speed along -x is rewarded instead of speed along +x; also the context's value.
        kwargs: Passed on to the base environment.

    Raises:
        MissingExtra: If MuJoCo is not installed.
    """
    environment = load_environment(_CLASSES[body], extra="mujoco")
    env = environment(forward_reward_weight=-1.0 if backward else 1.0, **kwargs)
    return TaskContext(env, value=float(backward))


def half_cheetah(torso_mass_factor: float = 1.0, **kwargs: Any) -> gym.Env:
    """Make HalfCheetah-v5 with a scaled torso mass and no context, observations (17,).

    Args:
        torso_mass_factor: What the mass of the torso is multiplied with; the observations do not show it.
        kwargs: Passed on to the base environment.

    Raises:
        MissingExtra: If MuJoCo is not installed.
    """
    env: gym.Env = load_environment(_CLASSES["HalfCheetah"], extra="mujoco")(**kwargs)
    return env if torso_mass_factor == 1 else ScaleBodyMass(env, body="torso", factor=torso_mass_factor)


def hopper(gravity_factor: float = 1.0, **kwargs: Any) -> gym.Env:
    """Make Hopper-v5 under another gravity and without context, observations (11,).

    Args:
        gravity_factor: What gravity is multiplied with; the observations do not show it.
        kwargs: Passed on to the base environment.

    Raises:
        MissingExtra: If MuJoCo is not installed.
    """
    env: gym.Env = load_environment(_CLASSES["Hopper"], extra="mujoco")(**kwargs)
    return env if gravity_factor == 1 else ScaleGravity(env, factor=gravity_factor)
