"""Prompts in two parts: what stands in front of the subject's last token runs once, the rest as often as is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from nsrl.editing.logits import hidden_states
from nsrl.editing.tokens import Marked, padded


@dataclass
class Rows:
    """Prompts of some edits, cut in front of the subject's last token: what ran once, and what runs at every step.

    Attributes:
        edit: to which edit a prompt belongs, shape (N,).
        head_mask: tokens in front, padded on the left, shape (N, H).
        ids: the subject's last token and what follows, shape (N, T).
        mask: of these, shape (N, T).
        positions: of these, shape (N, T).
        labels: token that should follow, -1 where it does not matter, shape (N, T).
        weights: of these in their edit's mean, shape (N, T).
        essence: prompts that have no answer, shape (N,).
        past: keys and values of the tokens in front, a pair a block; their ids and mask before they have run.
    """

    edit: Tensor
    head_mask: Tensor
    ids: Tensor
    mask: Tensor
    positions: Tensor
    labels: Tensor
    weights: Tensor
    essence: Tensor
    past: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def of(self, active: Tensor) -> Rows:
        """The rows of the edits that a mask (n,) chooses."""
        rows = active[self.edit]
        kept = {entry.name: getattr(self, entry.name)[rows] for entry in fields(self) if entry.name != "past"}
        return replace(self, **kept, past=[(k[rows], v[rows]) for k, v in self.past])


def rows_of(groups: Sequence[Sequence[Marked]], essences: Sequence[Marked], padding: int, device: torch.device) -> Rows:
    """Prompts of edits, several each, and one without an answer for each; the tokens in front have not run yet.

    Args:
        groups: prompts of every edit.
        essences: a prompt for each edit, or none.
        padding: token to pad with.
        device: of the tensors.
    """
    marked = [row for group in groups for row in group] + list(essences)
    owners = [index for index, group in enumerate(groups) for _ in group] + list(range(len(essences)))
    heads, head_mask = padded([row.ids[: row.lookup] for row in marked], padding, device, left=True)
    tails, mask = padded([row.ids[row.lookup :] for row in marked], padding, device)
    labels, weights = torch.full_like(tails, -1), torch.zeros(tails.shape, device=device)
    for index, row in enumerate(marked):
        answer = row.ids[row.target :]
        place = slice(row.target - row.lookup - 1, len(row.ids) - row.lookup - 1)
        labels[index, place] = torch.tensor(answer, dtype=torch.long, device=device)
        weights[index, place] = 1.0 / (max(1, len(answer)) * len(groups[owners[index]]))
    places = head_mask.sum(1, keepdim=True) + torch.arange(tails.shape[1], device=device)
    essence = torch.arange(len(marked), device=device) >= len(marked) - len(essences)
    rows = Rows(torch.tensor(owners, device=device), head_mask, tails, mask, places, labels, weights, essence)
    rows.past = [] if not heads.shape[1] else [(heads, head_mask)]
    return rows


def run_heads(model: Any, rows: Rows) -> None:
    """Put keys and values of the tokens in front in the place of their ids."""
    if not rows.past:
        return
    from transformers import DynamicCache

    (ids, mask), cache = rows.past[0], DynamicCache()
    places = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        hidden_states(model, input_ids=ids, attention_mask=mask, position_ids=places, cache=cache, use_cache=True)
    layers: Any = cache.layers  # typed as any kind of cache; a DynamicCache holds keys and values
    rows.past = [(layer.keys, layer.values) for layer in layers]


def run_tails(model: Any, rows: Rows) -> Tensor:
    """Normalised hidden states of the tails, shape (N, T, d)."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for index, (keys, values) in enumerate(rows.past):
        cache.update(keys, values, index)
    mask = torch.cat([rows.head_mask, rows.mask], 1)
    return hidden_states(
        model,
        input_ids=rows.ids,
        attention_mask=mask,
        position_ids=rows.positions,
        cache=cache,
        use_cache=True,
    )
