"""Tiny models and tokenizers, made here."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from nsrl.editing.edits import Edit
from nsrl.editing.knowledge.facts import World
from nsrl.editing.knowledge.tiny import tiny_gpt2, word_tokenizer
from nsrl.projection.constraints.feature_moments import LayerMoments, Subspace
from nsrl.projection.jacobians.columns import LayerColumns

TEXTS = World.generated(24, 3).sentences()
EDITS = [
    Edit("{} works as a", "Mira Barabyx", " doctor"),
    Edit("{} lives in the city of", "Leo Castelon", " Rome"),
    Edit("{} likes to play", "Clara Dorinham", " chess"),
]
#: Width of keys, and of what they are mapped to.
WIDTH, OUT = 24, 10


def needs_transformers() -> None:
    """Skip where the extra is not installed."""
    for package in ("transformers", "safetensors", "tokenizers"):
        pytest.importorskip(package, reason=f"{package} is not installed; nsrl[llm] brings it")


@lru_cache(maxsize=1)
def tokenizer():
    return word_tokenizer(
        [*TEXTS, *(edit.text + edit.target for edit in EDITS), *(" " + text for text in TEXTS), " is a"]
    )


def model(kind: str = "gpt2"):
    """An untrained model with weights large enough that its outputs differ from token to token."""
    if kind == "gpt2":
        made = tiny_gpt2(len(tokenizer()), width=32, blocks=4, heads=2)
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            made = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=len(tokenizer()),
                    hidden_size=32,
                    intermediate_size=48,
                    num_hidden_layers=4,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    max_position_embeddings=64,
                    pad_token_id=0,
                )
            ).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 2 and "wte" not in name and "embed" not in name:
                parameter.mul_(8.0)
    return made


def moments(scale: float = 1.0, rows: int = 400, seed: int = 0) -> LayerMoments:
    """Of keys whose variances fall over four orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    shape = scale * torch.logspace(0.0, -2.0, WIDTH, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))[0]
    keys = (torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64) * shape) @ basis.T
    columns = LayerColumns("layer", OUT, (0, OUT * WIDTH), None, False)
    part = LayerMoments(columns, Subspace.empty(WIDTH, keys))
    part.add(keys)
    return part


def draws(count: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, size, generator=generator, dtype=torch.float64) for size in (WIDTH, OUT, WIDTH))
