"""The algorithms that fine-tune inside the budget, and `protect`, which puts it around any other."""

from nsrl.rl.algorithms.mixin import ProtectedMixin
from nsrl.rl.algorithms.ppo import NullSpacePPO
from nsrl.rl.algorithms.protect import attach_env, protect
from nsrl.rl.algorithms.report import RetentionReport
from nsrl.rl.algorithms.trpo import NaturalTRPO, NullSpaceTRPO

__all__ = [
    "NaturalTRPO",
    "NullSpacePPO",
    "NullSpaceTRPO",
    "ProtectedMixin",
    "RetentionReport",
    "attach_env",
    "protect",
]
