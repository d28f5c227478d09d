"""Copies of an environment that play at once, each its own episode: stepped as arrays, or one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import gymnasium as gym
import numpy as np

from nsrl_envs.vectorised.batch import Batch, batched


class Copies(Protocol):
    """Environments in rows.

    Attributes:
        envs: one a row. What is asked of them between steps may be behind.
    """

    envs: Sequence[gym.Env]

    def reset(self, row: int, seed: int) -> Any:
        """Begin an episode in a row; its first observation."""

    def step(self, actions: np.ndarray, rows: Sequence[int]) -> Iterator[tuple[Any, float, bool]]:
        """Step some rows by their entries of actions for all; observation, reward and whether the episode ended.

        A row may be reset as soon as its own step has been handed out.
        """


def in_step(envs: Sequence[gym.Env]) -> Copies:
    """Put environments in rows; as arrays, with the same outcome bit for bit, if they are many of a known task."""
    batch = batched(envs)
    return _Singly(envs) if batch is None else _Together(envs, batch)


class _Singly:
    def __init__(self, envs: Sequence[gym.Env]):
        self.envs = envs

    def reset(self, row: int, seed: int) -> Any:
        return self.envs[row].reset(seed=seed)[0]

    def step(self, actions: np.ndarray, rows: Sequence[int]) -> Iterator[tuple[Any, float, bool]]:
        for row in rows:
            observation, reward, terminated, truncated, _ = self.envs[row].step(actions[row])
            yield observation, float(reward), terminated or truncated


class _Together:
    def __init__(self, envs: Sequence[gym.Env], batch: Batch):
        self.envs, self._batch, self._refused = envs, batch, False

    def reset(self, row: int, seed: int) -> Any:
        return self._batch.reset(row, seed=seed)[0]

    def step(self, actions: np.ndarray, rows: Sequence[int]) -> Iterator[tuple[Any, float, bool]]:
        if not self._refused and not self._batch.accepts(actions):
            self._batch.write()
            self._refused = True  # actions of a strange kind: the copies themselves take them, or say what is wrong
        if self._refused:
            yield from _Singly(self.envs).step(actions, rows)
            return
        everyone = len(rows) == len(self.envs)
        observations, rewards, terminated, truncated = self._batch.step(
            actions if everyone else actions[rows], None if everyone else np.asarray(rows)
        )
        ended = (terminated | truncated).tolist()
        for index, row in enumerate(rows):
            if ended[index]:
                self._batch.end(row)
            yield observations[index], float(rewards[index]), ended[index]
