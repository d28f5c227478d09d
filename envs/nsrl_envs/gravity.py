"""A MuJoCo world with more or less gravity than the base environment."""

from typing import Any

import gymnasium as gym

from nsrl_envs.errors import TaskError


class ScaleGravity(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Multiply the gravity of a MuJoCo environment.

    Each environment owns its compiled model, so other environments are not touched.
    """

    def __init__(self, env: gym.Env, factor: float):
        """Edit the model of an environment and wrap it.

        Args:
            env: Environment whose `unwrapped.model` is a `mujoco.MjModel`.
            factor: What gravity (m/s^2) is multiplied with, greater than 0.

        Raises:
            TaskError: If there is no MuJoCo model, or the factor is not positive.
        """
        gym.utils.RecordConstructorArgs.__init__(self, factor=factor)
        gym.Wrapper.__init__(self, env)
        model: Any = getattr(env.unwrapped, "model", None)
        if not hasattr(model, "opt"):
            raise TaskError(f"ScaleGravity needs a MuJoCo environment with a compiled model, but got {env}")
        if not 0 < factor < float("inf"):
            raise TaskError(f"ScaleGravity factor is {factor}, but must be a number greater than 0")
        model.opt.gravity[:] *= factor
