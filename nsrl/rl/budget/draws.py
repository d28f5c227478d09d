"""Draws of buffer states: minibatches of them, and those that are linearised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsrl.reading.limits import Unreadable
from nsrl.reading.tensors import check_torch_state
from nsrl.rl.retention.constraint import RetentionConstraint


class StateDraw:
    """Endless minibatches of buffer states: shuffled epochs from an own generator, never the global one."""

    def __init__(self, indices: Tensor, seed: int):
        self._indices = indices
        self._generator = torch.Generator().manual_seed(seed)
        self._queue = indices[:0]

    def draw(self, count: int) -> Tensor:
        """The next `count` state indices (all of them when there are fewer), (count,) int64."""
        count = min(count, len(self._indices))
        if len(self._queue) < count:
            order = torch.randperm(len(self._indices), generator=self._generator)
            self._queue = self._indices[order.to(self._indices.device)]
        batch, self._queue = self._queue[:count], self._queue[count:]
        return batch

    def state(self) -> dict[str, Tensor]:
        """Generator state and queue, for checkpoints."""
        return {"generator": self._generator.get_state(), "queue": self._queue.cpu()}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise Unreadable unless `state()` can have given this: a queue of states that there are."""
        check_torch_state(state["generator"])
        queue, known = state["queue"], self._indices.cpu()
        if not isinstance(queue, Tensor) or queue.dtype != known.dtype or queue.ndim != 1 or len(queue) > len(known):
            raise Unreadable("a queue of states is damaged")
        if not bool(torch.isin(queue, known).all()):
            raise Unreadable("a queue names states that may not be drawn")

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Continue where `state()` was taken."""
        self._generator.set_state(state["generator"])
        self._queue = state["queue"].to(self._indices.device)


def active_subset(constraint: RetentionConstraint, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Half of some training states exchanged for those of largest current KL, and how many each stands for.

    Args:
        constraint: policy against buffer.
        drawn: training states drawn at random, fewer than there are.

    Returns:
        As many states, and of each the number of training states that it stands for.
    """
    train = constraint.train
    divergences = constraint.state_divergences()[train]
    largest = train[divergences.topk(len(drawn) // 2).indices]
    others = drawn[~torch.isin(drawn, largest)][: len(drawn) - len(largest)]
    # Unweighted, the model would take the largest KL for the mean, and a policy inside the budget for one outside.
    share = (len(train) - len(largest)) / len(others)
    importance = torch.cat([torch.ones_like(largest), torch.full_like(others, share, dtype=torch.float64)])
    return torch.cat([largest, others]), importance
