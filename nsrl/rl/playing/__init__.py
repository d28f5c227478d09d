"""Agents at play: roll-outs, evaluations, the environments they play in, and which actions are valid there."""

from nsrl.rl.playing.environments import training_env
from nsrl.rl.playing.evaluation import Returns, evaluate

__all__ = [
    "Returns",
    "evaluate",
    "training_env",
]
