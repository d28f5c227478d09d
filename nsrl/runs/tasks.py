"""Environments by their ids: made, seeded, and refused with a sentence that says what is missing."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nsrl.errors import NsrlError
from nsrl.reading.limits import shown
from nsrl.runs.config import EvaluateConfig, FinetuneConfig
from nsrl.runs.memory import ENVIRONMENT, check_memory

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

#: Module that an environment needs, and the extra of nsrl that installs it.
EXTRAS = {"mujoco": "mujoco", "Box2D": "box2d", "minigrid": "minigrid"}


@dataclass(frozen=True)
class Tasks:
    """The two tasks of a fine-tuning run.

    Attributes:
        old: environment id of the task that the agent is good at.
        new: environment id of the task to learn.
        name: what the run is called.
    """

    old: str
    new: str
    name: str


def resolve_tasks(config: FinetuneConfig | EvaluateConfig) -> Tasks:
    """The tasks that a configuration names, by pair or by environment ids.

    Raises:
        NsrlError: none or contradicting ones, or an unknown pair.
    """
    old, new = getattr(config, "old_env", None), getattr(config, "new_env", None)
    if config.pair is None:
        if old is None or new is None:
            raise NsrlError("no tasks: set pair (as in --pair cartpole_swapped), or both old_env and new_env")
        return Tasks(old, new, config.name or new)  # type: ignore[union-attr]
    if old is not None or new is not None:
        raise NsrlError("pair and old_env or new_env are both set; use one or the other")
    import nsrl_envs

    try:
        found = nsrl_envs.pair(config.pair)
    except nsrl_envs.TaskError as error:
        raise NsrlError(str(error)) from error
    return Tasks(found.retained, found.new, getattr(config, "name", None) or found.name)


def make_envs(env: str, count: int, seed: int) -> VecEnv:
    """Copies of an environment side by side, each inside a Monitor.

    Raises:
        NsrlError: unknown id, or a package is missing; the sentence names the extra.
    """
    import gymnasium as gym
    from stable_baselines3.common.env_util import make_vec_env

    register(env)
    try:
        gym.spec(env)
    except (ValueError, AttributeError) as error:  # what module:Env-v0 names may hold anything
        raise NsrlError(f"{shown(env, 100)!r} is no environment id: {error}") from error
    except (gym.error.Error, ImportError) as error:
        raise NsrlError(f"cannot make the environment {env}: {error}") from error
    check_memory(f"n_envs {count}", count * ENVIRONMENT)
    try:
        return make_vec_env(env, count, seed=seed)
    except gym.error.DependencyNotInstalled as error:
        raise NsrlError(f"cannot make the environment {env}: {_with_extra(error)}") from error
    except (gym.error.Error, ImportError, TypeError) as error:
        raise NsrlError(f"cannot make the environment {env}: {error}") from error


def register(env: str) -> None:
    """Import what registers an id, since gymnasium >= 1.0 does not look for plugins by itself.

    Raises:
        NsrlError: that package is not installed.
    """
    if env.startswith("nsrl/"):
        importlib.import_module("nsrl_envs")
    elif env.startswith("MiniGrid-"):
        if importlib.util.find_spec("minigrid") is None:
            raise NsrlError(f'{env} needs the minigrid extra; install it: pip install "nsrl[minigrid]"')
        importlib.import_module("minigrid")


def check_fits(model: Any, env: str) -> None:
    """Raise NsrlError, naming both spaces, unless a model can act in an environment."""
    from nsrl.rl.agents.spaces import check_spaces

    copies = make_envs(env, 1, 0)
    try:
        check_spaces(model, copies)
    except NsrlError as error:
        raise NsrlError(f"{env}: {error}") from error
    finally:
        copies.close()


def _with_extra(error: Exception) -> str:
    """The error's sentence, with nsrl's own extra where the error names only the package."""
    text = " ".join(str(error).split())
    for module, extra in EXTRAS.items():
        if module.lower() in text.lower() and "nsrl[" not in text:
            return f'it needs the {extra} extra; install it: pip install "nsrl[{extra}]"'
    return text
