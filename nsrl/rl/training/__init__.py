"""What accompanies a training run: evaluations of all tasks, checkpoints, interruption, progress, TensorBoard."""

from nsrl.rl.training.callbacks import TaskEvaluation
from nsrl.rl.training.checkpoint import Checkpoint, remaining, restore
from nsrl.rl.training.interruption import Interruption, graceful_interrupts
from nsrl.rl.training.progress import FineTuningProgress
from nsrl.rl.training.refresh import BufferRefresh
from nsrl.rl.training.tensorboard import open_logger

__all__ = [
    "BufferRefresh",
    "Checkpoint",
    "FineTuningProgress",
    "Interruption",
    "TaskEvaluation",
    "graceful_interrupts",
    "open_logger",
    "remaining",
    "restore",
]
