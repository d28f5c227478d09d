"""The two ends of the scale: nothing is kept, and everything is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsrl.continual.memory import Memory
from nsrl.continual.objectives import objective_of
from nsrl.continual.optimizers import OptimizerConfig
from nsrl.continual.strategies.base import Strategy, joined_heads
from nsrl.continual.tasks import Loader, Task


@dataclass(frozen=True)
class NoOptions:
    """Nothing to choose."""


@dataclass(frozen=True)
class JointOptions:
    """How earlier tasks are drawn.

    Attributes:
        seed: of the draws.
    """

    seed: int = 0


class Naive(Strategy):
    """Plain fine-tuning: the lower bound.

    Args:
        model, optimizer: as `Strategy`.
        options: none.
    """

    name = "naive"

    def __init__(self, model: nn.Module, optimizer: OptimizerConfig | None = None, options: NoOptions | None = None):
        super().__init__(model, optimizer)


class Joint(Strategy):
    """Training on all tasks so far: the upper bound.

    Every step takes, besides the batch, one batch of the same size from every earlier task; the loss is the mean over
    the tasks. All data are kept.

    Args:
        model, optimizer: as `Strategy`.
        options: seed.
    """

    name = "joint"

    def __init__(self, model: nn.Module, optimizer: OptimizerConfig | None = None, options: JointOptions | None = None):
        super().__init__(model, optimizer)
        self._memory = Memory(None, (options or JointOptions()).seed)

    def memory_bytes(self) -> int:
        """All data of earlier tasks."""
        return self._memory.nbytes()

    def progress(self) -> dict[str, Any]:
        """Draws from the earlier tasks."""
        return self._memory.progress()

    def resume(self, progress: dict[str, Any]) -> None:
        """Go on with the draws."""
        self._memory.resume(progress)

    def _end(self, task: Task, loader: Loader) -> None:
        self._memory.add(task, loader)

    def _backward(self, inputs: Tensor, targets: Tensor, head: int | None) -> float:
        if not self.tasks:
            return super()._backward(inputs, targets, head)
        memory = self._memory
        old = memory.draw(len(self.tasks) * len(inputs))
        heads = joined_heads(head, len(inputs), memory.heads_of(old))
        passed = self._pass(torch.cat([inputs, memory.take(old)]), heads)
        new, past = passed.outputs.split([len(inputs), len(old)])
        objective = objective_of(targets)
        objective.check(new, targets)
        loss, slope = objective.loss_and_slope(new, targets)
        share = len(self.tasks) / (len(self.tasks) + 1)
        _, past_slope = objective.loss_and_slope(past, memory.targets[old])
        passed.backward(torch.cat([slope.mul_(1.0 - share), past_slope.mul_(share)]))
        return float(loss)
