"""What is to be kept: buffers of old-task states, where they come from, and a policy measured against them."""

from nsrl.rl.retention.buffer import RetentionBuffer
from nsrl.rl.retention.cloning import CloneReport, clone
from nsrl.rl.retention.constraint import Measurement, RetentionConstraint
from nsrl.rl.retention.states import RetainedStates

__all__ = [
    "CloneReport",
    "Measurement",
    "RetainedStates",
    "RetentionBuffer",
    "RetentionConstraint",
    "clone",
]
