"""Copies of two tasks as one vectorised environment: what joint training learns on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv


class JoinedEnvs(VecEnv):
    """The copies of several vectorised environments, in order.

    Args:
        parts: of the same spaces; arrays of observations, (N, ...).
    """

    def __init__(self, parts: Sequence[VecEnv]):
        self.parts = list(parts)
        first = self.parts[0]
        super().__init__(sum(part.num_envs for part in parts), first.observation_space, first.action_space)

    def reset(self) -> np.ndarray:
        """Observations, (N, ...)."""
        return np.concatenate([np.asarray(part.reset()) for part in self.parts])

    def step_async(self, actions: np.ndarray) -> None:
        """Hand every part its actions, of (N, ...)."""
        for part, rows in zip(self.parts, self._split(actions), strict=True):
            part.step_async(rows)

    def step_wait(self) -> Any:
        """Observations, rewards, ends and infos of all copies."""
        observations, rewards, dones, infos = zip(*(part.step_wait() for part in self.parts), strict=True)
        flat = [info for part in infos for info in part]
        return np.concatenate(observations), np.concatenate(rewards), np.concatenate(dones), flat

    def close(self) -> None:
        """Close the parts."""
        for part in self.parts:
            part.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """See SB3."""
        return self._each(lambda part, own: part.get_attr(attr_name, own), indices)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """See SB3."""
        self._each(lambda part, own: part.set_attr(attr_name, value, own) or [None] * len(own), indices)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """See SB3."""
        return self._each(lambda part, own: part.env_method(method_name, *args, indices=own, **kwargs), indices)

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """See SB3."""
        return self._each(lambda part, own: part.env_is_wrapped(wrapper_class, own), indices)

    def _each(self, ask: Callable[[VecEnv, list[int]], list[Any]], indices: Any) -> list[Any]:
        answers: dict[int, Any] = {}
        wanted, start = list(self._get_indices(indices)), 0
        for part in self.parts:
            own = [index - start for index in wanted if start <= index < start + part.num_envs]
            if own:
                answers.update(zip([start + index for index in own], ask(part, own), strict=True))
            start += part.num_envs
        return [answers[index] for index in wanted]

    def _split(self, actions: np.ndarray) -> list[np.ndarray]:
        return np.split(actions, np.cumsum([part.num_envs for part in self.parts])[:-1])
