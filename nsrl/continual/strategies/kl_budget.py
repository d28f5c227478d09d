"""nsrl's own: a KL budget on what was learnt, through the full Jacobian, alone or with protected layer features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsrl.continual.budget import KLBudget
from nsrl.continual.budget_options import KLBudgetOptions
from nsrl.continual.features import FeatureOptions, ProtectedFeatures
from nsrl.continual.objectives import objective_of
from nsrl.continual.optimizers import OptimizerConfig
from nsrl.continual.strategies.base import Strategy, joined_heads
from nsrl.continual.tasks import Loader, Task
from nsrl.reading.values import mapping


@dataclass(frozen=True)
class CombinedOptions(KLBudgetOptions):
    """As `KLBudgetOptions`, and which layer features are protected besides.

    Attributes:
        energy, project_every: as `FeatureOptions`; a smaller share, because the budget minds what is left.
    """

    energy: float = 0.5
    project_every: int = 10


class KLBudgetStrategy(Strategy):
    """The mean KL(then || now) of every learnt task stays within `kl_budget` on its retained inputs.

    Needs labels of old tasks only for `replay`. It holds after `after_task` and after every `enforce_every` steps, and
    by `alarm` behind every step that was measured; the batch and the retained inputs share one pass.

    Args:
        model, optimizer: as `Strategy`.
        options: budget and how it is kept.
    """

    name = "kl_budget"

    def __init__(
        self, model: nn.Module, optimizer: OptimizerConfig | None = None, options: KLBudgetOptions | None = None
    ):
        super().__init__(model, optimizer)
        self.options = options or KLBudgetOptions()
        self.budget = KLBudget(model, self.options)

    def memory_bytes(self) -> int:
        """Retained inputs and outputs."""
        return self.budget.nbytes()

    def diagnostics(self) -> dict[str, float]:
        """As `Strategy`; largest KL of a task on its retained inputs, largest multiplier, restorations and the like."""
        if not self.tasks:
            return {}
        return {
            **super().diagnostics(),
            "largest_kl": self.budget.largest_divergence(),
            "multiplier": self.budget.multipliers.largest(),
            "restorations": float(self.budget.restorations),
            "fallbacks": float(self.budget.fallbacks),
            "corrections": float(self.budget.corrections),
            **self.budget.certificate(),
        }

    def promised_kl(self) -> float | None:
        """Largest KL of a task on its retained inputs."""
        return self.budget.largest_divergence() if self.tasks else None

    def progress(self) -> dict[str, Any]:
        """Draws, multiplier and counters."""
        return self.budget.progress()

    def resume(self, progress: dict[str, Any]) -> None:
        """Go on from there."""
        self.budget.resume(progress)

    def _backward(self, inputs: Tensor, targets: Tensor, head: int | None) -> float:
        if not self.budget.draws():
            plain = super()._backward(inputs, targets, head)
            self.budget.add_curvature(self.optimizer)
            return plain
        memory, old = self.budget.retained.memory, self.budget.draw(len(inputs))
        heads = joined_heads(head, len(inputs), memory.heads_of(old))
        passed = self._pass(torch.cat([inputs, memory.take(old)]), heads)
        new, kept = passed.outputs.split([len(inputs), len(old)])
        objective = objective_of(targets)
        objective.check(new, targets)
        loss, slope = objective.loss_and_slope(new, targets)
        # one root with a gradient in closed form: half as many nodes as two losses, and steps here are all overhead
        passed.backward(torch.cat([slope, self.budget.pull(kept, old)]))
        self.budget.add_curvature(self.optimizer)
        return float(loss)

    def _after_step(self) -> None:
        self.budget.tick(self.optimizer)

    def _end(self, task: Task, loader: Loader) -> None:
        self.budget.retain(task, loader, self.optimizer)


class CombinedStrategy(KLBudgetStrategy):
    """The KL budget, with steps that leave the strongest layer features of learnt tasks alone.

    The budget is the guarantee; the features keep most of a step out of what it has to mind. A restoration may move
    the features: the way is counted anew from where it ends.

    Args:
        model, optimizer: as `Strategy`.
        options: of both.
    """

    name = "combined"

    def __init__(
        self, model: nn.Module, optimizer: OptimizerConfig | None = None, options: CombinedOptions | None = None
    ):
        chosen = options or CombinedOptions()
        super().__init__(model, optimizer, chosen)
        self.features = ProtectedFeatures(model, FeatureOptions(chosen.energy, chosen.project_every), freeze=False)

    def memory_bytes(self) -> int:
        """Retained inputs and outputs, and protected spans."""
        return super().memory_bytes() + (self.features.nbytes() if self.tasks else 0)

    def diagnostics(self) -> dict[str, float]:
        """As `KLBudgetStrategy`, with the certificate of the latest projection."""
        return {**super().diagnostics(), **self.features.certificate()}

    def progress(self) -> dict[str, Any]:
        """As `KLBudgetStrategy`, and where the way of the features began."""
        return {**super().progress(), "features": self.features.progress()}

    def resume(self, progress: dict[str, Any]) -> None:
        """Go on from there."""
        self.features.resume(mapping(progress, "progress", ["features"])["features"])
        super().resume(progress)

    def _after_step(self) -> None:
        if not self.tasks:
            return
        self.features.tick()
        before = self.budget.interventions
        self.budget.tick(self.optimizer)
        if self.budget.interventions > before:
            self.features.restart()

    def _end(self, task: Task, loader: Loader) -> None:
        self.features.enforce()
        self.budget.retain(task, loader, self.optimizer)
        # a restoration just now is a part of what the task ended with
        self.features.restart()
        self.features.retain(task, loader)
