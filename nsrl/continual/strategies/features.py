"""nsrl's own, exact variant: protected layer features with a drift-free cumulative displacement."""

from __future__ import annotations

from typing import Any

from torch import nn

from nsrl.continual.features import FeatureOptions, ProtectedFeatures
from nsrl.continual.optimizers import OptimizerConfig
from nsrl.continual.strategies.base import Strategy
from nsrl.continual.tasks import Loader, Task


class FeatureStrategy(Strategy):
    """No layer's output on protected features of learnt tasks moves, with `energy` 1 not by a rounding error.

    Args:
        model, optimizer: as `Strategy`.
        options: energy and interval.
    """

    name = "features"

    def __init__(
        self, model: nn.Module, optimizer: OptimizerConfig | None = None, options: FeatureOptions | None = None
    ):
        super().__init__(model, optimizer)
        self.features = ProtectedFeatures(model, options or FeatureOptions())

    def memory_bytes(self) -> int:
        """Protected spans."""
        return self.features.nbytes() if self.tasks else 0

    def diagnostics(self) -> dict[str, float]:
        """As `Strategy`, with the certificate of the latest projection."""
        return {**super().diagnostics(), **self.features.certificate()}

    def progress(self) -> dict[str, Any]:
        """Where the way began, and the steps since."""
        return self.features.progress()

    def resume(self, progress: dict[str, Any]) -> None:
        """Go on from there."""
        self.features.resume(progress)

    def _after_step(self) -> None:
        self.features.tick()

    def _end(self, task: Task, loader: Loader) -> None:
        self.features.retain(task, loader)
