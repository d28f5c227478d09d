"""A causal language model of plain torch, small enough for float64 algebra, and batches for it."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH = 23, 16


class Block(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.norm_in, self.norm_out = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_in(x)).chunk(3, -1)
        scores = (q @ k.mT / WIDTH**0.5).masked_fill(~seen, -1e4)
        x = x + self.dropout(self.out(scores.softmax(-1) @ v))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm_out(x)))))


class TinyLM(nn.Module):
    def __init__(self, seed: int = 0, dropout: float = 0.0, tied: bool = True, blocks: int = 2):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(32, WIDTH)
            self.blocks = nn.ModuleList(Block(dropout) for _ in range(blocks))
            self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        length = input_ids.shape[1]
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        seen = torch.ones(length, length, dtype=torch.bool).tril() & real.bool()[:, None, :]
        x = self.tokens(input_ids) + self.places(torch.arange(length))
        for block in self.blocks:
            x = block(x, seen)
        return SimpleNamespace(logits=self.head(self.norm(x)))


def batches(count: int = 3, size: int = 4, length: int = 7, seed: int = 1, padded: bool = True) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(VOCABULARY, (size, length), generator=generator)
        lengths = torch.randint(2, length + 1, (size,), generator=generator) if padded else torch.full((size,), length)
        found.append({"input_ids": ids, "attention_mask": (torch.arange(length) < lengths[:, None]).long()})
    return found


def loss(model: nn.Module, batch: dict) -> Tensor:
    logits = model(batch["input_ids"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    """The same loop for everybody: step i learns batch i."""
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss(model, batches(1, seed=100 + step % 4, padded=False)[0]).backward()
        optimizer.step()
