"""Texts as padded batches of tokens, and where in them the subject and the target lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsrl.errors import NsrlError


@dataclass(frozen=True)
class Marked:
    """A text's tokens with the places that an edit needs.

    Attributes:
        ids: tokens.
        lookup: index of the last token of the subject.
        target: index of the first token of the target; len(ids) where there is none.
    """

    ids: tuple[int, ...]
    lookup: int
    target: int


def check_tokenizer(tokenizer: Any) -> None:
    """Raise NsrlError unless a tokenizer can pad and says where its tokens lie.

    Raises:
        NsrlError: it has no padding token, or is none of the fast ones.
    """
    if tokenizer.pad_token_id is None:
        raise NsrlError(
            "the tokenizer has no padding token, so texts of different lengths make no batch; set one, as in "
            "tokenizer.pad_token = tokenizer.eos_token"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise NsrlError("the tokenizer does not say where in a text its tokens lie; load it with use_fast=True")


def mark(tokenizer: Any, text: str, subject: str, target: str = "") -> Marked:
    """Tokens of a text and its target; the subject's last occurrence before the target counts.

    Raises:
        NsrlError: the subject is not in the text, or the target has no token.
    """
    start = text.rfind(subject)
    if start < 0 or not subject:
        raise NsrlError(f"the subject {subject!r} is not in the prompt {text!r}; put it there, or write {{}} for it")
    whole = tokenizer(text + target, return_offsets_mapping=True)
    spans = whole["offset_mapping"]
    end = start + len(subject)
    # A space that belongs to the token behind it counts to the token.
    inside = [index for index, (a, b) in enumerate(spans) if a < end and b > start and b > a]
    answer = [index for index, (a, b) in enumerate(spans) if b > len(text) and b > a]
    if not inside:
        raise NsrlError(f"the tokenizer makes no token of the subject {subject!r}")
    if target and not answer:
        raise NsrlError(f"the tokenizer makes no token of the target {target!r}")
    first = answer[0] if target else len(whole["input_ids"])
    stop = answer[-1] + 1 if target else first
    if inside[-1] >= first:
        raise NsrlError(
            f"the tokenizer joins the subject {subject!r} with the target {target!r}; put text between them"
        )
    return Marked(tuple(whole["input_ids"][:stop]), inside[-1], first)


def padded(
    sequences: Sequence[Sequence[int]], padding: int, device: torch.device, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Tokens (N, T) and the mask (N, T) of those that are none of the padding."""
    width = max(map(len, sequences), default=0)
    ids = torch.full((len(sequences), width), padding, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[row, place] = torch.tensor(sequence, dtype=torch.long)
        mask[row, place] = 1
    return ids.to(device), mask.to(device)


def longest(model: Any, length: int) -> int:
    """Tokens of a piece of text: `length`, or as many as the model has positions for."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return length if positions is None else min(length, int(positions))


def text_batches(
    tokenizer: Any, texts: Sequence[str], tokens: int, length: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Texts cut to a length, as batches of about so many tokens, padded on the right, in their order.

    Args:
        tokenizer: of the model.
        texts: at least one token each.
        tokens: in a batch, at most, but for a single text.
        length: tokens of a text at most; the rest makes further rows.
        device: where the batches go.

    Raises:
        NsrlError: there are no texts, or one is shorter than a token.
    """
    if not texts:
        raise NsrlError("there are no texts; give those whose behaviour is to stay")
    rows: list[list[int]] = []
    for number, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"] if text else []
        if not ids:
            raise NsrlError(f"text {number} ({text!r}) is shorter than a token; leave it out")
        rows += [ids[start : start + length] for start in range(0, len(ids), length)]
    batches, held = [], [rows[0]]
    for row in rows[1:]:
        if (len(held) + 1) * max(len(row), *map(len, held)) > tokens:
            batches.append(held)
            held = []
        held.append(row)
    return [padded(batch, tokenizer.pad_token_id, device) for batch in [*batches, held]]
