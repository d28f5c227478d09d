"""A task-context input: the part of an observation that tells the policy which task it is in."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from nsrl_envs.errors import TaskError


class TaskContext(gym.ObservationWrapper, gym.utils.RecordConstructorArgs):
    """Append a constant context vector to flat observations.

    The bounds of the context entries are [0, 1] whatever the value, so that the tasks of a family have equal
    observation spaces, as Stable-Baselines3 demands of a policy and its environment. With the value 0 for the
    retained task, the policy's first-layer columns for the context have zero gradient on every state of that
    task: they are exactly in the null space of the retained behaviour.
    """

    def __init__(self, env: gym.Env, value: float | Sequence[float], size: int = 1):
        """Wrap an environment.

        Args:
            env: Environment with a one-dimensional floating-point `Box` observation space, (n,).
            value: What each context entry shows, in [0, 1]: one number for all entries, or one for each.
            size: How many entries are appended; observations become (n + size,).

        Raises:
            TaskError: If the observation space is not such a box, or the value does not fit.
        """
        gym.utils.RecordConstructorArgs.__init__(self, value=value, size=size)
        gym.ObservationWrapper.__init__(self, env)
        inner = env.observation_space
        if not isinstance(inner, spaces.Box) or len(inner.shape) != 1 or inner.dtype.kind != "f":
            raise TaskError(
                f"TaskContext needs flat floating-point Box observations, but {env} has {inner}; "
                "flatten or convert the observations first"
            )
        self._context = _context_vector(value, size).astype(inner.dtype)
        self.observation_space = spaces.Box(
            low=np.concatenate([inner.low, np.zeros(size, inner.dtype)]),
            high=np.concatenate([inner.high, np.ones(size, inner.dtype)]),
            dtype=inner.dtype.type,
        )

    @property
    def context(self) -> np.ndarray:
        """The appended vector, (size,), a copy."""
        return self._context.copy()

    def observation(self, observation: Any) -> np.ndarray:
        """Return the observation with the context appended, (n + size,)."""
        return np.concatenate([observation, self._context], dtype=self._context.dtype)


def told_task(task: str, value: float) -> gym.Env:
    """Make a task by its id, with a context entry that shows `value`, observations (n + 1,).

    Raises:
        TaskError: If its observations are not flat and floating-point.
    """
    return TaskContext(gym.make(task, disable_env_checker=True), value=value)


def _context_vector(value: float | Sequence[float], size: int) -> np.ndarray:
    if size < 1:
        raise TaskError(f"TaskContext size is {size}, but must be at least 1; leave the wrapper out for none")
    given = np.asarray(value, dtype=np.float64)
    if given.ndim > 1 or (given.ndim == 1 and given.size != size):
        raise TaskError(
            f"TaskContext value has shape {given.shape}, but must be one number or {size} in a sequence; "
            f"pass size={given.size} or change the value"
        )
    # other values would need other bounds, and then the tasks of a family would differ in observation space
    if not np.all((given >= 0) & (given <= 1)):
        raise TaskError(
            f"TaskContext value {value} leaves [0, 1], the bounds that all tasks of a family share; "
            "use fractions, or one entry a task"
        )
    return np.broadcast_to(given, (size,))
