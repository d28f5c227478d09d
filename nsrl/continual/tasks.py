"""Tasks, batches, and what is known of the task when the model is tested.

Three scenarios (van de Ven et al., Nature Machine Intelligence 2022), told apart by what a `Task` carries:

* "task": the task's identity is known at test time. `head` is set; every task has an output layer of its own in a
  `MultiHead` model and targets count within it, 0 to its width - 1. Only the head of the task at hand is trained.
* "class": the identity is not known. `classes` is set and `head` is not: one output layer over the classes of all
  tasks, targets are indices into it, and a prediction is the likeliest of all classes seen so far. Training takes the
  softmax over the whole layer, so that a model keeps saying of an old input that it is none of the new classes.
* "domain": neither is set. One output layer with the same meaning for every task, only the inputs change.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Scenario = Literal["task", "class", "domain"]

#: Inputs (N, ...), targets (N,) of integers or (N, O) of floats, index of the task.
Batch = tuple[Tensor, Tensor, int]

#: Batches of one task. The index may be left out: the task is given beside the loader.
Loader = Iterable[Batch | tuple[Tensor, Tensor] | list[Tensor]]


@dataclass(frozen=True)
class Task:
    """One task of a sequence.

    Attributes:
        name: for people and logs, unique in the sequence.
        index: what its batches are marked with, unique in the sequence.
        classes: columns of the single output layer that belong to this task (class-incremental), or the classes behind
            a head's columns; None when all tasks share their outputs.
        head: its output layer in a `MultiHead` model; None for a single head.
    """

    name: str
    index: int
    classes: tuple[int, ...] | None = None
    head: int | None = None

    @property
    def scenario(self) -> Scenario:
        """What is known at test time: see the module's docstring."""
        if self.head is not None:
            return "task"
        return "domain" if self.classes is None else "class"
