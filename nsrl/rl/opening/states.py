"""States of the new task that a policy is opened on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from nsrl.rl.playing.action_masks import mask_reader
from nsrl.rl.playing.rollout import own_randomness
from nsrl.rl.policies.actor_critic import Observation, joined, policy_outputs, select
from nsrl.rl.policies.distributions import distribution_of, with_masks
from nsrl.rl.policies.observations import concatenated, map_arrays, policy_inputs

#: Steps of an episode whose rewards are added up.
STRETCH = 64
#: Stretches of a kind, and standard errors between their means, from which on one kind pays better than another.
FEWEST = 4
SURELY = 2.0

Act = Callable[[Any, np.ndarray | None], np.ndarray]


@dataclass(frozen=True)
class NewStates:
    """States as the policy takes them.

    Attributes:
        inputs: N observations, normalised.
        valid: valid actions, (N, O) bool; None where all are.
        returns: sums of the rewards over stretches of so many steps of an episode, or to its end, one after the other,
            on the way through these states; empty where they were not played.
        rewards: the least and the largest of a single step.
    """

    inputs: Observation
    valid: Tensor | None
    returns: tuple[float, ...] = ()
    rewards: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())) if isinstance(self.inputs, dict) else self.inputs)

    def select(self, rows: Tensor | slice) -> NewStates:
        """Some of the states."""
        return NewStates(select(self.inputs, rows), None if self.valid is None else self.valid[rows])

    def joined(self, others: NewStates) -> NewStates:
        """These and others."""
        if self.valid is None or others.valid is None:
            valid = None
        else:
            valid = torch.cat([self.valid, others.valid])
        return NewStates(joined(self.inputs, others.inputs), valid)


def random_states(model: OnPolicyAlgorithm, count: int, seed: int, stretch: int = STRETCH) -> NewStates:
    """At least `count` states that random (valid) actions lead to in the model's environment, from a reset on."""
    space = copy.deepcopy(model.action_space)
    space.seed(seed)

    def draw(_: Any, valid: np.ndarray | None) -> np.ndarray:
        env: Any = model.env
        rows = [None] * env.num_envs if valid is None else list(valid)
        return np.stack([space.sample(_mask(space, row)) for row in rows])

    return _play(model, count, seed, draw, stretch)


def resting_states(model: OnPolicyAlgorithm, count: int, seed: int, stretch: int = STRETCH) -> NewStates:
    """At least `count` states that `resting_action` leads to in the model's environment, from a reset on."""
    action = resting_action(model.action_space)
    assert action is not None
    return _play(model, count, seed, lambda _, __: np.stack([action] * model.n_envs), stretch)


def resting_action(space: spaces.Space) -> np.ndarray | None:
    """What does nothing, (A,): 0 in a Box that has it; None in other spaces, where nothing is known to do that."""
    if not isinstance(space, spaces.Box) or (space.low > 0.0).any() or (space.high < 0.0).any():
        return None
    return np.zeros(space.shape, space.dtype)


def visited_states(model: OnPolicyAlgorithm, count: int, seed: int, stretch: int = STRETCH) -> NewStates:
    """At least `count` states that the policy itself visits in the model's environment, from a reset on."""
    policy, generator = model.policy, torch.Generator().manual_seed(seed)
    distribution = distribution_of(policy)

    def draw(observations: Any, valid: np.ndarray | None) -> np.ndarray:
        with torch.no_grad():
            outputs = policy_outputs(policy, policy_inputs(observations, None, policy.device))
        if valid is not None:
            outputs = with_masks(outputs, torch.as_tensor(valid, device=outputs.device))
        return distribution.sample(policy, outputs, generator)

    return _play(model, count, seed, draw, stretch)


def _mask(space: spaces.Space, row: np.ndarray | None) -> Any:
    if row is None:
        return None
    if isinstance(space, spaces.MultiDiscrete):
        return tuple(part.astype(np.int8) for part in np.split(row, np.cumsum(space.nvec)[:-1]))
    return row.astype(np.int8)


def _play(model: OnPolicyAlgorithm, count: int, seed: int, act: Act, stretch: int) -> NewStates:
    """Steps count as the run's own; afterwards the environment begins anew, as `learn` left it."""
    env: VecEnv = model.env  # type: ignore[assignment]
    read = mask_reader(model.policy, env)
    seen, masks, sums = [], [], _Stretches(env.num_envs, stretch)
    around: Any = model.get_vec_normalize_env()
    with own_randomness(seed):
        current: Any = env.reset()
        for _ in range(-(-count // env.num_envs)):
            valid = None if read is None else read(env)
            seen.append(map_arrays(np.array, current))
            if valid is not None:
                masks.append(valid)
            current, rewards, dones, _ = env.step(act(current, valid))
            sums.add(rewards if around is None else around.get_original_reward(), dones)
            model.num_timesteps += env.num_envs
        model._last_obs = env.reset()  # type: ignore[assignment]
    model._last_episode_starts = np.ones(env.num_envs, dtype=bool)
    inputs = policy_inputs(concatenated(seen), None, model.device)
    known = torch.as_tensor(np.concatenate(masks), device=model.device) if masks else None
    return NewStates(inputs, known, tuple(sums.finished), (sums.least, sums.most))


class _Stretches:
    """Rewards of several environments, added up over stretches of their episodes."""

    def __init__(self, n_envs: int, length: int):
        self.finished: list[float] = []
        self.least, self.most = np.inf, -np.inf
        self._length = length
        self._sums, self._lengths = np.zeros(n_envs), np.zeros(n_envs, dtype=int)

    def add(self, rewards: np.ndarray, dones: np.ndarray) -> None:
        self.least, self.most = min(self.least, float(rewards.min())), max(self.most, float(rewards.max()))
        self._sums += rewards
        self._lengths += 1
        over = dones | (self._lengths >= self._length)
        self.finished += self._sums[over].tolist()
        self._sums[over], self._lengths[over] = 0.0, 0


def pays_better(one: NewStates, other: NewStates) -> bool:
    """Whether the rewards on the way through some states are surely more than on the way through others."""
    first, second = np.asarray(one.returns), np.asarray(other.returns)
    if min(len(first), len(second)) < FEWEST:
        return False
    error = np.sqrt(first.var(ddof=1) / len(first) + second.var(ddof=1) / len(second))
    return bool(first.mean() - second.mean() > SURELY * error)


def nothing_happened(*looks: NewStates) -> bool:
    """Whether every step on the way through these states earned the same, and every stretch: no goal, and no fall."""
    rewards = {reward for look in looks for reward in look.rewards}
    return len(rewards) == 1 and all(len(set(look.returns)) == 1 for look in looks)


def exchanged_states(old: Observation, new: NewStates, valid: Tensor | None, count: int, seed: int) -> NewStates | None:
    """States of the old task in which the inputs that never moved there have the values that they have in the new one.

    A context is the typical case: the old situations, under the new task's flag. None where there is no such input.

    Args:
        old: inputs of the buffer.
        new: states of the new task.
        valid: valid actions at the old states; None where all are.
        count: states at most.
        seed: of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    size = len(next(iter(old.values())) if isinstance(old, dict) else old)
    rows = torch.randperm(size, generator=generator)[:count]
    others = torch.randint(len(new), (len(rows),), generator=generator)
    chosen, source = select(old, rows), select(new.inputs, others)
    if isinstance(old, dict):
        assert isinstance(chosen, dict) and isinstance(source, dict)
        named = {key: _exchanged(value, chosen[key], source[key]) for key, value in old.items()}
        if all(value is None for value in named.values()):
            return None
        inputs: Observation = {key: chosen[key] if value is None else value for key, value in named.items()}
    else:
        assert isinstance(chosen, Tensor) and isinstance(source, Tensor)
        found = _exchanged(old, chosen, source)
        if found is None:
            return None
        inputs = found
    if new.valid is None:
        return NewStates(inputs, None)
    return NewStates(inputs, valid[rows] if valid is not None else torch.ones_like(new.valid[others]))


def _exchanged(old: Tensor, chosen: Tensor, source: Tensor) -> Tensor | None:
    """`chosen` with the entries of `source` that are constant in `old` and other there; None if none is."""
    if not old.dtype.is_floating_point:
        return None
    free = (old == old[:1]).all(0) & (source != old[:1]).any(0)
    return torch.where(free, source, chosen) if bool(free.any()) else None
