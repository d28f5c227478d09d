"""The task pairs: one task whose behaviour is to be retained, and a new one to learn."""

from dataclasses import dataclass
from difflib import get_close_matches

from nsrl_envs.errors import TaskError


@dataclass(frozen=True)
class TaskPair:
    """A retained task and a new one with equal observation and action spaces."""

    name: str
    """Name in `PAIRS`."""
    retained: str
    """Gymnasium id of the task that a pretrained policy is good at."""
    new: str
    """Gymnasium id of the task that it has to learn."""
    visible: bool
    """Whether the observation shows which of the two tasks it is; if not, a trade-off may be inevitable."""
    extra: str | None
    """Extra of nsrl that installs what both tasks need; None if nsrl alone is enough."""
    about: str
    """What changes from the retained task to the new one."""


def _by_name(*pairs: TaskPair) -> dict[str, TaskPair]:
    return {pair.name: pair for pair in pairs}


PAIRS: dict[str, TaskPair] = _by_name(
    TaskPair(
        name="cartpole_swapped",
        retained="nsrl/CartPole-v0",
        new="nsrl/CartPoleSwapped-v0",
        visible=True,
        extra=None,
        about="left and right are swapped",
    ),
    TaskPair(
        name="pendulum_reversed",
        retained="nsrl/Pendulum-v0",
        new="nsrl/PendulumReversed-v0",
        visible=True,
        extra=None,
        about="the torque is reversed",
    ),
    TaskPair(
        name="acrobot_swapped",
        retained="nsrl/Acrobot-v0",
        new="nsrl/AcrobotSwapped-v0",
        visible=True,
        extra=None,
        about="the torques to the left and to the right are swapped",
    ),
    TaskPair(
        name="mountaincar_swapped",
        retained="nsrl/MountainCar-v0",
        new="nsrl/MountainCarSwapped-v0",
        visible=True,
        extra=None,
        about="the pushes to the left and to the right are swapped",
    ),
    TaskPair(
        name="mountaincar_continuous_reversed",
        retained="nsrl/MountainCarContinuous-v0",
        new="nsrl/MountainCarContinuousReversed-v0",
        visible=True,
        extra=None,
        about="the force is reversed",
    ),
    TaskPair(
        name="halfcheetah_backward",
        retained="nsrl/HalfCheetah-v0",
        new="nsrl/HalfCheetahBackward-v0",
        visible=True,
        extra="mujoco",
        about="running backward is rewarded instead of running forward",
    ),
    TaskPair(
        name="swimmer_backward",
        retained="nsrl/Swimmer-v0",
        new="nsrl/SwimmerBackward-v0",
        visible=True,
        extra="mujoco",
        about="swimming backward is rewarded instead of swimming forward",
    ),
    TaskPair(
        name="ant_backward",
        retained="nsrl/Ant-v0",
        new="nsrl/AntBackward-v0",
        visible=True,
        extra="mujoco",
        about="walking backward is rewarded instead of walking forward",
    ),
    TaskPair(
        name="halfcheetah_heavy_torso",
        retained="nsrl/HalfCheetahPlain-v0",
        new="nsrl/HalfCheetahHeavyTorso-v0",
        visible=False,
        extra="mujoco",
        about="the torso is four times as heavy",
    ),
    TaskPair(
        name="hopper_low_gravity",
        retained="nsrl/Hopper-v0",
        new="nsrl/HopperLowGravity-v0",
        visible=False,
        extra="mujoco",
        about="gravity is half of the usual",
    ),
    TaskPair(
        name="lunarlander_swapped",
        retained="nsrl/LunarLanderTold-v0",
        new="nsrl/LunarLanderSwapped-v0",
        visible=True,
        extra="box2d",
        about="every engine answers to another action",
    ),
    TaskPair(
        name="lunarlander_continuous_reversed",
        retained="nsrl/LunarLanderContinuous-v0",
        new="nsrl/LunarLanderContinuousReversed-v0",
        visible=True,
        extra="box2d",
        about="throttles are reversed",
    ),
    TaskPair(
        name="lunarlander_low_gravity",
        retained="nsrl/LunarLander-v0",
        new="nsrl/LunarLanderLowGravity-v0",
        visible=False,
        extra="box2d",
        about="gravity is a quarter of the usual",
    ),
    TaskPair(
        name="lunarlander_wind",
        retained="nsrl/LunarLander-v0",
        new="nsrl/LunarLanderWind-v0",
        visible=False,
        extra="box2d",
        about="wind and turbulence push the lander",
    ),
)


def pair(name: str) -> TaskPair:
    """Return a task pair by its name.

    Raises:
        TaskError: If there is no such pair; the sentence suggests the nearest name.
    """
    if name in PAIRS:
        return PAIRS[name]
    nearest = get_close_matches(name, PAIRS, n=1)
    suggestion = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise TaskError(f"no task pair is named {name!r}: {suggestion}the pairs are {', '.join(PAIRS)}")
