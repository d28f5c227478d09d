"""A benchmark: tasks in their order, each with examples to train on, to choose settings by, and to report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nsrl.continual.tasks import Batch, Scenario, Task
from nsrl.errors import NsrlError


@dataclass(frozen=True)
class Examples:
    """Inputs and what they should give.

    Attributes:
        inputs: shape (N, ...); images may be bytes, as they lie in the file.
        targets: labels, shape (N,), int64; or values, shape (N, outputs).
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise NsrlError(f"{len(self.inputs)} inputs need as many targets, not {len(self.targets)}")

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: Tensor) -> Examples:
        """Some of the examples."""
        return Examples(self.inputs[indices], self.targets[indices])

    def of_classes(self, classes: tuple[int, ...]) -> Examples:
        """The examples of some classes, in their order."""
        return self.take(torch.isin(self.targets, torch.tensor(classes)).nonzero().squeeze(1))


@dataclass(frozen=True)
class Splits:
    """The three parts of a task's examples.

    Attributes:
        train: to train on.
        validation: to choose settings by; perhaps empty.
        test: for the reported scores.
    """

    train: Examples
    validation: Examples
    test: Examples

    def with_inputs(self, change: Callable[[Tensor], Tensor]) -> Splits:
        """Other inputs, same targets."""
        parts = (self.train, self.validation, self.test)
        return Splits(*(Examples(change(part.inputs), part.targets) for part in parts))


@dataclass(frozen=True)
class TaskData:
    """A task and its examples."""

    task: Task
    splits: Splits


@dataclass(frozen=True)
class Benchmark:
    """A sequence of tasks.

    Attributes:
        name: of the benchmark.
        scenario: "task", "class" or "domain", see `nsrl.continual.tasks`.
        tasks: in the order in which they are learnt; `task.index` counts in that order.
        outputs: of a single output layer: number of classes, or dimension of the values.
        regression: targets are values, not labels.
        normalise: makes the network's inputs (float) of stored ones.
    """

    name: str
    scenario: Scenario
    tasks: tuple[TaskData, ...]
    outputs: int
    regression: bool = False
    normalise: Callable[[Tensor], Tensor] = torch.Tensor.float

    @property
    def head_sizes(self) -> tuple[int, ...] | None:
        """Outputs of each task's head; None where all tasks share one output layer."""
        if self.scenario != "task":
            return None
        return tuple(len(data.task.classes) if data.task.classes else self.outputs for data in self.tasks)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one input."""
        return tuple(self.tasks[0].splits.train.inputs.shape[1:])

    def loader(
        self,
        index: int,
        part: str = "train",
        *,
        batch_size: int = 256,
        seed: int | None = None,
        augment: bool = False,
        device: str = "cpu",
        first: int | None = None,
    ) -> Minibatches:
        """Minibatches of one task.

        Args:
            index: of the task in the benchmark's order.
            part: "train", "validation" or "test".
            batch_size: examples in a batch; the last one may be smaller.
            seed: shuffles, anew in every pass; None keeps the order.
            augment: random crops and mirroring of images.
            device: of the batches.
            first: only so many of the examples.
        """
        data = self.tasks[index]
        examples: Examples = getattr(data.splits, part)
        if first is not None:
            examples = Examples(examples.inputs[:first], examples.targets[:first])
        return Minibatches(examples, data.task.index, self.normalise, batch_size, seed, augment, device)


class Minibatches:
    """Minibatches (inputs, targets, task index), as often as it is gone through.

    It slices whole batches out of tensors: torch's DataLoader takes longer to collate 32 digits than a step on them.
    Many batches are gathered and made inputs at once, for the same reason.
    """

    #: Examples that are gathered at once.
    GATHERED = 2048

    def __init__(
        self,
        examples: Examples,
        index: int,
        normalise: Callable[[Tensor], Tensor],
        batch_size: int,
        seed: int | None,
        augment: bool,
        device: str,
    ):
        self.examples, self.index, self.normalise = examples, index, normalise
        self.batch_size, self.augment, self.device = batch_size, augment, device
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        count = len(self.examples)
        order = torch.arange(count) if self._generator is None else torch.randperm(count, generator=self._generator)
        # augmentation draws for a batch at a time
        together = self.batch_size * max(1, 1 if self.augment else self.GATHERED // self.batch_size)
        for indices in order.split(together):
            some = self.examples.take(indices)
            images = augmented(some.inputs, self._generator) if self.augment else some.inputs
            inputs, targets = self.normalise(images).to(self.device), some.targets.to(self.device)
            for batch in zip(inputs.split(self.batch_size), targets.split(self.batch_size), strict=True):
                yield *batch, self.index


def augmented(images: Tensor, generator: torch.Generator | None = None, padding: int = 4) -> Tensor:
    """Images, (N, C, H, W), shifted by up to `padding` pixels each way (black comes in), half of them mirrored."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    down, right = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    mirrored = torch.rand(count, generator=generator) < 0.5
    columns[mirrored] = columns[mirrored].flip(1)
    examples = torch.arange(count)[:, None, None]
    # indices around a slice put the channels last; with that memory layout and few channels, oneDNN's gradients of
    # convolutions write out of bounds (torch 2.13, CPU)
    return padded[examples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def split_examples(examples: Examples, validation: float, test: float, seed: int) -> Splits:
    """Draw validation and test parts, of each class the same share.

    Args:
        examples: all there are, with labels, or with values (then drawn from all).
        validation: share of them.
        test: share of them.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = examples.targets if examples.targets.ndim == 1 else torch.zeros(len(examples))
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        first, second = round(test * len(members)), round((test + validation) * len(members))
        for part, chosen in zip(parts, (members[second:], members[first:second], members[:first]), strict=True):
            part.append(chosen)
    train, held, tested = (examples.take(torch.cat(part).sort().values) for part in parts)
    return Splits(train, held, tested)


def split_classes(splits: Splits, count: int, tasks: int, scenario: Scenario) -> tuple[TaskData, ...]:
    """Classes 0, 1, ... in `tasks` groups of the same size, one a task.

    In the scenario "task" labels count within the task, in "class" over all classes.

    Raises:
        NsrlError: the classes cannot be divided so.
    """
    if count % tasks:
        raise NsrlError(f"{count} classes cannot be split into {tasks} tasks of the same size")
    size = count // tasks
    found = []
    for index in range(tasks):
        classes = tuple(range(index * size, (index + 1) * size))
        own_head = scenario == "task"
        task = Task(f"classes {classes[0]}-{classes[-1]}", index, classes, index if own_head else None)
        first = classes[0] if own_head else 0
        parts = (part.of_classes(classes) for part in (splits.train, splits.validation, splits.test))
        found.append(TaskData(task, Splits(*(Examples(part.inputs, part.targets - first) for part in parts))))
    return tuple(found)


def ordered(tasks: tuple[TaskData, ...], order: int) -> tuple[TaskData, ...]:
    """The tasks as they are (0), or permuted by a seed (any other number); indices and heads count anew."""
    if order:
        permutation = torch.randperm(len(tasks), generator=torch.Generator().manual_seed(order))
        tasks = tuple(tasks[position] for position in permutation.tolist())
    return tuple(
        TaskData(replace(data.task, index=index, head=None if data.task.head is None else index), data.splits)
        for index, data in enumerate(tasks)
    )
