"""Environments for an agent: the new task to learn on, copies to play on, a VecEnv of whatever is given.

Copies made from an id are stepped together as NumPy arrays where `nsrl_envs.vectorised` knows the task, with the same
outcome bit for bit; the environment variable NSRL_VECTORISED=0 switches that off.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecTransposeImage, unwrap_vec_normalize

from nsrl.errors import NsrlError, check_whole, described
from nsrl.rl.agents.normalization import (
    ObservationNormalizer,
    RetainingVecNormalize,
    freeze_observations,
    same_statistics,
)
from nsrl_envs import TaskError, find_told
from nsrl_envs.vectorised.vec_env import side_by_side

Environments = str | gym.Env | VecEnv | Sequence[gym.Env]
#: Module that an environment needs, and the extra of nsrl that installs it.
EXTRAS = {"mujoco": "mujoco", "Box2D": "box2d", "minigrid": "minigrid"}


def training_env(
    env: str | gym.Env | VecEnv,
    normalizer: ObservationNormalizer | None,
    *,
    seed: int | None = None,
    gamma: float = 0.99,
    n_envs: int = 1,
) -> VecEnv:
    """The new task as a VecEnv whose observations the agent understands.

    Args:
        env: an environment id, a gymnasium environment, or a VecEnv. A VecNormalize around it has to have the agent's
            statistics; they are frozen in place.
        normalizer: the agent's statistics, put around a bare environment frozen, with fresh reward
            statistics; None leaves the environment as it is. They go beneath SB3's transposition of images, where
            stock `VecNormalize.load` puts them.
        seed: seeds the environment.
        gamma: discount of the reward statistics.
        n_envs: copies of the environment when `env` is an id.

    Raises:
        NsrlError: no environment, an unknown id, other shapes, or a VecNormalize around `env` already that has other
            statistics.
    """
    check_whole("n_envs", n_envs, 1)
    if seed is not None:
        check_whole("seed", seed, 0)
    if isinstance(env, str):
        env = make_envs(env, n_envs, seed)
    wrapped = _wrapped(env)
    around = unwrap_vec_normalize(wrapped)
    if normalizer is not None and around is not None and around.norm_obs:
        normalizer.check(wrapped.observation_space)
        seen = ObservationNormalizer.from_vec_normalize(around)
        if seen is None or not same_statistics(seen, normalizer):
            raise NsrlError(
                "the environment is inside a VecNormalize with other observation statistics than the agent's, through "
                "which the agent would not know its task; pass the bare environment, which gets the agent's, or put "
                "those around it yourself with VecNormalize.load"
            )
        freeze_observations(wrapped)
    elif normalizer is not None:
        inner = wrapped.venv if isinstance(wrapped, VecTransposeImage) else wrapped
        inner = inner if normalizer.fits(inner.observation_space) else wrapped
        normalized = RetainingVecNormalize(inner, normalizer, gamma=gamma, norm_reward=around is None)
        wrapped = _wrapped(normalized) if inner is not wrapped else normalized
    if seed is not None:
        wrapped.seed(seed)
    return wrapped


def make_envs(env: str, count: int, seed: int | None = None) -> VecEnv:
    """Copies of an environment side by side, each inside a Monitor.

    Raises:
        NsrlError: unknown id, or a package is missing; the sentence names the extra.
    """
    with told(env):
        # it calls the class and asks no more of it
        return make_vec_env(env, count, seed=seed, vec_env_cls=side_by_side)  # type: ignore[arg-type]


def open_copies(env: str, count: int) -> list[gym.Env]:
    """Independent copies of an environment.

    Raises:
        NsrlError: unknown id, or a package is missing; the sentence names the extra.
    """
    with told(env):
        return [gym.make(env, disable_env_checker=True) for _ in range(count)]


def as_vec_env(env: str | gym.Env | VecEnv, n_envs: int) -> VecEnv:
    """A VecEnv from an env id (n_envs copies), a gymnasium.Env or a VecEnv; images channels first.

    Raises:
        NsrlError: `env` is none of these, or cannot be made.
    """
    if isinstance(env, str):
        env = side_by_side([lambda copy=copy: copy for copy in open_copies(env, n_envs)])  # type: ignore[misc]
    return _wrapped(env, monitor=False)


def _wrapped(env: Any, monitor: bool = True) -> VecEnv:
    """As SB3 wraps the environment that a model is given.

    Raises:
        NsrlError: it is none, or SB3 cannot take it.
    """
    check_env(env)
    try:
        return BaseAlgorithm._wrap_env(env, monitor_wrapper=monitor)
    except Exception as error:  # SB3 asserts some of it, and runs into the rest
        raise NsrlError(f"Stable-Baselines3 cannot take the environment: {error}") from error


def check_env(env: Any) -> None:
    """Raise NsrlError unless SB3 may know what to do with an environment: gymnasium's, a VecEnv, or Gym's."""
    if isinstance(env, gym.vector.VectorEnv):
        raise NsrlError(
            f"env is {described(env)} of gymnasium, whose vectors Stable-Baselines3 does not read; pass the "
            "environment's id and n_envs, or a VecEnv, as make_vec_env of stable_baselines3.common.env_util makes them"
        )
    if isinstance(env, gym.Env | VecEnv):
        return
    of_gym = any(kind.__module__.partition(".")[0] == "gym" for kind in type(env).__mro__)
    if not of_gym:
        raise NsrlError(f"env must be an environment's id, a gymnasium.Env or an SB3 VecEnv, not {described(env)}")


def check_apart(env: Any, model: BaseAlgorithm, what: str) -> None:
    """Raise NsrlError where an environment that is to be played during learning is the one that is learnt on.

    Its episodes would go on under the learner's hands, from states that it has not seen.

    Args:
        env: an id, an environment, a VecEnv, or several environments.
        model: that learns.
        what: the environment is for, as the sentence says.
    """
    learnt_on = parts_of(model.env)
    several = env if isinstance(env, list | tuple) else [env]
    if env is None or any(part is known for each in several for part in parts_of(each) for known in learnt_on):
        given = "None" if env is None else "the environment that the model learns on"
        raise NsrlError(f"{what} is {given}; give it one of its own, as the id of the task")


def parts_of(env: Any) -> list[Any]:
    """What is left of an environment without its wrappers: the VecEnv and its copies, where they can be reached."""
    if isinstance(env, VecEnv):
        return [env.unwrapped, *(copy.unwrapped for copy in getattr(env.unwrapped, "envs", ()))]
    return [env.unwrapped] if isinstance(env, gym.Env) else []


@contextmanager
def told(env: str) -> Iterator[None]:
    """Around making an environment: what fails becomes a sentence, with nsrl's own extra where a package is missing.

    Raises:
        NsrlError: it cannot be made.
    """
    if env.count(":") > 1:
        raise NsrlError(f"cannot make the environment {env!r}: it is no id, as in Env-v0 or module:Env-v0")
    try:
        if env.startswith("MiniGrid-"):  # gymnasium >= 1.0 does not look for plugins by itself
            importlib.import_module("minigrid")
        find_told(env)
        yield
    except (gym.error.Error, ImportError, TypeError, TaskError) as error:
        text = " ".join(str(error).split())
        missing = isinstance(error, gym.error.DependencyNotInstalled | ImportError)
        extras = [extra for module, extra in EXTRAS.items() if module.lower() in text.lower()]
        if missing and extras and "nsrl[" not in text:
            text = f'it needs the {extras[0]} extra; install it: pip install "nsrl[{extras[0]}]"'
        raise NsrlError(f"cannot make the environment {env!r}: {text}") from error
