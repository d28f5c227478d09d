"""Collecting a retention buffer: roll the agent out on its own task and leave everything else as it was."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize, unwrap_vec_normalize

from nsrl.errors import NsrlError
from nsrl.rl.agents.agent import Agent, load
from nsrl.rl.agents.normalization import ObservationNormalizer
from nsrl.rl.playing.action_masks import INVALID, masked_by
from nsrl.rl.playing.rollout import (
    Progress,
    advantages,
    evaluation_mode,
    map_arrays,
    own_randomness,
    raw_observations,
    reference_outputs,
    roll_out,
)
from nsrl.rl.policies.actor_critic import action_family
from nsrl.rl.retention.provenance import provenance, registered_id

SELECTIONS = ("expert", "advantage")


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
        if self.select not in SELECTIONS:
            nearest = get_close_matches(str(self.select).lower(), SELECTIONS, n=1, cutoff=0.0)[0]
            raise NsrlError(
                f"select is {self.select!r}, but must be 'expert' or 'advantage'; did you mean {nearest!r}?"
            )
        for name, least in (("n_states", 1), ("n_envs", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise NsrlError(f"{name} is {value!r}, but must be a whole number of at least {least}")
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
    """Collect the fields of a `RetentionBuffer`; see `RetentionBuffer.collect`."""
    given, owner = env, getattr(agent, "model", agent)
    if given is None and isinstance(owner, BaseAlgorithm):
        given = owner.get_env()
    if given is None:
        raise NsrlError("the agent carries no environment; pass env, for instance the id of the task it was trained on")
    vec_env = as_vec_env(given, config.n_envs)
    try:
        model, trained, source = resolve_agent(agent, trust, vec_env)
        policy, family = model.policy, action_family(model.policy)
        normalizer = frozen_normalizer(trained, vec_env)
        scaling = unwrap_vec_normalize(vec_env) or model.get_vec_normalize_env()
        unit = reward_unit(config.reward_scale, scaling, normalizer)
        rng = np.random.default_rng(config.seed)
        with own_randomness(config.seed), evaluation_mode(policy):
            with raw_observations(vec_env), masked_by(vec_env, policy) as masks:
                rollout = roll_out(policy, family, vec_env, config.n_transitions(), config.seed, normalizer, progress)
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
        env_id = given if isinstance(given, str) else registered_id(vec_env)
    finally:
        if isinstance(given, str):
            vec_env.close()
        elif isinstance(owner, BaseAlgorithm) and vec_env is owner.get_env():
            owner._last_obs = None  # the env has moved on, so SB3 has to reset it before it learns again

    return {
        "observations": observations,
        "outputs": outputs,
        **distribution(model),
        "heldout": split(config.n_states, config.heldout, rng),
        "normalizer": normalizer,
        "provenance": provenance(model, source, env_id, config, rollout, scale),
    }


def distribution(model: OnPolicyAlgorithm) -> dict[str, Any]:
    """What makes a distribution of a model's outputs: the fields `family`, `log_std` and `nvec` of a buffer."""
    policy, space = model.policy, model.action_space
    family = action_family(policy)
    return {
        "family": family,
        "log_std": policy.log_std.detach().cpu().numpy().astype(np.float32) if family == "gaussian" else None,
        "nvec": tuple(int(n) for n in space.nvec) if isinstance(space, spaces.MultiDiscrete) else None,
    }


def split(n_states: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """Which states are held out: a random `share` of them, but never all, (N,) bool."""
    heldout = np.zeros(n_states, dtype=bool)
    heldout[rng.permutation(n_states)[: min(round(share * n_states), n_states - 1)]] = True
    return heldout


def resolve_agent(
    agent: BaseAlgorithm | Agent | str | os.PathLike[str], trust: bool = False, env: VecEnv | None = None
) -> tuple[OnPolicyAlgorithm, ObservationNormalizer | None, str | None]:
    """The model, its observation statistics, and the name of its file; its spaces fit `env` if that is given.

    Raises:
        NsrlError: for anything but an on-policy agent or the path of one, and for other spaces.
    """
    if not isinstance(agent, str | os.PathLike | BaseAlgorithm | Agent):
        raise NsrlError(
            f"the agent is a {type(agent).__name__}, but must be an on-policy Stable-Baselines3 model, "
            "an nsrl Agent or the path of one"
        )
    loaded = load(agent, env=env, trust=trust)
    return loaded.model, loaded.normalizer, None if loaded.path is None else loaded.path.name


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
            warnings.warn("the VecNormalize has seen no observations: are these the agent's statistics?", stacklevel=4)
        try:
            normalizer.check(env.observation_space)
        except NsrlError as error:
            raise NsrlError(f"{error}; VecNormalize must be the last wrapper that changes observations") from error
    return normalizer


def same_statistics(first: ObservationNormalizer, second: ObservationNormalizer) -> bool:
    """Whether two normalisers map every observation alike."""
    one, other = first.to_arrays() | {"count": np.zeros(())}, second.to_arrays() | {"count": np.zeros(())}
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


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
