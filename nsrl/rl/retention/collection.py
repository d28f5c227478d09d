"""Collecting a retention buffer: roll the agent out on its own task and leave everything else as it was."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize

from nsrl.errors import NsrlError, check_kind, check_number, check_whole, described, nearest
from nsrl.rl.agents.agent import Agent, fingerprint, resolve_agent
from nsrl.rl.agents.normalization import ObservationNormalizer, same_statistics
from nsrl.rl.agents.spaces import describe_space
from nsrl.rl.playing.action_masks import masked_by
from nsrl.rl.playing.environments import as_vec_env
from nsrl.rl.playing.rollout import (
    Progress,
    Rollout,
    advantages,
    evaluation_mode,
    own_randomness,
    raw_observations,
    roll_out,
)
from nsrl.rl.policies.distributions import INVALID, described_distribution
from nsrl.rl.policies.observations import map_arrays, reference_outputs

SELECTIONS = ("expert", "advantage")


@dataclass(frozen=True)
class CollectionConfig:
    """How many states to keep, which ones, and from which roll-outs; checked on construction.

    Raises:
        NsrlError: for a value out of range.
    """

    n_states: int = 2048
    """States in the buffer."""
    select: str = "expert"
    """"expert" keeps visited states uniformly, "advantage" those of highest generalised advantage."""
    seed: int = 0
    """Seed of environments, actions, selection and held-out split."""
    n_envs: int = 8
    """Copies of the environment, when it is given by its id."""
    oversample: float = 4.0
    """Transitions to roll out for each state kept, so that states come from whole episodes."""
    quantile: float = 0.5
    """Share of transitions, of highest advantage, among which select="advantage" draws."""
    heldout: float = 0.2
    """Share of the states that is held out."""
    task: str | None = None
    """Name of the task in logs; default the env id."""
    reward_scale: float | None = None
    """Factor from raw rewards to the critic's unit (select="advantage"); None finds it, see `reward_unit`."""

    def __post_init__(self) -> None:
        check_kind("select", self.select, str, "'expert' or 'advantage'")
        if self.select not in SELECTIONS:
            near = nearest(str(self.select).lower(), SELECTIONS, cutoff=0.0)
            raise NsrlError(f"select is {self.select!r}, but must be 'expert' or 'advantage'; did you mean {near!r}?")
        check_kind("task", self.task, (str, type(None)), "a name")
        for name, least in (("n_states", 1), ("n_envs", 1), ("seed", 0)):
            check_whole(name, getattr(self, name), least)
        for name in ("oversample", "quantile", "heldout", "reward_scale"):
            if name != "reward_scale" or self.reward_scale is not None:
                check_number(name, getattr(self, name))
        ranges = {
            "oversample": (self.oversample >= 1.0 and self.oversample < math.inf, "at least 1"),
            "quantile": (0.0 < self.quantile <= 1.0, "in (0, 1]"),
            "heldout": (0.0 <= self.heldout < 1.0, "in [0, 1)"),
            "reward_scale": (self.reward_scale is None or 0.0 < self.reward_scale < math.inf, "positive"),
        }
        for name, (valid, expected) in ranges.items():
            if not valid:
                raise NsrlError(f"{name} is {getattr(self, name)!r}, but must be {expected}")

    def n_transitions(self) -> int:
        """Transitions to roll out: enough to select from, too."""
        share = self.quantile if self.select == "advantage" else 1.0
        return math.ceil(self.n_states * max(self.oversample, 1.0 / share))


def collect(
    agent: BaseAlgorithm | Agent | str | os.PathLike[str],
    env: str | gym.Env | VecEnv | None,
    config: CollectionConfig,
    trust: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Collect the fields of a `RetentionBuffer`; see `RetentionBuffer.collect`.

    Raises:
        NsrlError: as there.
    """
    if progress is not None and not callable(progress):
        raise NsrlError(f"progress is {described(progress)}, but must be a function of two numbers")
    given, owner = env, getattr(agent, "model", agent)
    if given is None and isinstance(owner, BaseAlgorithm):
        given = owner.get_env()
    if given is None:
        raise NsrlError("the agent carries no environment; pass env, for instance the id of the task it was trained on")
    vec_env = as_vec_env(given, config.n_envs)
    try:
        env_id = given if isinstance(given, str) else registered_id(vec_env)
        return visited_states(resolve_agent(agent, trust, vec_env), vec_env, config, env_id, progress)
    finally:
        if isinstance(given, str):
            vec_env.close()
        elif isinstance(owner, BaseAlgorithm) and vec_env is owner.get_env():
            owner._last_obs = None  # the env has moved on, so SB3 has to reset it before it learns again


def visited_states(
    agent: tuple[OnPolicyAlgorithm, ObservationNormalizer | None, str | None],
    env: VecEnv,
    config: CollectionConfig,
    env_id: str | None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fields of a `RetentionBuffer`: states that an agent visits, and what it does there.

    Args:
        agent: model, observation statistics and name, as `resolve_agent` gives them.
        env: the old task; it is left in mid-episode.
        config: how many states, and which.
        env_id: the task's, where it has one.
        progress: called with (transitions so far, total) after each step.

    Raises:
        NsrlError: the statistics are not those around the environment, or do not fit it.
    """
    model, trained, source = agent
    policy: Any = model.policy
    normalizer = frozen_normalizer(trained, env)
    scaling = unwrap_vec_normalize(env) or model.get_vec_normalize_env()
    unit = reward_unit(config.reward_scale, scaling, normalizer)
    rng = np.random.default_rng(config.seed)
    with own_randomness(config.seed), evaluation_mode(policy):
        with raw_observations(env), masked_by(env, policy) as masks:
            rollout = roll_out(policy, env, config.n_transitions(), config.seed, normalizer, progress)
        candidates, scale = np.arange(rollout.rewards.size), None
        if config.select == "advantage":
            advantage, scale = advantages(policy, rollout, normalizer, model.gamma, model.gae_lambda, *unit)
            n_best = max(config.n_states, round(config.quantile * advantage.size))
            candidates = np.argsort(-advantage.ravel(), kind="stable")[:n_best]
        chosen = np.sort(rng.choice(candidates, config.n_states, replace=False))
        observations = map_arrays(lambda array: array[chosen], rollout.flat_observations())
        outputs = reference_outputs(policy, observations, normalizer)
        if masks:
            outputs = np.where(np.concatenate(masks)[chosen], outputs, np.float32(INVALID))
    return {
        "observations": observations,
        "outputs": outputs,
        **described_distribution(model),
        "heldout": split(config.n_states, config.heldout, rng),
        "normalizer": normalizer,
        "provenance": provenance(model, source, env_id, config, rollout, scale),
    }


def split(n_states: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """Which states are held out: a random `share` of them, but never all, (N,) bool."""
    heldout = np.zeros(n_states, dtype=bool)
    heldout[rng.permutation(n_states)[: min(round(share * n_states), n_states - 1)]] = True
    return heldout


def frozen_normalizer(trained: ObservationNormalizer | None, env: VecEnv) -> ObservationNormalizer | None:
    """Observation statistics that the agent was trained with: its own, or the VecNormalize around `env`.

    Raises:
        NsrlError: when both exist and differ, since one feeds the policy what it was not trained on; or when
            a wrapper reshapes observations after they were normalised.
    """
    wrapper = unwrap_vec_normalize(env)
    given = None if wrapper is None else ObservationNormalizer.from_vec_normalize(wrapper)
    if trained is not None and given is not None and not same_statistics(trained, given):
        raise NsrlError(
            "the VecNormalize around the environment has other observation statistics than the agent; pass "
            "the environment without it, or load the agent's statistics into it"
        )
    normalizer = trained or given
    if normalizer is not None:
        if normalizer.count < 1.0:
            warnings.warn("the VecNormalize has seen no observations: are these the agent's statistics?", stacklevel=5)
        try:
            normalizer.check(env.observation_space)
        except NsrlError as error:
            raise NsrlError(f"{error}; VecNormalize must be the last wrapper that changes observations") from error
    return normalizer


def reward_unit(
    given: float | None, normalize: VecNormalize | None, normalizer: ObservationNormalizer | None
) -> tuple[float | None, float]:
    """Scale and clip from raw rewards to the unit of the critic; scale None asks to fit it to the critic.

    The frozen reward statistics of a VecNormalize that normalises rewards; where the agent was normalised but
    those are not at hand (saved without, or switched off for evaluation), the fit; else raw rewards.
    """
    if given is None and normalize is not None and normalize.norm_reward:
        return float(1.0 / np.sqrt(normalize.ret_rms.var + normalize.epsilon)), normalize.clip_reward
    if given is None and (normalize is not None or normalizer is not None):
        return None, math.inf
    return 1.0 if given is None else given, math.inf


def provenance(
    model: OnPolicyAlgorithm,
    source: str | None,
    env_id: str | None,
    config: CollectionConfig,
    rollout: Rollout,
    reward_scale: float | None,
) -> dict[str, Any]:
    """Where a buffer comes from, as plain JSON."""
    returns = rollout.episode_returns
    return {
        **identity(model, source),
        "env_id": env_id,
        "task": config.task or env_id or "old",
        "seed": int(config.seed),
        "select": config.select,
        "n_states": int(config.n_states),
        "n_transitions": int(rollout.rewards.size),
        "quantile": float(config.quantile) if config.select == "advantage" else None,
        "reward_scale": reward_scale,
        "heldout": float(config.heldout),
        "episodes": len(returns),
        "return_mean": float(np.mean(returns)) if returns else None,
    }


def identity(model: OnPolicyAlgorithm, source: str | None) -> dict[str, Any]:
    """Which agent a buffer's outputs are from, and what it was made with, as plain JSON."""
    return {
        "fingerprint": fingerprint(model.policy),
        "agent": source,
        "algorithm": type(model).__name__,
        "observation_space": describe_space(model.observation_space),
        "action_space": describe_space(model.action_space),
        **circumstances(),
    }


def circumstances() -> dict[str, Any]:
    """Versions and date, as plain JSON."""
    return {
        "versions": {name: version(name) for name in ("nsrl", "torch", "stable-baselines3", "gymnasium", "numpy")},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def version(package: str) -> str | None:
    """Installed version of a package, None when it runs from a source tree."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def registered_id(env: VecEnv) -> str | None:
    """Gymnasium id of the first environment, None when it was not made from the registry."""
    try:
        return env.get_attr("spec", 0)[0].id
    except AttributeError:
        return None
