"""Supervised continual learning on the projection core: strategies, what they mean, and how they are measured.

The names below load on first use: `nsrl continual --help` and a mistyped key are answered without torch.
"""

from typing import TYPE_CHECKING, Any

from nsrl.face import lazily

if TYPE_CHECKING:
    from nsrl.continual.guard import Guard as Guard
    from nsrl.continual.guard import protect as protect
    from nsrl.continual.heads import MultiHead as MultiHead
    from nsrl.continual.heads import freeze_statistics as freeze_statistics
    from nsrl.continual.heads import model_outputs as model_outputs
    from nsrl.continual.heads import predictions as predictions
    from nsrl.continual.metrics import SequenceMetrics as SequenceMetrics
    from nsrl.continual.metrics import sequence_metrics as sequence_metrics
    from nsrl.continual.optimizers import OptimizerConfig as OptimizerConfig
    from nsrl.continual.strategies import STRATEGIES as STRATEGIES
    from nsrl.continual.strategies import Strategy as Strategy
    from nsrl.continual.strategies import build_strategy as build_strategy
    from nsrl.continual.tasks import Batch as Batch
    from nsrl.continual.tasks import Scenario as Scenario
    from nsrl.continual.tasks import Task as Task

_names, _load = lazily(
    __name__,
    {
        "nsrl.continual.guard": "Guard protect",
        "nsrl.continual.heads": "MultiHead freeze_statistics model_outputs predictions",
        "nsrl.continual.metrics": "SequenceMetrics sequence_metrics",
        "nsrl.continual.optimizers": "OptimizerConfig",
        "nsrl.continual.strategies": "STRATEGIES Strategy build_strategy",
        "nsrl.continual.tasks": "Batch Scenario Task",
    },
)
__all__ = [*_names]


def __getattr__(name: str) -> Any:
    return _load(name)
