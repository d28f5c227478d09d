"""All edits in the weights at once, from the original ones, at the least cost to the preserved text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nsrl.editing.budget_search import smallest_penalty
from nsrl.editing.joint.answers import MARGIN, Answers
from nsrl.editing.joint.search import cheapest
from nsrl.editing.layer_memory import LayerMemory, State
from nsrl.editing.methods import Method
from nsrl.editing.observation import observe
from nsrl.editing.text_budget import TextKL
from nsrl.editing.tokens import Marked

#: Share of the budget that a penalty above the weakest has to use: every try is a search of its own.
SPENT = 0.5
#: Earlier edits that are searched for once more with a batch, beside those that are tied to it: the nearest to it.
NEAREST = 32
#: All are, whenever their number has grown by this share: a sequence then costs a bounded number of passes an edit, but
#: for the batches that the earlier edits leave no room.
GROWTH = 0.1
#: Squared cosine of two edits' keys, in the metric of the price, from which on they are tied: one says what the other
#: can, so that neither is written while the other stays.
TIED = 0.9


class JointWriting:
    """One batch's edits, whose values are searched for together with those of some earlier ones.

    Args:
        model: it holds the original weights.
        memories: of the edited layers, each with the keys of all edits.
        prompts: of all edits, with their answers.
        counted: which of them no later edit replaces.
        before: hidden states at all edits in the original model, shape (n, d), float64.
        new: how many of the last edits are new.
        padding: token to pad with.
        method: with a weight for the search, a KL budget and a ridge.
        last: penalty of the batch before, None for the method's.
    """

    def __init__(
        self,
        model: Any,
        memories: Sequence[LayerMemory],
        prompts: Sequence[Marked],
        counted: Sequence[bool],
        before: Tensor,
        new: int,
        padding: int,
        method: Method,
        last: float | None,
    ):
        assert method.together is not None
        self.model, self.memories, self.prompts, self.padding = model, list(memories), list(prompts), padding
        self.method, self.weight, self.before, self.new = method, method.together, before, new
        self.layer, self._last = self.memories[-1].layer, last
        # The price is in units of a hidden state that moves by its own length, so that no scale of the model matters.
        size = before.square().sum(1).mean() / len(self.memories)
        self._units = [float(size / memory.price(method.penalty).diagonal().mean()) for memory in self.memories]
        self._found = torch.stack([memory.known() for memory in self.memories]).sum(0)
        self._counted = torch.tensor(list(counted), device=before.device)
        self._states: dict[float, list[State]] = {}
        if is_due(len(self.prompts), new):
            self._move(torch.arange(len(self.prompts), device=before.device))
        else:
            self._move(moved_with(self._price(method.penalty if last is None else last), new))
        self._missing = self.answers.shortfall(torch.zeros_like(before[: len(self.moved)]))[0][-new:]

    def write(self, text: TextKL) -> tuple[float, float]:
        """Write at the smallest penalty that keeps the budget; that penalty, and the measured KL.

        Args:
            text: on which the KL is measured.

        Raises:
            NsrlError: as `smallest_penalty`.
        """
        assert self.method.kl_budget is not None
        budget, weakest = self.method.kl_budget, self.method.penalty
        if len(self.moved) < len(self.prompts):
            last = weakest if self._last is None else self._last
            self.solve(last)
            kl = text.measure(self.model)
            if kl <= budget and bool((self._short() <= MARGIN**2).all()):
                return last, kl
            # Before anything is given up, be it an answer or the penalty, the earlier edits make room.
            for memory in self.memories:
                memory.show_original()
            self._move(torch.arange(len(self.prompts), device=self.before.device))
        return smallest_penalty(self.solve, weakest, text, self.model, budget, self._last, spent=SPENT)

    def solve(self, penalty: float) -> None:
        """Search for the values at some penalty, and write them; or go back to where that led before."""
        if penalty in self._states:
            for memory, state in zip(self.memories, self._states[penalty], strict=True):
                memory.set_state(state)
            return
        for memory in self.memories:
            memory.show_original()
        price = self._price(penalty)
        self._found = cheapest(self.answers, price, self.weight, self._counted[self.moved], self._found, self.moved)
        for index, memory in enumerate(self.memories):
            # What the layers in front have brought about by now is not asked for again.
            done = self._hidden() - self.before if index else 0.0
            memory.interpolate((self._found - done) / (len(self.memories) - index), penalty)
        self._states[penalty] = [memory.state() for memory in self.memories]

    def still_missing(self) -> Tensor:
        """What the answers of the new edits miss in the model as it is now, in units of the original, shape (new,)."""
        return (self._short() / self._missing.clamp_min(MARGIN**2)).sqrt()

    def _short(self) -> Tensor:
        nothing = torch.zeros_like(self.before[-self.new :])
        return Answers(self.model, self.layer, self.prompts[-self.new :], self.padding).shortfall(nothing)[0]

    def _move(self, moved: Tensor) -> None:
        chosen = moved.tolist()
        self.moved, self._states = moved, {}
        self.answers = Answers(self.model, self.layer, [self.prompts[number] for number in chosen], self.padding)

    def _price(self, penalty: float) -> Tensor:
        parts = [unit * memory.price(penalty) for unit, memory in zip(self._units, self.memories, strict=True)]
        return torch.stack(parts).sum(0)

    def _hidden(self) -> Tensor:
        return observe(self.model, self.prompts, self.padding, outputs_of=[self.layer.block])[0]


def is_due(count: int, new: int) -> bool:
    """Whether the number of edits has passed a power of 1 + GROWTH with a batch.

    Args:
        count: of all edits.
        new: of these, the last ones.
    """
    earlier = count - new
    return earlier < 1 or int(math.log(count) / math.log1p(GROWTH)) > int(math.log(earlier) / math.log1p(GROWTH))


def moved_with(price: Tensor, new: int) -> Tensor:
    """Numbers of the edits that are moved with a batch, ascending: its own, and those that are tied or near to it.

    Args:
        price: of all edits, shape (n, n).
        new: of these, the last ones.
    """
    earlier = len(price) - new
    size = price.diagonal().clamp_min(torch.finfo(price.dtype).tiny).sqrt()
    near = (price[:earlier, earlier:] / size[:earlier, None] / size[earlier:]).square().amax(1)
    moved = torch.ones(len(price), dtype=torch.bool, device=price.device)
    moved[:earlier] = near >= TIED
    moved[near.topk(min(NEAREST, earlier)).indices] = True
    return moved.nonzero().squeeze(1)
