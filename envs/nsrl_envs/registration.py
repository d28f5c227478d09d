"""Every task's id, and what gymnasium needs to make it.

Whoever looks up a task reads this module, so it names the makers by their import path and imports none.
"""

import re
from typing import Any

from gymnasium.envs.registration import register, registry

from nsrl_envs.errors import TaskError

# id, maker, its arguments, steps before truncation, return at which the base environment counts as solved
_TASKS: tuple[tuple[str, str, dict[str, Any], int, float | None], ...] = (
    ("nsrl/CartPole-v0", "cartpole:cartpole", {}, 500, 475.0),
    ("nsrl/CartPoleSwapped-v0", "cartpole:cartpole", {"swapped": True}, 500, 475.0),
    ("nsrl/CartPoleTrio-v0", "cartpole:cartpole_of_trio", {}, 500, 475.0),
    ("nsrl/CartPoleTrioSwapped-v0", "cartpole:cartpole_of_trio", {"task": "swapped"}, 500, 475.0),
    ("nsrl/CartPoleTrioReversedAngle-v0", "cartpole:cartpole_of_trio", {"task": "reversed_angle"}, 500, 475.0),
    ("nsrl/Pendulum-v0", "pendulum:pendulum", {}, 200, None),
    ("nsrl/PendulumReversed-v0", "pendulum:pendulum", {"reversed_torque": True}, 200, None),
    ("nsrl/Acrobot-v0", "acrobot:acrobot", {}, 500, -100.0),
    ("nsrl/AcrobotSwapped-v0", "acrobot:acrobot", {"swapped": True}, 500, -100.0),
    ("nsrl/MountainCar-v0", "mountain_car:mountain_car", {}, 200, -110.0),
    ("nsrl/MountainCarSwapped-v0", "mountain_car:mountain_car", {"swapped": True}, 200, -110.0),
    ("nsrl/MountainCarContinuous-v0", "mountain_car:continuous_mountain_car", {}, 999, 90.0),
    (
        "nsrl/MountainCarContinuousReversed-v0",
        "mountain_car:continuous_mountain_car",
        {"reversed_force": True},
        999,
        90.0,
    ),
    ("nsrl/HalfCheetah-v0", "locomotion:runner", {"body": "HalfCheetah"}, 1000, 4800.0),
    (
        "nsrl/HalfCheetahBackward-v0",
        "locomotion:runner",
        {"body": "HalfCheetah", "backward": True},
        1000,
        None,
    ),
    ("nsrl/Swimmer-v0", "locomotion:runner", {"body": "Swimmer"}, 1000, 360.0),
    ("nsrl/SwimmerBackward-v0", "locomotion:runner", {"body": "Swimmer", "backward": True}, 1000, None),
    ("nsrl/Ant-v0", "locomotion:runner", {"body": "Ant"}, 1000, 6000.0),
    ("nsrl/AntBackward-v0", "locomotion:runner", {"body": "Ant", "backward": True}, 1000, None),
    ("nsrl/HalfCheetahPlain-v0", "locomotion:half_cheetah", {}, 1000, 4800.0),
    ("nsrl/HalfCheetahHeavyTorso-v0", "locomotion:half_cheetah", {"torso_mass_factor": 4.0}, 1000, None),
    ("nsrl/Hopper-v0", "locomotion:hopper", {}, 1000, 3800.0),
    ("nsrl/HopperLowGravity-v0", "locomotion:hopper", {"gravity_factor": 0.5}, 1000, None),
    ("nsrl/LunarLander-v0", "lunar_lander:lunar_lander", {}, 1000, 200.0),
    ("nsrl/LunarLanderLowGravity-v0", "lunar_lander:lunar_lander", {"gravity": -2.5}, 1000, None),
    ("nsrl/LunarLanderTold-v0", "lunar_lander:told_lunar_lander", {}, 1000, 200.0),
    ("nsrl/LunarLanderSwapped-v0", "lunar_lander:told_lunar_lander", {"swapped": True}, 1000, 200.0),
    ("nsrl/LunarLanderContinuous-v0", "lunar_lander:told_lunar_lander", {"continuous": True}, 1000, 200.0),
    (
        "nsrl/LunarLanderContinuousReversed-v0",
        "lunar_lander:told_lunar_lander",
        {"continuous": True, "swapped": True},
        1000,
        200.0,
    ),
    (
        "nsrl/LunarLanderWind-v0",
        "lunar_lander:lunar_lander",
        {"enable_wind": True, "wind_power": 15.0, "turbulence_power": 1.5},
        1000,
        None,
    ),
)


#: How the id of a task with a context entry ends, and the values that it may have.
_ENDINGS = {".context0": 0, ".context1": 1}


def told(task: str, value: int) -> str:
    """Register a task whose observations end with an entry that says which task it is; return its id.

    An agent that was trained without that entry is given it by `nsrl.rl.surgery.add_context`.

    Args:
        task: Gymnasium id of a task with flat floating-point observations, such as "LunarLander-v3".
        value: What the entry shows: 0 for the task that an agent is good at, 1 for the one that it has to learn.

    Returns:
        Such as "nsrl/LunarLander-v3.context1"; making it is making the task inside `TaskContext`.

    Raises:
        TaskError: If the value is neither 0 nor 1.
    """
    if value not in (0, 1):
        raise TaskError(f"the value of a context is {value}, but must be 0 for the retained task or 1 for the new one")
    name = f"nsrl/{re.sub('[/:]', '.', task)}.context{int(value)}"
    if name not in registry:
        register(id=name, entry_point="nsrl_envs.context:told_task", kwargs={"task": task, "value": float(value)})
    return name


def find_told(name: str) -> None:
    """Register what `told` did in another process, if the id is such a one and its task is registered here."""
    ending = next((ending for ending in _ENDINGS if name.startswith("nsrl/") and name.endswith(ending)), None)
    if ending is None or name in registry:
        return
    wanted = name.removeprefix("nsrl/").removesuffix(ending)
    for task in list(registry):
        if task.replace("/", ".") == wanted:
            told(task, _ENDINGS[ending])
            return


def register_all() -> None:
    """Register every task with gymnasium under the namespace `nsrl`; doing it again changes nothing."""
    for task, maker, arguments, steps, threshold in _TASKS:
        if task not in registry:
            register(
                id=task,
                entry_point=f"nsrl_envs.{maker}",
                kwargs=arguments,
                max_episode_steps=steps,
                reward_threshold=threshold,
            )
