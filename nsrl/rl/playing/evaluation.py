"""The return of a policy on a task: vectorised, from fixed seeds, and leaving no trace in a training run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from nsrl.errors import NsrlError, check_kind, check_whole
from nsrl.rl.agents.agent import Agent, resolve_agent
from nsrl.rl.agents.normalization import ObservationNormalizer
from nsrl.rl.agents.spaces import check_spaces
from nsrl.rl.playing.action_masks import mask_reader
from nsrl.rl.playing.copies import Copies, in_step
from nsrl.rl.playing.environments import Environments, open_copies
from nsrl.rl.playing.rollout import evaluation_mode, own_randomness, raw_observations
from nsrl.rl.policies.actor_critic import policy_outputs
from nsrl.rl.policies.distributions import distribution_of, with_masks
from nsrl.rl.policies.observations import Observations, stack

#: Steps after which an episode counts as one that never ends.
LONGEST = 100_000

#: Raw observations of all rows, the episode that each row is in, and valid actions (None: all), to actions.
Actor = Callable[[Observations, Sequence[int], np.ndarray | None], np.ndarray]

#: Valid actions of the current observations.
Masks = Callable[[gym.Env | VecEnv], np.ndarray] | None


@dataclass(frozen=True)
class Returns:
    """Undiscounted raw returns of complete episodes; entry i is of the episode that began from `seed + i`.

    Attributes:
        mean, std, minimum: over the episodes; std is that of the population.
        returns: one an episode, in the order of their seeds.
        lengths: their steps.
    """

    mean: float
    std: float
    minimum: float
    returns: tuple[float, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, returns: np.ndarray, lengths: np.ndarray) -> Returns:
        """Summarise the returns and lengths of some episodes, both (episodes,)."""
        return cls(
            mean=float(returns.mean()),
            std=float(returns.std()),
            minimum=float(returns.min()),
            returns=tuple(returns.tolist()),
            lengths=tuple(lengths.tolist()),
        )


def evaluate(
    model: BaseAlgorithm | Agent | str | os.PathLike[str],
    env: Environments,
    *,
    normalizer: ObservationNormalizer | None = None,
    episodes: int = 20,
    seed: int = 10_000,
    n_envs: int = 20,
    deterministic: bool = True,
) -> Returns:
    """Play complete episodes of a task; common random numbers make the results of two policies comparable.

    Episode i starts from seed `seed + i` whatever `n_envs` is, and exactly these episodes count, however long
    they take. The policy sees observations under `normalizer` and nothing else: never the moving statistics
    of a training environment. Rewards are raw. A MaskablePPO plays under the action masks of environments that have
    them. The global random generators and the policy's training mode
    stay as they were.

    Args:
        model: an SB3 on-policy model; or an `Agent` or the path of one, whose own normaliser is then the
            default.
        env: an environment id, a gymnasium environment, several copies of one (see `open_copies`), or a
            VecEnv, whose VecNormalize is switched off meanwhile. Passed environments are reset and stay open.
        normalizer: frozen statistics through which the policy sees observations; None shows them raw.
        episodes: how many.
        seed: of the first episode.
        n_envs: copies to play at once when `env` is an id.
        deterministic: play the mode of the action distribution; else sample, from a generator of each
            episode's own.

    Raises:
        NsrlError: no episodes, an unknown id, spaces that are not the policy's, episodes that never end, or a
            VecNormalize without a normaliser to see through.
    """
    for name, value, least in (("episodes", episodes, 1), ("n_envs", n_envs, 1), ("seed", seed, 0)):
        check_whole(name, value, least)
    if not callable(getattr(normalizer, "normalize", None)):  # one that moves along with a training will do, too
        kinds = (ObservationNormalizer, type(None))
        check_kind("normalizer", normalizer, kinds, "an ObservationNormalizer, such as the normalizer of an Agent")
    if not isinstance(env, str):
        for one in env if isinstance(env, list | tuple) and env else [env]:
            check_kind("env", one, (gym.Env, VecEnv), "an environment's id, a gymnasium.Env, several, or an SB3 VecEnv")
    learner, own_normalizer, _ = resolve_agent(model, trust=False)
    seen = own_normalizer if normalizer is None else normalizer
    return play(learner, env, seen, episodes=episodes, seed=seed, n_envs=n_envs, deterministic=deterministic)


def play(
    learner: OnPolicyAlgorithm,
    env: Environments,
    normalizer: ObservationNormalizer | None,
    *,
    episodes: int,
    seed: int,
    n_envs: int = 20,
    deterministic: bool = True,
) -> Returns:
    """As `evaluate`, for a model at hand, which sees observations under `normalizer` alone.

    Raises:
        NsrlError: as `evaluate`.
    """
    opened = open_copies(env, min(n_envs, episodes)) if isinstance(env, str) else []
    try:
        played: Any = opened or ([env] if isinstance(env, gym.Env) else env)
        first = played if isinstance(played, VecEnv) else played[0]
        check_spaces(learner, first)
        if normalizer is not None:
            normalizer.check(first.observation_space)
        actor, masks = _actor(learner.policy, normalizer, seed, deterministic), mask_reader(learner.policy, first)
        with own_randomness(seed), evaluation_mode(learner.policy):
            if isinstance(played, VecEnv):
                _check_normalized(played, normalizer)
                with raw_observations(played):
                    return Returns.of(*_play_vec_env(played, actor, masks, episodes, seed))
            return Returns.of(*_play_copies(in_step(played[:episodes]), actor, masks, episodes, seed))
    finally:
        for copy in opened:
            copy.close()


def _actor(policy: Any, normalizer: ObservationNormalizer | None, seed: int, deterministic: bool) -> Actor:
    def seen(observations: Observations) -> Any:
        return observations if normalizer is None else normalizer.normalize(observations)

    def likeliest(observations: Observations, _: Sequence[int], valid: np.ndarray | None) -> np.ndarray:
        masks = {} if valid is None else {"action_masks": valid}
        return policy.predict(seen(observations), deterministic=True, **masks)[0]

    if deterministic:
        return likeliest
    actions = distribution_of(policy)
    generators: dict[int, torch.Generator] = {}

    def sampled(observations: Observations, episodes: Sequence[int], valid: np.ndarray | None) -> np.ndarray:
        with torch.no_grad():
            outputs = policy_outputs(policy, policy.obs_to_tensor(seen(observations))[0])
        if valid is not None:
            outputs = with_masks(outputs, torch.as_tensor(valid, device=outputs.device))
        rows = []
        for row, episode in enumerate(episodes):
            if episode not in generators:
                generators[episode] = torch.Generator().manual_seed(seed + episode)
            rows.append(actions.sample(policy, outputs[row : row + 1], generators[episode]))
        return np.concatenate(rows)

    return sampled


def _play_copies(copies: Copies, actor: Actor, masks: Masks, episodes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A copy that has ended an episode takes the next one; idle ones keep their row in the batch."""
    returns, lengths = np.zeros(episodes), np.zeros(episodes, dtype=np.int64)
    begun = min(len(copies.envs), episodes)
    playing = list(range(begun))
    current: list[Any] = [copies.reset(row, seed + row) for row in range(begun)]
    valid = None if masks is None else np.concatenate([masks(env) for env in copies.envs[:begun]])
    busy = list(range(begun))
    while busy:
        steps = copies.step(actor(stack(current), playing, valid), busy)
        still = []
        for row, (observation, reward, ended) in zip(busy, steps, strict=True):
            episode, current[row] = playing[row], observation
            returns[episode] += reward
            lengths[episode] += 1
            if ended:
                if begun == episodes:
                    continue
                playing[row] = begun
                current[row] = copies.reset(row, seed + begun)
                begun += 1
            if masks is not None and valid is not None:
                valid[row] = masks(copies.envs[row])[0]
            still.append(row)
        busy = still
        _check_ending(lengths)
    return returns, lengths


def _play_vec_env(env: VecEnv, actor: Actor, masks: Masks, episodes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rounds of one episode an env, as a VecEnv is seeded as a whole; what is played beyond is dropped."""
    returns, lengths = np.zeros(episodes), np.zeros(episodes, dtype=np.int64)
    for start in range(0, episodes, env.num_envs):
        playing = np.arange(start, start + env.num_envs)
        busy = playing < episodes
        env.seed(seed + start)
        current: Any = env.reset()
        while busy.any():
            valid = None if masks is None else masks(env)
            current, rewards, dones, _ = env.step(actor(current, playing.tolist(), valid))
            returns[playing[busy]] += rewards[busy]
            lengths[playing[busy]] += 1
            busy &= ~dones
            _check_ending(lengths)
    return returns, lengths


def _check_normalized(env: VecEnv, normalizer: ObservationNormalizer | None) -> None:
    around = unwrap_vec_normalize(env)
    if around is not None and around.norm_obs and normalizer is None:
        raise NsrlError(
            "the environment is inside a VecNormalize, whose moving statistics are not used for evaluation; "
            "pass as normalizer the statistics that the agent was trained with"
        )


def _check_ending(lengths: np.ndarray) -> None:
    if lengths.max() >= LONGEST:
        raise NsrlError(
            f"an episode has not ended after {LONGEST} steps; wrap the environment in gymnasium's TimeLimit"
        )
