"""A language model of a few hundred thousand parameters that knows generated facts: made here, without a download."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from nsrl.editing.knowledge.facts import RELATIONS, World
from nsrl.editing.models import require_transformers
from nsrl.editing.tokens import padded


def word_tokenizer(texts: Sequence[str]) -> Any:
    """A tokenizer whose tokens are the words and marks of some texts; a space in front belongs to its word."""
    require_transformers()
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Split(Regex(r" ?\w+|[^\w\s]|\s"), "isolated")
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def tiny_gpt2(vocabulary: int, width: int = 128, blocks: int = 4, heads: int = 4, seed: int = 0) -> Any:
    """An untrained GPT-2 of a given width, in evaluation mode, without dropout."""
    require_transformers()
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=vocabulary,
            n_positions=64,
            n_embd=width,
            n_layer=blocks,
            n_head=heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
        return GPT2LMHeadModel(config).eval()


def teach(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    epochs: int,
    seed: int = 0,
    rate: float = 2e-3,
    batch: int = 128,
    elsewhere: float = 1.0,
    told: Callable[[int, float], None] | None = None,
) -> float:
    """Train a model on texts by Adam with a one-cycle schedule, every fourth behind another text; its last loss.

    Args:
        model: trained in place.
        tokenizer: its own.
        texts: a sentence each.
        epochs: passes over them.
        seed: of their order.
        rate: highest learning rate.
        batch: texts in a step.
        elsewhere: weight of the loss of all tokens but the last two of a text, its answer and the full stop.
        told: called with epoch and mean loss.
    """
    rows = [tokenizer(text)["input_ids"] for text in texts]
    spaced = [tokenizer(" " + text)["input_ids"] for text in texts]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    steps = epochs * -(-len(rows) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    loss_mean, device = 0.0, next(model.parameters()).device
    for epoch in range(epochs):
        order = torch.randperm(len(rows), generator=generator).tolist()
        partner = torch.randperm(len(rows), generator=generator).tolist()
        loss_mean, count = 0.0, 0
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            sequences = [rows[i] if i % 4 != epoch % 4 else rows[partner[i]] + spaced[i] for i in chosen]
            ids, mask = padded(sequences, tokenizer.pad_token_id, device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            left = mask.flip(1).cumsum(1).flip(1)[:, 1:]
            weights = torch.where(left > 2, elsewhere, 1.0) * mask[:, 1:]
            losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            loss = (losses * weights.flatten()).sum() / weights.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_mean, count = loss_mean + loss.item(), count + 1
        loss_mean /= count
        if told is not None:
            told(epoch, loss_mean)
    return loss_mean


def knowing_gpt2(
    people: int = 500,
    seed: int = 0,
    epochs: int = 50,
    width: int = 64,
    blocks: int = 3,
    told: Callable[[int, float], None] | None = None,
) -> tuple[Any, Any, World]:
    """A tiny GPT-2 that has been taught a generated world; with its tokenizer and that world.

    Args:
        people: in the world, with a fact for each relation.
        seed: of world, weights and order.
        epochs: of training.
        width: of the hidden states.
        blocks: of the model.
        told: called with epoch and mean loss.
    """
    world = World.generated(people, seed)
    objects = [answer for relation in RELATIONS.values() for answer in relation.objects]
    tokenizer = word_tokenizer([*world.sentences(), *(" " + text for text in world.sentences()), *objects, " is a"])
    model = tiny_gpt2(len(tokenizer), width, blocks, seed=seed)
    model.train()
    teach(model, tokenizer, world.sentences(), epochs, seed, elsewhere=0.1, told=told)
    return model.eval(), tokenizer, world
