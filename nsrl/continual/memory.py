"""Replay memory: a few samples of every task, drawn without favour to any class, counted in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsrl.continual.tasks import Loader, Task
from nsrl.errors import NsrlError
from nsrl.reading.limits import Unreadable

#: Numbers that a byte tells apart.
COLOURS = 256


class Memory:
    """Samples of the tasks learnt so far, an equal number each.

    Args:
        per_task: number of samples kept of a task; None keeps all.
        seed: of the choice and of the draws.

    Attributes:
        tasks: in the order of arrival.
        inputs, targets: of all samples, tasks one after the other. Inputs of at most 256 different numbers, as those
            made of bytes, are held as bytes, without loss.
        heads: head of each sample; None for tasks without heads.
        owner: position in `tasks` of each sample.
    """

    def __init__(self, per_task: int | None, seed: int = 0):
        if per_task is not None and per_task < 1:
            raise NsrlError(f"a memory needs at least 1 sample a task, not {per_task}")
        self.per_task = per_task
        self.tasks: list[Task] = []
        self.targets = self.owner = torch.zeros(0)
        self._inputs = Palette.of(torch.zeros(0))
        self.heads: Tensor | None = None
        self._generator = torch.Generator().manual_seed(seed)
        self._queue = torch.zeros(0, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.owner)

    @property
    def inputs(self) -> Tensor:
        """Of all samples, (n, ...)."""
        return self._inputs.take(None)

    def take(self, indices: Tensor) -> Tensor:
        """Inputs of some samples, (m, ...)."""
        return self._inputs.take(indices)

    def add(self, task: Task, loader: Loader) -> None:
        """Keep samples of a task: `per_task` of them, as evenly over its classes as they go.

        Raises:
            NsrlError: an empty loader, or inputs that do not fit those of earlier tasks.
        """
        inputs, targets = gathered(loader)
        chosen = self._choice(targets).to(targets.device)
        inputs, targets = inputs[chosen], targets[chosen]
        owner = torch.full((len(inputs),), len(self.tasks), device=inputs.device)
        head = torch.full_like(owner, -1 if task.head is None else task.head)
        if self.tasks:
            earlier = self._inputs.codes.shape[1:]
            if inputs.shape[1:] != earlier:
                raise NsrlError(
                    f"the inputs of task {task.name!r} have shape {tuple(inputs.shape[1:])}, those of earlier tasks "
                    f"{tuple(earlier)}; a replay memory needs one shape"
                )
            head = torch.cat([torch.full_like(self.owner, -1) if self.heads is None else self.heads, head])
            inputs, targets = torch.cat([self.inputs, inputs]), torch.cat([self.targets, targets])
            owner = torch.cat([self.owner, owner])
        self._inputs, self.targets, self.owner = Palette.of(inputs), targets, owner
        self.heads = None if bool((head < 0).any()) else head
        self.tasks.append(task)
        self._queue = self._queue[:0]

    def draw(self, count: int) -> Tensor:
        """Indices of the next `count` samples of endless shuffled epochs (all, when there are fewer)."""
        count = min(count, len(self))
        if len(self._queue) < count:
            self._queue = torch.randperm(len(self), generator=self._generator)
        batch, self._queue = self._queue[:count], self._queue[count:]
        return batch.to(self.targets.device)

    def progress(self) -> dict[str, Any]:
        """Where the draws are."""
        return {"generator": self._generator.get_state(), "queue": self._queue}

    def resume(self, progress: dict[str, Any]) -> None:
        """Go on with the draws from there.

        Raises:
            Unreadable: a file that was changed: no state of a generator, or samples that there are not.
        """
        generator, queue = progress.get("generator"), progress.get("queue")
        if not isinstance(queue, Tensor) or queue.dtype != torch.long or queue.ndim != 1 or len(queue) > len(self):
            raise Unreadable("the queue of samples is damaged")
        if len(queue) and not 0 <= int(queue.min()) <= int(queue.max()) < len(self):
            raise Unreadable("the queue names samples that there are not")
        try:
            self._generator.set_state(generator)  # type: ignore[arg-type]
        except (TypeError, RuntimeError) as error:
            raise Unreadable("the state of a random generator is damaged") from error
        self._queue = queue

    def heads_of(self, indices: Tensor) -> Tensor | None:
        """Heads of some samples, (n,) int64; None where tasks have none."""
        return None if self.heads is None else self.heads[indices]

    def nbytes(self) -> int:
        """Inputs and targets, in bytes."""
        if not self.tasks:
            return 0
        return self._inputs.nbytes() + self.targets.numel() * self.targets.element_size()

    def _choice(self, targets: Tensor) -> Tensor:
        order = torch.randperm(len(targets), generator=self._generator)
        if self.per_task is None or self.per_task >= len(targets):
            return order.sort().values
        if targets.is_floating_point():
            return order[: self.per_task]
        labels = targets.cpu()[order]
        # place of every sample among those of its class: the first of each class, then the second of each, ...
        return order[_places(labels).argsort(stable=True)[: self.per_task]]


@dataclass(frozen=True)
class Palette:
    """Numbers held as bytes where there are at most 256 different ones.

    Attributes:
        codes: places in `colours`, uint8, or the numbers themselves; (n, ...).
        colours: the different numbers, ascending; None where there are too many.
    """

    codes: Tensor
    colours: Tensor | None

    @classmethod
    def of(cls, numbers: Tensor) -> Palette:
        """Of numbers (n, ...)."""
        # a few samples tell noise from bytes; sorting all of them would cost the more for nothing
        few = numbers.numel() and numbers.element_size() > 1 and len(numbers[:8].unique()) <= COLOURS
        colours = numbers.unique() if few else numbers
        if not few or len(colours) > COLOURS or not bool(torch.isfinite(colours).all()):
            return cls(numbers, None)
        if numbers.numel() + colours.numel() * numbers.element_size() >= numbers.numel() * numbers.element_size():
            return cls(numbers, None)
        return cls(torch.searchsorted(colours, numbers.contiguous()).to(torch.uint8), colours)

    def take(self, indices: Tensor | None) -> Tensor:
        """The numbers at some indices (m,), or all (None), as they were: (m, ...)."""
        codes = self.codes if indices is None else self.codes.index_select(0, indices)
        if self.colours is None:
            return codes
        return self.colours.index_select(0, codes.flatten().int()).view(codes.shape)

    def nbytes(self) -> int:
        """Codes and colours."""
        tensors = (self.codes,) if self.colours is None else (self.codes, self.colours)
        return sum(t.numel() * t.element_size() for t in tensors)


def gathered(loader: Loader) -> tuple[Tensor, Tensor]:
    """Inputs and targets of all batches of a loader.

    Raises:
        NsrlError: there are none.
    """
    batches = [(batch[0], batch[1]) for batch in loader]
    if not sum(len(targets) for _, targets in batches):
        raise NsrlError("the loader is empty: a task needs at least one sample")
    return torch.cat([inputs for inputs, _ in batches]), torch.cat([targets for _, targets in batches])


def _places(labels: Tensor) -> Tensor:
    places = torch.zeros_like(labels)
    for label in labels.unique():
        mine = labels == label
        places[mine] = torch.arange(int(mine.sum()))
    return places
