"""Actions that mean the opposite of what they mean in the base environment."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from nsrl_envs.errors import TaskError


class SwapActions(gym.ActionWrapper, gym.utils.RecordConstructorArgs):
    """Reverse the order of discrete actions: of n actions, action k does what action n - 1 - k did."""

    def __init__(self, env: gym.Env):
        """Wrap an environment.

        Args:
            env: Environment with a `Discrete` action space; the space stays as it is.

        Raises:
            TaskError: If the action space is of another kind.
        """
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.ActionWrapper.__init__(self, env)
        space = env.action_space
        if not isinstance(space, spaces.Discrete):
            raise TaskError(
                f"SwapActions needs a Discrete action space, but {env} has {space}; use ReverseActions for a Box"
            )
        self._first_plus_last = int(2 * space.start + space.n - 1)

    def action(self, action: Any) -> Any:
        """Return the base environment's action, same type."""
        return self._first_plus_last - action


class ReverseActions(gym.ActionWrapper, gym.utils.RecordConstructorArgs):
    """Negate continuous actions: a torque to the left becomes the same torque to the right."""

    def __init__(self, env: gym.Env):
        """Wrap an environment.

        Args:
            env: Environment with a `Box` action space that is symmetric about zero; the space stays as it is.

        Raises:
            TaskError: If the action space is of another kind, or -a can lie outside of it.
        """
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.ActionWrapper.__init__(self, env)
        space = env.action_space
        if not isinstance(space, spaces.Box):
            raise TaskError(
                f"ReverseActions needs a Box action space, but {env} has {space}; use SwapActions for Discrete"
            )
        if not np.array_equal(space.low, -space.high):
            raise TaskError(
                f"ReverseActions needs action bounds symmetric about zero, but {env} has {space}; "
                "rescale the actions first, for instance with gymnasium.wrappers.RescaleAction"
            )

    def action(self, action: Any) -> np.ndarray:
        """Return the base environment's action, same shape, () or (A,)."""
        return np.negative(action)
