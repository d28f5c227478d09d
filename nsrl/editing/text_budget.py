"""The KL of preserved text to the unedited model, measured: what a budget is kept by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nsrl.editing.logits import hidden_states, logits_of
from nsrl.projection.metrics import Categorical


class TextKL:
    """Mean KL(unedited || now) of the next token, over the tokens of some text, in nats.

    The reference's logits are held in float16 less their maximum: 2 bytes a token and a word. What that rounds off is
    part of the reference, which the unedited model is then measured against like any other: 1e-7 nats or so.

    Args:
        model: the language model, unedited.
        batches: tokens (N, T) and masks (N, T).
        limit: tokens to be measured, at most; the first ones.
    """

    def __init__(self, model: Any, batches: Sequence[tuple[Tensor, Tensor]], limit: int):
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []
        self.tokens = 0
        for ids, mask in batches:
            room = limit - self.tokens
            if room <= 0:
                break
            mask = mask * (mask.flatten().cumsum(0).view_as(mask) <= room)
            rows = mask.any(1)
            ids, mask = ids[rows], mask[rows]
            with torch.no_grad():
                logits = self._logits(model, ids, mask)
            self._batches.append((ids, mask, (logits - logits.amax(-1, keepdim=True)).half()))
            self.tokens += int(mask.sum())

    def measure(self, model: Any) -> float:
        """KL of the model as it is now, mean over the tokens."""
        total = 0.0
        with torch.no_grad():
            for ids, mask, reference in self._batches:
                logits = self._logits(model, ids, mask)
                total += float(Categorical((logits.shape[1],)).divergence(reference.float(), logits).sum())
        return total / max(self.tokens, 1)

    def nbytes(self) -> int:
        """Memory of the reference, in bytes."""
        return sum(t.numel() * t.element_size() for batch in self._batches for t in batch)

    def _logits(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = hidden_states(model, input_ids=ids, attention_mask=mask, use_cache=False)
        return logits_of(model, hidden[mask.bool()]).float()
