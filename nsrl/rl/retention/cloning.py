"""Behaviour cloning of a Minari data set: an agent for data that come without one.

    agent, report = clone("D4RL/pointmaze/umaze-v2")
    buffer = RetentionBuffer.from_minari("D4RL/pointmaze/umaze-v2", agent)
    model = NullSpacePPO.from_pretrained(agent, new_env, retain=buffer)

What is retained then is the clone's behaviour on the states of the data, not the data's actions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from torch import Tensor

from nsrl.errors import NsrlError
from nsrl.rl.agents.agent import Agent
from nsrl.rl.agents.normalization import ObservationNormalizer
from nsrl.rl.agents.stock_models import bare, hyperparameters
from nsrl.rl.playing.rollout import evaluation_mode, own_randomness
from nsrl.rl.policies.actor_critic import select
from nsrl.rl.policies.observations import Observations, concatenated, map_arrays, policy_inputs
from nsrl.rl.retention import minari

#: Smallest log standard deviation of a cloned Gaussian policy: data without noise would have none at all, and no
#: policy gradient explores with it.
LEAST_LOG_STD = -2.0


@dataclass(frozen=True)
class CloneReport:
    """How well a cloned policy tells the actions of the data, on the steps that it learnt from and on held-out ones.

    Attributes:
        steps, heldout_steps: how many of either there are; whole episodes are held out.
        log_likelihood, heldout_log_likelihood: mean log-likelihood of an action, nats; NaN without held-out steps.
    """

    steps: int
    heldout_steps: int
    log_likelihood: float
    heldout_log_likelihood: float


def clone(
    dataset: Any,
    *,
    hidden: Sequence[int] = (64, 64),
    epochs: int = 20,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    heldout: float = 0.1,
    normalize: bool = True,
    seed: int = 0,
) -> tuple[Agent, CloneReport]:
    """A stock PPO agent with an MlpPolicy (MultiInputPolicy for Dict observations) that imitates a data set.

    Maximises the likelihood of the data's actions by Adam (Pomerleau 1991). The critic is left untrained: keep
    critic="reset", the default of `from_pretrained`, and select="expert" in `RetentionBuffer.from_minari`.

    Args:
        dataset: a `minari.MinariDataset`, the id of a local one, or its folder. Needs the extra `minari`.
        hidden: widths of the hidden layers.
        epochs: passes over the data, which are held in memory.
        batch_size: steps in a minibatch.
        learning_rate: of Adam.
        heldout: share of the episodes that are held out.
        normalize: standardise flat Box observations by their mean and variance, as a frozen VecNormalize would.
        seed: of initial weights, minibatches and held-out episodes; the global generators stay as they were.

    Raises:
        NsrlError: minari is not installed, no such data set, image observations, or actions of another kind.
    """
    if epochs < 1 or batch_size < 1 or not 0.0 <= heldout < 1.0:
        raise NsrlError(
            f"epochs and batch_size must be at least 1 and heldout in [0, 1), not {epochs}, {batch_size} and {heldout}"
        )
    data = minari.opened(dataset)
    observations, actions, episodes = _steps(data)
    train, held = _split(episodes, heldout, np.random.default_rng(seed))
    normalizer = None
    if normalize and isinstance(data.observation_space, spaces.Box):
        seen = np.asarray(observations)[train]
        normalizer = ObservationNormalizer(seen.mean(0, dtype=np.float64), seen.var(0, dtype=np.float64))
    inputs, targets = policy_inputs(observations, normalizer), _targets(actions, data.action_space)
    with own_randomness(seed):
        model = _untrained(data, list(hidden))
        policy: Any = model.policy
        optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate, eps=1e-5)
        for _ in range(epochs):
            for batch in torch.as_tensor(train)[torch.randperm(len(train))].split(batch_size):
                loss = -_log_likelihood(policy, inputs, targets, batch).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if hasattr(policy, "log_std"):
                    policy.log_std.data.clamp_(min=LEAST_LOG_STD)
    with evaluation_mode(policy), torch.no_grad():
        told, untold = (
            float(_log_likelihood(policy, inputs, targets, torch.as_tensor(part)).mean()) if len(part) else math.nan
            for part in (train, held)
        )
    report = CloneReport(len(train), len(held), told, untold)
    return Agent(model, normalizer, None, hyperparameters(model)), report


def _log_likelihood(policy: ActorCriticPolicy, inputs: Any, actions: Tensor, steps: Tensor) -> Tensor:
    return policy.get_distribution(select(inputs, steps)).log_prob(actions[steps])


def _targets(actions: np.ndarray, space: spaces.Space) -> Tensor:
    """Actions as the distributions of SB3 take them: indices as integers, all others as flat float32 rows."""
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return torch.as_tensor(actions.astype(np.int64))
    return torch.as_tensor(actions.reshape(len(actions), -1).astype(np.float32))


def _steps(data: Any) -> tuple[Observations, np.ndarray, np.ndarray]:
    """Raw observations, actions and episode of every step of a data set, in order."""
    seen, actions, lengths = [], [], []
    for episode in data.iterate_episodes():
        seen.append(map_arrays(lambda array: array[:-1], episode.observations))
        actions.append(np.asarray(episode.actions))
        lengths.append(len(episode))
    return concatenated(seen), np.concatenate(actions), np.repeat(np.arange(len(lengths)), lengths)


def _split(episodes: np.ndarray, share: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Steps to learn from and held-out ones: a random share of the episodes, at least one of several, never all."""
    count = int(episodes[-1]) + 1
    chosen = rng.permutation(count)[: min(math.ceil(share * count), count - 1)]
    held = np.isin(episodes, chosen)
    return np.flatnonzero(~held), np.flatnonzero(held)


def _untrained(data: Any, hidden: list[int]) -> PPO:
    """A PPO agent for the spaces of a data set, without environment."""
    space = data.observation_space
    parts = space.spaces.values() if isinstance(space, spaces.Dict) else [space]
    if any(is_image_space(part) for part in parts):
        raise NsrlError(f"the observations {space} hold images, which no MLP policy reads; clone vector observations")
    policy = MultiInputActorCriticPolicy if isinstance(space, spaces.Dict) else ActorCriticPolicy
    model: Any = bare(PPO, policy, "cpu")
    model.observation_space, model.action_space = space, data.action_space
    model.policy_kwargs, model.n_envs = {"net_arch": hidden}, 1
    try:
        model._setup_model()
    except Exception as error:  # SB3 checks spaces with assertions and NotImplementedError
        raise NsrlError(f"no policy can be built for {space} and {data.action_space}: {error}") from error
    return model
