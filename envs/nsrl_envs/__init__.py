"""Pairs and sequences of gymnasium tasks for fine-tuning without forgetting; importing this package registers them.

    import gymnasium
    import nsrl_envs

    env = gymnasium.make("nsrl/CartPoleSwapped-v0")

Without the import, `gymnasium.make("nsrl_envs:nsrl/CartPoleSwapped-v0")` does the same. That form also works
in the worker processes of a `SubprocVecEnv`, which start without the imports of the program that starts them.
"""

from nsrl_envs.actions import ReverseActions, SwapActions
from nsrl_envs.body_mass import ScaleBodyMass
from nsrl_envs.context import TaskContext
from nsrl_envs.errors import MissingExtra, TaskError
from nsrl_envs.gravity import ScaleGravity
from nsrl_envs.observations import ReverseSensors
from nsrl_envs.pairs import PAIRS, TaskPair, pair
from nsrl_envs.registration import find_told, register_all, told
from nsrl_envs.sequences import SEQUENCES, TaskSequence

__all__ = [
    "PAIRS",
    "SEQUENCES",
    "MissingExtra",
    "ReverseActions",
    "ReverseSensors",
    "ScaleBodyMass",
    "ScaleGravity",
    "SwapActions",
    "TaskContext",
    "TaskError",
    "TaskPair",
    "TaskSequence",
    "find_told",
    "pair",
    "register_all",
    "told",
]

register_all()
