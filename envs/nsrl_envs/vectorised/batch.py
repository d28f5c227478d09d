"""Copies of one task whose states are the columns of an array."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from nsrl_envs.vectorised.layers import Layers

#: Environment variable that switches arrays off with the value 0.
SWITCH = "NSRL_VECTORISED"
#: Copies from which on arrays are the faster way, for the equations with the most operations too.
WORTHWHILE = 4


def switched_on() -> bool:
    """Whether copies are stepped as arrays where they can be; `NSRL_VECTORISED=0` switches that off."""
    return os.environ.get(SWITCH, "1") != "0"


def batched(copies: Sequence[gym.Env]) -> Batch | None:
    """A batch of environments if that is known, worthwhile and not switched off; else None."""
    return Batch.of(copies) if switched_on() and len(copies) >= WORTHWHILE else None


class Batch:
    """Steps copies together; whatever happens once an episode, such as a reset, is done by the copy itself.

    The copies keep their generators, spaces and wrappers. Between `read` and `write` the arrays are ahead of them.
    """

    def __init__(self, copies: Sequence[gym.Env], layers: Sequence[Layers]):
        """See `of`."""
        self.copies, self.layers = copies, layers
        first = layers[0]
        self.family, self.limit = first.family, first.steps
        self.entries = len(first.sign)
        self._sign = None if (first.sign == 1.0).all() else first.sign
        self._blank = np.zeros((len(copies), self.entries + len(first.context)), dtype=np.float32)
        self._blank[:, self.entries :] = first.context
        space: Any = first.base.action_space
        self._shape = (len(copies), *space.shape)
        self._range = (int(space.start), int(space.start + space.n)) if isinstance(space, spaces.Discrete) else None
        self._every = np.arange(len(copies))
        self._elapsed = np.zeros(len(copies), dtype=np.int64)
        self._before = [0] * len(copies)  # steps that a monitor had counted when the episode began
        self._rewards = np.zeros((len(copies), self.limit))
        self._state = np.zeros((0, len(copies)))

    @classmethod
    def of(cls, copies: Sequence[gym.Env]) -> Batch | None:
        """A batch of environments, None if their task is not known here or they are not copies of each other."""
        taken = [Layers.of(env) for env in copies]
        layers = [layer for layer in taken if layer is not None]
        if not layers or len(layers) < len(taken) or not all(layers[0].alike(layer) for layer in layers[1:]):
            return None
        if len({id(layer.base) for layer in layers}) < len(layers):
            return None  # the same one again
        return cls(copies, layers)

    def read(self) -> bool:
        """Take the states over from the copies; False, and nothing done, unless all are within an episode."""
        columns: list[np.ndarray] = []
        for layer in self.layers:
            state, monitor, elapsed = layer.family.read(layer.base), layer.monitor, layer.limit._elapsed_steps
            if state is None or elapsed is None or elapsed >= self.limit:
                return False
            if monitor is not None and (monitor.needs_reset or len(monitor.rewards) != elapsed):
                return False
            columns.append(state)
        self._state = np.ascontiguousarray(np.stack(columns, axis=1, dtype=np.float64))
        for row in range(len(self.copies)):
            self._note_start(row)
        return True

    def write(self) -> None:
        """Put the states back into the copies."""
        for row in range(len(self.copies)):
            self._write(row)

    def accepts(self, actions: Any) -> bool:
        """Whether actions are as a policy makes them; anything else is for the copies to take or to refuse."""
        if type(actions) is not np.ndarray or actions.shape != self._shape:
            return False
        if self._range is None:
            return actions.dtype == np.float32
        if actions.dtype.kind != "i":
            return False
        first, end = self._range
        numbers = actions.tolist()  # Python's extremes are the faster ones of a few numbers
        return min(numbers) >= first and max(numbers) < end

    def reset(self, row: int, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode in a copy; its first observation and info, as its own `reset` has them."""
        observation, info = self.copies[row].reset(**options)
        layer = self.layers[row]
        state = layer.family.read(layer.base)
        assert state is not None  # it has just begun
        if not len(self._state):
            self._state = np.zeros((len(state), len(self.copies)))
        self._state[:, row] = state
        self._note_start(row)
        return observation, info

    def step(
        self, actions: np.ndarray, rows: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Step the copies in `rows` (None: all); as many actions as rows.

        Returns:
            Observations (rows, entries) float32, rewards (rows,) float64, terminated and truncated (rows,).
        """
        for layer in self.layers[0].actions:
            actions = layer.action(actions)
        # gathered, not sliced: loops over strided arrays may round otherwise
        state = self._state if rows is None else self._state.take(rows, axis=1)
        state, rewards, terminated = self.family.step(state, actions)
        observations = self._blank[: len(rewards)].copy()
        shown = observations[:, : self.entries]
        self.family.show(state, shown)
        if self._sign is not None:
            shown *= self._sign
        if rows is None:
            rows = self._every
            self._state = state
        else:
            self._state[:, rows] = state
        elapsed = self._elapsed[rows]
        self._rewards[rows, elapsed] = rewards
        elapsed += 1
        self._elapsed[rows] = elapsed
        return observations, rewards, terminated, elapsed >= self.limit

    def end(self, row: int) -> dict[str, Any]:
        """End the episode of a copy, which is to be reset before its next step; what its monitor says of it."""
        self._write(row)
        monitor = self.layers[row].monitor
        if monitor is None:
            return {}
        total = sum(monitor.rewards)
        seconds = time.time() - monitor.t_start
        monitor.needs_reset = True
        monitor.episode_returns.append(total)
        monitor.episode_lengths.append(len(monitor.rewards))
        monitor.episode_times.append(seconds)
        return {"episode": {"r": round(total, 6), "l": len(monitor.rewards), "t": round(seconds, 6)}}

    def _note_start(self, row: int) -> None:
        layer = self.layers[row]
        self._elapsed[row] = elapsed = layer.limit._elapsed_steps or 0
        if layer.monitor is not None:
            self._before[row] = layer.monitor.total_steps - elapsed
            self._rewards[row, :elapsed] = layer.monitor.rewards

    def _write(self, row: int) -> None:
        elapsed = int(self._elapsed[row])
        if elapsed == 0:
            return  # as its reset left it, down to the type of its state
        layer = self.layers[row]
        layer.family.write(layer.base, self._state[:, row].copy())
        layer.limit._elapsed_steps = elapsed  # type: ignore[assignment]
        if layer.monitor is not None:
            layer.monitor.rewards = self._rewards[row, :elapsed].tolist()
            layer.monitor.total_steps = self._before[row] + elapsed
