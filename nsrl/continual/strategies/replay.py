"""Strategies that keep samples and use their labels: experience replay and averaged gradient episodic memory."""

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
class ReplayOptions:
    """What is kept and how much of it is used.

    Attributes:
        samples_per_task: kept of every task, evenly over its classes.
        batch_samples: drawn from the memory at every step.
        weight: of the memory's loss, that of the batch being 1; None is the number of earlier tasks, as in joint
            training. Experience replay only.
        seed: of both.
    """

    samples_per_task: int = 200
    batch_samples: int = 64
    weight: float | None = 1.0
    seed: int = 0


class _WithMemory(Strategy):
    def __init__(
        self, model: nn.Module, optimizer: OptimizerConfig | None = None, options: ReplayOptions | None = None
    ):
        super().__init__(model, optimizer)
        self.options = options or ReplayOptions()
        self._memory = Memory(self.options.samples_per_task, self.options.seed)

    def memory_bytes(self) -> int:
        """Kept inputs and labels."""
        return self._memory.nbytes()

    def progress(self) -> dict[str, Any]:
        """Draws from the memory."""
        return self._memory.progress()

    def resume(self, progress: dict[str, Any]) -> None:
        """Go on with the draws."""
        self._memory.resume(progress)

    def _end(self, task: Task, loader: Loader) -> None:
        self._memory.add(task, loader)


class ExperienceReplay(_WithMemory):
    """Every step trains on the batch and on samples of earlier tasks, equally weighted (arXiv 1902.10486).

    Args:
        model, optimizer: as `Strategy`.
        options: memory.
    """

    name = "er"

    def _backward(self, inputs: Tensor, targets: Tensor, head: int | None) -> float:
        if not self.tasks:
            return super()._backward(inputs, targets, head)
        memory = self._memory
        old = memory.draw(self.options.batch_samples)
        heads = joined_heads(head, len(inputs), memory.heads_of(old))
        passed = self._pass(torch.cat([inputs, memory.take(old)]), heads)
        new, past = passed.outputs.split([len(inputs), len(old)])
        objective = objective_of(targets)
        objective.check(new, targets)
        loss, slope = objective.loss_and_slope(new, targets)
        weight = len(self.tasks) if self.options.weight is None else self.options.weight
        _, past_slope = objective.loss_and_slope(past, memory.targets[old])
        passed.backward(torch.cat([slope, past_slope.mul_(weight)]).div_(1.0 + weight))
        return float(loss)


class AGEM(_WithMemory):
    """Averaged GEM (arXiv 1812.00420): a gradient that would raise the memory's loss loses that component.

    With g_ref the gradient of a batch of the memory, g becomes g - (g . g_ref / g_ref . g_ref) g_ref when
    g . g_ref < 0.

    Args:
        model, optimizer: as `Strategy`.
        options: memory.
    """

    name = "agem"

    def _backward(self, inputs: Tensor, targets: Tensor, head: int | None) -> float:
        if not self.tasks:
            return super()._backward(inputs, targets, head)
        memory, flat = self._memory, self.flat
        old = memory.draw(self.options.batch_samples)
        passed, targets_then = self._pass(memory.take(old), memory.heads_of(old)), memory.targets[old]
        passed.backward(objective_of(targets_then).loss_and_slope(passed.outputs, targets_then)[1])
        reference = flat.gradient()
        self.optimizer.zero_grad()
        loss = super()._backward(inputs, targets, head)
        gradient = flat.gradient()
        overlap = gradient @ reference
        if float(overlap) < 0.0:
            flat.set_gradient(gradient - overlap / (reference @ reference) * reference)
        return loss
