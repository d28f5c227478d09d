"""Tiny models and tokenizers, made here."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from nsrl.editing.edits import Edit
from nsrl.editing.knowledge.facts import World
from nsrl.editing.knowledge.tiny import tiny_gpt2, word_tokenizer

TEXTS = World.generated(24, 3).sentences()
EDITS = [
    Edit("{} works as a", "Mira Barabyx", " doctor"),
    Edit("{} lives in the city of", "Leo Castelon", " Rome"),
    Edit("{} likes to play", "Clara Dorinham", " chess"),
]


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
