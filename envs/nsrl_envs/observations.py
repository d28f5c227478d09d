"""Observations that show the opposite of what they show in the base environment."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from nsrl_envs.errors import TaskError


class ReverseSensors(gym.ObservationWrapper, gym.utils.RecordConstructorArgs):
    """Negate some entries of flat observations, as if those instruments were wired the wrong way round."""

    def __init__(self, env: gym.Env, entries: Sequence[int]):
        """Wrap an environment.

        Args:
            env: Environment with a one-dimensional floating-point `Box` observation space, (n,); the space stays as
                it is.
            entries: Which entries are negated, from 0 to n - 1.

        Raises:
            TaskError: If the observation space is of another kind, there is no such entry, or its negative can lie
                outside of the bounds.
        """
        gym.utils.RecordConstructorArgs.__init__(self, entries=entries)
        gym.ObservationWrapper.__init__(self, env)
        space = env.observation_space
        if not isinstance(space, spaces.Box) or len(space.shape) != 1 or space.dtype.kind != "f":
            raise TaskError(f"ReverseSensors needs flat floating-point Box observations, but {env} has {space}")
        chosen = sorted(set(entries))
        if not chosen or chosen[0] < 0 or chosen[-1] >= space.shape[0]:
            raise TaskError(f"ReverseSensors has the entries {chosen}, but must have some of 0 to {space.shape[0] - 1}")
        if not np.array_equal(space.low[chosen], -space.high[chosen]):
            raise TaskError(
                f"ReverseSensors needs bounds symmetric about zero in the entries {chosen}, but {env} has {space}; "
                "rescale the observations first"
            )
        self._sign = np.ones(space.shape, space.dtype)
        self._sign[chosen] = -1

    def observation(self, observation: Any) -> np.ndarray:
        """Return the observation, (D,), with the entries negated, same shape."""
        return observation * self._sign
