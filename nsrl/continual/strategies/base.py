"""What all strategies share: the order of events, the checks, the optimizer, the measurements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nsrl.continual.heads import refuse_moving_statistics
from nsrl.continual.objectives import objective_of
from nsrl.continual.optimizers import OptimizerConfig
from nsrl.continual.passes import Chain, Pass, run
from nsrl.continual.retention import RetainedBehaviour
from nsrl.continual.tasks import Batch, Loader, Task
from nsrl.errors import NsrlError
from nsrl.projection.optimizer import FlatParameters

#: Inputs of a task on which `diagnostics` measures how far behaviour has moved; a yardstick, not a part of any method.
WATCHED = 100


class Strategy:
    """Plain fine-tuning, and the frame of all others.

        strategy.before_task(task, loader)
        for batch in loader: strategy.step(batch)
        strategy.after_task(task, loader)

    Subclasses say what a gradient is (`_backward`), what happens around a task (`_begin`, `_end`) and what they hold.

    Args:
        model: trained in place, in the mode that it is in; batch normalisation and dropout in train mode are refused.
        optimizer: of every task.

    Attributes:
        name: in the registry.
        model: as given.
        optimizer: the present task's; made by `before_task`.
        tasks: those learnt.
        task: the one at hand, or None.
    """

    name: ClassVar[str] = "naive"

    def __init__(self, model: nn.Module, optimizer: OptimizerConfig | None = None):
        self.model = model
        self.config = optimizer or OptimizerConfig()
        self.optimizer = self.config.build(model, first=True)
        self.tasks: list[Task] = []
        self.task: Task | None = None
        self._watched = RetainedBehaviour(WATCHED)
        self._chain: Chain | None = None

    def before_task(self, task: Task, loader: Loader) -> None:
        """Prepare for a task.

        Raises:
            NsrlError: an empty loader, a task that was learnt already, layers with moving statistics.
        """
        if any(task.index == other.index for other in self.tasks):
            raise NsrlError(f"task {task.name!r} has index {task.index}, which was learnt already; give it its own")
        refuse_moving_statistics(self.model)
        first = next(iter(loader), None)
        if first is None or not len(first[0]):
            raise NsrlError(f"the loader of task {task.name!r} is empty: a task needs at least one sample")
        self.task = task
        self.optimizer = self.config.build(self.model, first=not self.tasks)
        self._chain = Chain.of(self.model)
        self._begin(task, loader)

    def step(self, batch: Batch | tuple[Tensor, Tensor]) -> float:
        """One training step; returns the mean loss of the batch before it.

        Raises:
            NsrlError: a batch of a task that is not at hand, labels that the outputs do not have.
        """
        inputs, targets, head = self._read(batch)
        self.optimizer.zero_grad()
        loss = self._backward(inputs, targets, head)
        self.optimizer.step()
        self._after_step()
        return loss

    def after_task(self, task: Task, loader: Loader) -> None:
        """Take in what is to be kept of a task.

        Raises:
            NsrlError: another task than the one at hand, an empty loader.
        """
        if task != self.task:
            raise NsrlError(f"task {task.name!r} is not at hand; call before_task with it first")
        self._end(task, loader)
        with self.recalled(task):
            self._watched.add(self.model, task, loader)
        self.tasks.append(task)
        self.task = None

    def memory_bytes(self) -> int:
        """Bytes of data and bases that are kept of earlier tasks."""
        return 0

    def diagnostics(self) -> dict[str, float]:
        """What is worth plotting: "preserved_kl", mean KL on inputs of learnt tasks, and what the strategy adds.

        Strategies that project add "kept_share" (share of a step's norm that survives, the least over the layers),
        "leakage" (share of the protected change that is still made) and "rank" (protected directions).
        """
        if not self.tasks:
            return {}
        moved = self.moved()
        return {"preserved_kl": sum(moved) / len(moved)}

    def moved(self) -> list[float]:
        """Mean KL(then || now) of every learnt task on inputs of it that are no part of any method, nats a sample."""
        found = []
        for position, task in enumerate(self.tasks):
            with self.recalled(task):
                found.append(self._watched.divergence(self.model, position))
        return found

    def promised_kl(self) -> float | None:
        """Largest KL of a task on what a budget is held on; None for strategies without a budget."""
        return None

    @contextmanager
    def recalled(self, task: Task) -> Iterator[None]:
        """The model as it is to be used on a task, for as long as the block runs; the same on all but for `trgp`."""
        yield

    def progress(self) -> dict[str, Any]:
        """What training has moved besides the weights: counters, multipliers, draws; plain numbers and tensors.

        A run that goes on behind a task takes it up by `resume` before `after_task`, and is then where it was.
        """
        return {}

    def resume(self, progress: dict[str, Any]) -> None:
        """Take up what `progress` gave."""

    # -- for subclasses ---------------------------------------------------------------------------------------------

    def _begin(self, task: Task, loader: Loader) -> None:
        """After the checks of `before_task`, with a fresh optimizer."""

    def _end(self, task: Task, loader: Loader) -> None:
        """After a task."""

    def _after_step(self) -> None:
        """After the optimizer's step."""

    def _backward(self, inputs: Tensor, targets: Tensor, head: int | None) -> float:
        """Fill the gradients; returns the batch's loss."""
        passed = self._pass(inputs, head)
        objective = objective_of(targets)
        objective.check(passed.outputs, targets)
        loss, slope = objective.loss_and_slope(passed.outputs, targets)
        passed.backward(slope)
        return float(loss)

    def _pass(self, inputs: Tensor, head: int | Tensor | None) -> Pass:
        """Forward; what a step computes with goes by here."""
        return run(self.model, self._chain, inputs, head)

    def _read(self, batch: Any) -> tuple[Tensor, Tensor, int | None]:
        if self.task is None:
            raise NsrlError("no task is at hand; call before_task first")
        inputs, targets = batch[0], batch[1]
        index = int(batch[2]) if len(batch) > 2 else self.task.index
        if index != self.task.index:
            raise NsrlError(f"a batch of task {index} came while task {self.task.index} is at hand")
        return inputs, targets, self.task.head

    @property
    def flat(self) -> FlatParameters:
        """All trainable parameters as one vector, in `named_parameters()` order."""
        return FlatParameters([p for p in self.model.parameters() if p.requires_grad])


def joined_heads(head: int | None, count: int, others: Tensor | None) -> Tensor | None:
    """Heads of `count` new samples followed by those of m others, (count + m,) int64; None where there are none."""
    if others is None or head is None:
        return None
    return torch.cat([torch.full((count,), head, dtype=others.dtype, device=others.device), others])
