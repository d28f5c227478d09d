"""A KL budget around any SB3 on-policy algorithm, in place; and a new task around any agent."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import gymnasium as gym
from sb3_contrib import TRPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from nsrl.errors import NsrlError, check_kind
from nsrl.rl.agents.agent import Agent, load
from nsrl.rl.agents.spaces import check_spaces
from nsrl.rl.agents.stock_models import set_in_motion
from nsrl.rl.algorithms.mixin import ProtectedMixin
from nsrl.rl.algorithms.options import build_config
from nsrl.rl.algorithms.trpo import NullSpaceTRPO
from nsrl.rl.budget.config import RetentionConfig
from nsrl.rl.playing.environments import training_env
from nsrl.rl.policies.distributions import distribution_of
from nsrl.rl.retention.buffer import RetentionBuffer

Algorithm = TypeVar("Algorithm", bound=OnPolicyAlgorithm)


def protect(
    model: Algorithm,
    retain: RetentionBuffer,
    kl_budget: float = 0.01,
    *,
    config: RetentionConfig | None = None,
    trust_buffer: bool = False,
    **options: Any,
) -> Algorithm:
    """Put a KL budget around an existing SB3 PPO, A2C, TRPO or MaskablePPO, in place.

    The model keeps its optimizer state, environment and callbacks; its class becomes a subclass of itself
    (`NullSpaceTRPO` for TRPO); the observation statistics of a VecNormalize around its environment are frozen.

    Args:
        model: any SB3 on-policy algorithm whose `train()` steps one optimizer.
        retain: the retention buffer.
        kl_budget: nats per state.
        config: all settings at once; or give single fields of `RetentionConfig` as keywords.

    Returns:
        The same object.

    Raises:
        NsrlError: not an on-policy algorithm, spaces differ, another agent's buffer, over the budget already.
    """
    if not isinstance(model, OnPolicyAlgorithm):
        raise NsrlError(
            f"{type(model).__name__} cannot be protected: only on-policy actor-critic algorithms (PPO, A2C, "
            "TRPO, MaskablePPO) can"
        )
    distribution_of(model.policy)  # type: ignore[arg-type]
    check_kind("config", config, (RetentionConfig, type(None)), "a RetentionConfig")
    if config is None:
        # The critic and its optimizer state are the user's here: from_pretrained resets them, protect does not.
        config = build_config(kl_budget=kl_budget, **{"critic": "keep", **options})
    elif options:
        config = replace(config, **options)
    cls = type(model)
    if not isinstance(model, ProtectedMixin):
        model.__class__ = _protected_class(cls)  # type: ignore[assignment]
    try:
        model.constrain(retain, config, trust_buffer=trust_buffer)  # type: ignore[attr-defined]
    except NsrlError:
        model.__class__ = cls
        raise
    return model


@cache
def _protected_class(cls: type[OnPolicyAlgorithm]) -> type[OnPolicyAlgorithm]:
    if cls is TRPO:
        # Its line search would answer for the rollout's KL only, and its optimizer never moves the actor.
        return NullSpaceTRPO

    def reduce(self: OnPolicyAlgorithm) -> tuple[Any, ...]:
        return _blank, (cls,), vars(self)  # no module has this class, where unpickling would look for it

    return type(f"Protected{cls.__name__}", (ProtectedMixin, cls), {"__module__": cls.__module__, "__reduce__": reduce})


def _blank(cls: type[OnPolicyAlgorithm]) -> OnPolicyAlgorithm:
    """An empty instance of the protected class of a stock one."""
    protected = _protected_class(cls)
    return protected.__new__(protected)


def attach_env(
    source: str | os.PathLike[str] | BaseAlgorithm | Agent,
    env: str | gym.Env | VecEnv,
    *,
    seed: int | None = None,
    n_envs: int = 1,
    trust: bool = False,
) -> OnPolicyAlgorithm:
    """An agent's model with a task to learn, ready for `protect` and `learn`; for algorithms that stay what they are.

        model = agents.attach_env("maskable.zip", new_env, n_envs=8)
        protect(model, retain=buffer, kl_budget=0.01).learn(600_000)

    Args:
        source, trust: as in `load`; a model in memory is changed in place, and keeps its optimizer.
        env, n_envs: as in `training_env`.
        seed: of the run.

    Raises:
        NsrlError: as `load` and `training_env`.
    """
    agent = load(source, trust=trust)
    model = agent.model
    wrapped = training_env(env, agent.normalizer, seed=seed, gamma=model.gamma, n_envs=n_envs)
    check_spaces(model, wrapped)
    # SB3's set_env takes only spaces of the same bounds, which mean nothing to a policy, and as many copies as its
    # rollout buffer was made for.
    model.observation_space = model.policy.observation_space = wrapped.observation_space
    model.action_space = model.policy.action_space = wrapped.action_space
    model.n_envs = wrapped.num_envs
    model.rollout_buffer = model.rollout_buffer_class(  # type: ignore[misc]
        model.n_steps,
        model.observation_space,
        model.action_space,
        device=model.device,
        gamma=model.gamma,
        gae_lambda=model.gae_lambda,
        n_envs=model.n_envs,
        **model.rollout_buffer_kwargs,
    )
    for name, value in set_in_motion(model).items():
        warnings.warn(f"{name} of the agent was 0, with which no weight moves; it is {value} now", stacklevel=2)
    model.set_env(wrapped)
    if seed is not None:
        model.seed = seed
        model.set_random_seed(seed)
    return model
