"""All edits written anew, from the original weights, at the least cost to the preserved text."""

from __future__ import annotations

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


class JointWriting:
    """Edits whose values are searched for together, with what the layers know of them.

    Args:
        model: it holds the original weights.
        memories: of the edited layers, each with the keys of all edits.
        prompts: of all edits, with their answers.
        counted: which of them no later edit replaces.
        padding: token to pad with.
        method: with a weight for the search, a KL budget and a ridge.
    """

    def __init__(
        self,
        model: Any,
        memories: Sequence[LayerMemory],
        prompts: Sequence[Marked],
        counted: Sequence[bool],
        padding: int,
        method: Method,
    ):
        assert method.together is not None
        self.model, self.memories, self.prompts, self.padding = model, list(memories), list(prompts), padding
        self.method, self.weight = method, method.together
        self.last = self.memories[-1].layer
        self.answers = Answers(model, self.last, self.prompts, padding)
        self.before = self._hidden()
        self.counted = torch.tensor(list(counted), device=self.before.device)
        self.missing = self.answers.shortfall(torch.zeros_like(self.before))[0]
        # The price is in units of a hidden state that moves by its own length, so that no scale of the model matters.
        size = self.before.square().sum(1).mean() / len(self.memories)
        self._units = [float(size / memory.leverage(method.penalty)) for memory in self.memories]
        self._found = torch.stack([memory.known() for memory in self.memories]).sum(0)
        self._states: dict[float, list[State]] = {}

    def write(self, text: TextKL, last: float | None) -> tuple[float, float]:
        """Write at the smallest penalty that keeps the budget; that penalty, and the measured KL.

        Args:
            text: on which the KL is measured.
            last: penalty of the batch before, None for the method's.

        Raises:
            NsrlError: as `smallest_penalty`.
        """
        assert self.method.kl_budget is not None
        return smallest_penalty(
            self.solve, self.method.penalty, text, self.model, self.method.kl_budget, last, spent=SPENT
        )

    def solve(self, penalty: float) -> None:
        """Search for the values at some penalty, and write them; or go back to where that led before."""
        if penalty in self._states:
            for memory, state in zip(self.memories, self._states[penalty], strict=True):
                memory.set_state(state)
            return
        for memory in self.memories:
            memory.show_original()
        parts = [unit * memory.price(penalty) for unit, memory in zip(self._units, self.memories, strict=True)]
        self._found = cheapest(self.answers, torch.stack(parts).sum(0), self.weight, self.counted, self._found)
        for index, memory in enumerate(self.memories):
            # What the layers in front have brought about by now is not asked for again.
            done = self._hidden() - self.before if index else 0.0
            memory.interpolate((self._found - done) / (len(self.memories) - index), penalty)
        self._states[penalty] = [memory.state() for memory in self.memories]

    def still_missing(self, first: int) -> Tensor:
        """What the answers from `first` on miss in the model as it is now, in units of before, shape (n,)."""
        now = Answers(self.model, self.last, self.prompts[first:], self.padding)
        missing = now.shortfall(torch.zeros_like(self.before[first:]))[0]
        return (missing / self.missing[first:].clamp_min(MARGIN**2)).sqrt()

    def _hidden(self) -> Tensor:
        return observe(self.model, self.prompts, self.padding, outputs_of=[self.last.block])[0]
