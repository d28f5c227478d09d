"""A reservoir: a uniform sample of a stream of unknown length, which needs no boundaries between tasks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nsrl.continual.heads import ABSENT
from nsrl.errors import NsrlError
from nsrl.reading.limits import Unreadable
from nsrl.reading.values import mapping, whole

#: What of a sample is kept, as tensors with the samples first.
KEPT = ("inputs", "targets", "outputs", "heads")


class Reservoir:
    """Samples of a stream, each of those seen so far with the same probability (Vitter 1985, algorithm R).

    Args:
        capacity: number of samples.
        seed: of what is kept and of the draws.

    Attributes:
        inputs: (n, ...).
        targets: (n,) or (n, O).
        outputs: of the model when the sample came, (n, O), `ABSENT` in columns that its head lacks.
        heads: of each sample, (n,) int64; -1 for a model without heads.
        seen: samples offered so far.
    """

    def __init__(self, capacity: int, seed: int = 0):
        if capacity < 1:
            raise NsrlError(f"a reservoir needs room for at least 1 sample, not {capacity}")
        self.capacity = capacity
        self.seen = 0
        self.inputs = self.targets = self.outputs = self.heads = torch.zeros(0)
        self._held = 0
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self._held

    def offer(self, inputs: Tensor, targets: Tensor, outputs: Tensor, head: int | None) -> None:
        """Show some samples; each takes a free place, or that of another one with probability capacity / seen.

        Args:
            inputs, targets: of the samples.
            outputs: detached, (n, O).
            head: of all of them.

        Raises:
            NsrlError: inputs that do not fit those before.
        """
        count = len(inputs)
        heads = torch.full((count,), -1 if head is None else head, device=inputs.device)
        if not self.seen:
            for name, tensor in zip(KEPT, (inputs, targets, outputs, heads), strict=True):
                setattr(self, name, tensor.new_empty(self.capacity, *tensor.shape[1:]))
        if inputs.shape[1:] != self.inputs.shape[1:]:
            raise NsrlError(
                f"the inputs have shape {tuple(inputs.shape[1:])}, those before {tuple(self.inputs.shape[1:])}; "
                "a reservoir needs one shape"
            )
        outputs = self._fitted(outputs)
        places = self._places(count)
        kept = (places < self.capacity).nonzero().squeeze(1)
        if len(kept):
            # of two samples for one place the later one stays, as one after the other would have it
            last = dict(zip(places[kept].tolist(), kept.tolist(), strict=True))
            where = torch.tensor(list(last), device=inputs.device)
            which = torch.tensor(list(last.values()), device=inputs.device)
            for name, tensor in zip(KEPT, (inputs, targets, outputs, heads), strict=True):
                getattr(self, name)[where] = tensor[which]
        self.seen += count
        self._held = min(self.seen, self.capacity)

    def draw(self, count: int) -> Tensor:
        """Indices of `count` different samples (all, when there are fewer), (n,) int64."""
        return torch.randperm(len(self), generator=self._generator)[:count].to(self.inputs.device)

    def heads_of(self, indices: Tensor) -> Tensor | None:
        """Heads of some samples, (n,) int64; None for a model without heads."""
        heads = self.heads[indices]
        return None if bool((heads < 0).any()) else heads

    def nbytes(self) -> int:
        """All that is held, in bytes."""
        return sum(t[: len(self)].numel() * t.element_size() for t in (self.inputs, self.targets, self.outputs))

    def progress(self) -> dict[str, Any]:
        """What is held and where the draws are."""
        held = {name: getattr(self, name)[: len(self)] for name in KEPT}
        return {**held, "seen": self.seen, "generator": self._generator.get_state()}

    def resume(self, progress: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            Unreadable: a file that was changed.
        """
        mapping(progress, "progress", [*KEPT, "seen", "generator"])
        seen = whole(progress["seen"], "seen")
        held = min(seen, self.capacity)
        for name in KEPT:
            tensor = progress[name]
            if not isinstance(tensor, Tensor) or len(tensor) != held:
                raise Unreadable(f"{name} must be a tensor of {held} samples")
        try:
            self._generator.set_state(progress["generator"])
        except (TypeError, RuntimeError) as error:
            raise Unreadable("the state of a random generator is damaged") from error
        for name in KEPT:
            tensor = progress[name]
            room = tensor.new_empty(self.capacity, *tensor.shape[1:])
            room[:held] = tensor
            setattr(self, name, room)
        self.seen, self._held = seen, held

    def _places(self, count: int) -> Tensor:
        """The place of each of the next samples, (count,) int64; one of `capacity` or more is none."""
        order = torch.arange(self.seen, self.seen + count)
        drawn = (torch.rand(count, dtype=torch.float64, generator=self._generator) * (order + 1)).long()
        return torch.where(order < self.capacity, order, drawn)

    def _fitted(self, outputs: Tensor) -> Tensor:
        """Outputs as wide as those that are held, after these were made as wide as the outputs."""
        gap = outputs.shape[1] - self.outputs.shape[1]
        if gap > 0:
            self.outputs = F.pad(self.outputs, (0, gap), value=ABSENT)
        return F.pad(outputs, (0, -gap), value=ABSENT) if gap < 0 else outputs
