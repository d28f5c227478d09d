"""What is to be kept: buffers of old-task states, where they come from, and a policy measured against them."""

from nsrl.rl.retention.buffer import RetentionBuffer
from nsrl.rl.retention.cloning import CloneReport, clone
from nsrl.rl.retention.constraint import Linearisation, Measurement, RetentionConstraint
from nsrl.rl.retention.states import RetainedStates

__all__ = [
    "CloneReport",
    "Linearisation",
    "Measurement",
    "RetainedStates",
    "RetentionBuffer",
    "RetentionConstraint",
    "clone",
]
