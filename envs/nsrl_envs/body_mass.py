"""A MuJoCo body that is heavier or lighter than in the base environment."""

from typing import Any

import gymnasium as gym

from nsrl_envs.errors import TaskError


class ScaleBodyMass(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Multiply the mass and the rotational inertia of one body of a MuJoCo environment.

    The body keeps its shape, as if it were made of a denser material. Each environment owns its compiled
    model, so other environments are not touched.
    """

    def __init__(self, env: gym.Env, body: str, factor: float):
        """Edit the model of an environment and wrap it.

        Args:
            env: Environment whose `unwrapped.model` is a `mujoco.MjModel`.
            body: Name of the body in the model, such as "torso".
            factor: What its mass (kg) and inertia (kg m^2) are multiplied with, greater than 0.

        Raises:
            TaskError: If there is no MuJoCo model, no such body, or the factor is not positive.
        """
        gym.utils.RecordConstructorArgs.__init__(self, body=body, factor=factor)
        gym.Wrapper.__init__(self, env)
        model: Any = getattr(env.unwrapped, "model", None)
        if not hasattr(model, "body_mass"):
            raise TaskError(f"ScaleBodyMass needs a MuJoCo environment with a compiled model, but got {env}")
        names = [model.body(i).name for i in range(model.nbody)]
        if body not in names:
            raise TaskError(f"ScaleBodyMass knows no body {body!r} in {env}; its bodies are {', '.join(names)}")
        if not 0 < factor < float("inf"):
            raise TaskError(f"ScaleBodyMass factor is {factor}, but must be a number greater than 0")
        index = names.index(body)
        model.body_mass[index] *= factor
        model.body_inertia[index] *= factor
        _refresh_constants(model)


def _refresh_constants(model: Any) -> None:
    # imported here so that the package imports without MuJoCo
    import mujoco

    # subtree masses and the contact solver's inverse weights are derived from the masses at compile time;
    # mj_setConst also moves the data it is given to the reference pose, so it gets its own
    mujoco.mj_setConst(model, mujoco.MjData(model))
