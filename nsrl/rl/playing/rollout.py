"""A roll-out of the stochastic policy on its own task, and generalised advantages under its own critic."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from torch import Tensor

from nsrl.rl.policies.actor_critic import policy_outputs
from nsrl.rl.policies.distributions import distribution_of
from nsrl.rl.policies.observations import Normalizer, Observations, in_batches, map_arrays, policy_inputs, stack

Progress = Callable[[int, int], Any]

# A roll-out goes on until every env has ended an episode, but not beyond these steps: some tasks never end.
LONGEST_WAIT = 1000


@dataclass(frozen=True)
class Rollout:
    """T steps of E envs under the stochastic policy, in raw (unnormalised) units.

    Attributes:
        observations: what the policy was shown before each step, raw, (T, E, ...) or a dict of those.
        rewards: raw rewards, (T, E) float32.
        dones: the step ended an episode, (T, E) bool.
        last_observations: raw observations after the last step, (E, ...).
        truncations: (step, env) of every time limit, in the order of `truncation_observations`.
        truncation_observations: raw final observations of those episodes.
        episode_returns: undiscounted returns of the completed episodes.
    """

    observations: Observations
    rewards: np.ndarray
    dones: np.ndarray
    last_observations: Observations
    truncations: list[tuple[int, int]]
    truncation_observations: list[Any]
    episode_returns: list[float]

    def flat_observations(self) -> Observations:
        """Observations as (T * E, ...), step-major."""
        return map_arrays(lambda array: array.reshape(-1, *array.shape[2:]), self.observations)


@contextmanager
def raw_observations(env: VecEnv) -> Iterator[None]:
    """Let a VecNormalize inside `env` pass raw observations and rewards, its statistics untouched."""
    normalize = unwrap_vec_normalize(env)
    if normalize is None:
        yield
        return
    flags = {name: getattr(normalize, name) for name in ("training", "norm_obs", "norm_reward")}
    try:
        for name in flags:
            setattr(normalize, name, False)
        yield
    finally:
        for name, value in flags.items():
            setattr(normalize, name, value)


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seed the global generators (some environments draw from them) and give them back as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed CUDA as well
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def evaluation_mode(policy: torch.nn.Module) -> Iterator[None]:
    """Switch dropout and batch norm off, and put each module back into the mode it had."""
    modes = [(module, module.training) for module in policy.modules()]
    policy.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def roll_out(
    policy: ActorCriticPolicy,
    env: VecEnv,
    n_transitions: int,
    seed: int,
    normalizer: Normalizer | None = None,
    progress: Progress | None = None,
) -> Rollout:
    """Run the stochastic policy for at least `n_transitions`, and until every env has ended an episode.

    The second condition (dropped after 1000 steps an env) keeps short collections from holding only the first
    steps of episodes. Expects `raw_observations(env)` and `evaluation_mode(policy)` to be in force.
    """
    generator, actions = torch.Generator().manual_seed(seed), distribution_of(policy)
    env.seed(seed)
    current: Any = env.reset()
    seen, rewards, dones, truncations, finals, returns = [], [], [], [], [], []  # type: ignore[var-annotated]
    running, ended = np.zeros(env.num_envs), np.zeros(env.num_envs, dtype=bool)
    n_steps = math.ceil(n_transitions / env.num_envs)
    step = 0
    while step < n_steps or (not ended.all() and step < LONGEST_WAIT):
        seen.append(map_arrays(np.array, current))
        with torch.no_grad():
            outputs = policy_outputs(policy, policy_inputs(current, normalizer, policy.device))
        current, reward, done, infos = env.step(actions.sample(policy, outputs, generator))
        rewards.append(reward)
        dones.append(done)
        running += reward
        for index in np.flatnonzero(done):
            returns.append(float(running[index]))
            final = infos[index].get("terminal_observation")
            if final is not None and infos[index].get("TimeLimit.truncated", False):
                truncations.append((step, int(index)))
                finals.append(final)
        running[done] = 0.0
        ended |= done
        step += 1
        if progress is not None:
            progress(step * env.num_envs, max(step, n_steps) * env.num_envs)

    return Rollout(
        observations=stack(seen),
        rewards=np.stack(rewards).astype(np.float32),
        dones=np.stack(dones),
        last_observations=map_arrays(np.array, current),
        truncations=truncations,
        truncation_observations=finals,
        episode_returns=returns,
    )


def advantages(
    policy: ActorCriticPolicy,
    rollout: Rollout,
    normalizer: Normalizer | None,
    gamma: float,
    gae_lambda: float,
    reward_scale: float | None = None,
    reward_clip: float = math.inf,
) -> tuple[np.ndarray, float]:
    """Generalised advantages under the agent's own critic, (T, E) float32, and the reward scale in use.

    As in SB3: a time limit is bootstrapped with the critic's value of the final observation, any other end is
    not. A critic that was trained on normalised rewards needs them in its unit: `reward_scale` times the raw
    reward, clipped to `reward_clip` as in `VecNormalize`. With `reward_scale=None` the unit is the one that
    best satisfies the critic's own Bellman equation, min_c sum (c r + gamma V(s') - V(s))^2.

    Source: Schulman et al. 2016, High-Dimensional Continuous Control Using Generalized Advantage Estimation.
    """
    critic: Callable[[Any], Tensor] = policy.predict_values

    def values(observations: Observations) -> np.ndarray:
        return in_batches(lambda inputs: critic(inputs)[:, 0], policy, observations, normalizer)

    n_steps, n_envs = rollout.rewards.shape
    value = values(rollout.flat_observations()).reshape(n_steps, n_envs)
    following = np.concatenate([value[1:], values(rollout.last_observations)[None]])
    following[rollout.dones] = 0.0
    if rollout.truncations:
        following[tuple(np.transpose(rollout.truncations))] = values(stack(rollout.truncation_observations))
    if reward_scale is None:
        reward_scale = critic_reward_scale(rollout.rewards, value - gamma * following)

    rewards = np.clip(rollout.rewards * reward_scale, -reward_clip, reward_clip)
    deltas = rewards + gamma * following - value
    result, last = np.zeros_like(deltas), np.zeros(n_envs, dtype=deltas.dtype)
    for step in reversed(range(n_steps)):
        last = deltas[step] + gamma * gae_lambda * ~rollout.dones[step] * last
        result[step] = last
    return result, reward_scale


def critic_reward_scale(rewards: np.ndarray, expected: np.ndarray) -> float:
    """Least-squares factor from raw rewards to V(s) - gamma V(s'); 1 where that is not positive."""
    scale = float((rewards * expected).sum()) / max(float(np.square(rewards).sum()), 1e-12)
    return scale if scale > 0.0 else 1.0
