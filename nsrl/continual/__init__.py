"""Supervised continual learning on the projection core: strategies, what they mean, and how they are measured."""

from nsrl.continual.heads import MultiHead, freeze_statistics, model_outputs, predictions
from nsrl.continual.metrics import SequenceMetrics, sequence_metrics
from nsrl.continual.optimizers import OptimizerConfig
from nsrl.continual.protect import Guard, protect
from nsrl.continual.strategies import STRATEGIES, Strategy, build_strategy
from nsrl.continual.tasks import Batch, Scenario, Task

__all__ = [
    "STRATEGIES",
    "Batch",
    "Guard",
    "MultiHead",
    "OptimizerConfig",
    "Scenario",
    "SequenceMetrics",
    "Strategy",
    "Task",
    "build_strategy",
    "freeze_statistics",
    "model_outputs",
    "predictions",
    "protect",
    "sequence_metrics",
]
