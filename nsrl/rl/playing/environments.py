"""Environments for an agent: the new task to learn on, copies to play on, a VecEnv of whatever is given."""

from __future__ import annotations

from collections.abc import Sequence

import gymnasium as gym
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, unwrap_vec_normalize

from nsrl.errors import NsrlError
from nsrl.rl.agents.normalization import ObservationNormalizer, RetainingVecNormalize


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
        env: an environment id, a gymnasium environment, or a VecEnv.
        normalizer: the agent's statistics, put around a bare environment frozen, with fresh reward
            statistics; None leaves the environment as it is.
        seed: seeds the environment.
        gamma: discount of the reward statistics.
        n_envs: copies of the environment when `env` is an id.

    Raises:
        NsrlError: unknown id, other shapes, or a VecNormalize around `env` already that would move its own
            statistics.
    """
    if isinstance(env, str):
        try:
            env = make_vec_env(env, n_envs=n_envs, seed=seed)
        except (gym.error.Error, ImportError) as error:
            raise NsrlError(f"cannot make the environment {env!r}: {error}") from error
    wrapped = BaseAlgorithm._wrap_env(env)
    around = unwrap_vec_normalize(wrapped)
    if (
        normalizer is not None
        and around is not None
        and around.norm_obs
        and not isinstance(around, RetainingVecNormalize)
    ):
        raise NsrlError(
            "the environment is inside a VecNormalize whose observation statistics would go on moving; pass "
            "the bare environment, or one inside nsrl.rl.agents.normalization.RetainingVecNormalize"
        )
    if normalizer is not None and (around is None or not around.norm_obs):
        wrapped = RetainingVecNormalize(wrapped, normalizer, gamma=gamma, norm_reward=around is None)
    if seed is not None:
        wrapped.seed(seed)
    return wrapped


Environments = str | gym.Env | VecEnv | Sequence[gym.Env]


def open_copies(env: str, count: int) -> list[gym.Env]:
    """Independent copies of an environment.

    Raises:
        NsrlError: unknown id or a missing dependency.
    """
    # gymnasium >= 1.0 does not look for plugins by itself; the prefix makes it import the module.
    name = f"nsrl_envs:{env}" if env.startswith("nsrl/") else env
    try:
        return [gym.make(name, disable_env_checker=True) for _ in range(count)]
    except (gym.error.Error, ImportError) as error:
        raise NsrlError(f"cannot make the environment {env!r}: {error}") from error


def as_vec_env(env: str | gym.Env | VecEnv, n_envs: int) -> VecEnv:
    """A VecEnv from an env id (n_envs copies), a gymnasium.Env or a VecEnv; images channels first."""
    if isinstance(env, str):
        # gymnasium >= 1.0 does not look for plugins by itself; the prefix makes it import the module.
        name = f"nsrl_envs:{env}" if env.startswith("nsrl/") else env
        try:
            env = DummyVecEnv([lambda: gym.make(name) for _ in range(n_envs)])
        except (gym.error.Error, ImportError) as error:
            raise NsrlError(f"cannot make the environment {name!r}: {error}") from error
    elif not isinstance(env, gym.Env | VecEnv):
        raise NsrlError(f"env must be an env id, a gymnasium.Env or an SB3 VecEnv, not {type(env).__name__}")
    return BaseAlgorithm._wrap_env(env, monitor_wrapper=False)
