"""A language model of a few hundred thousand parameters that knows generated facts: made here, without a download."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from nsrl.editing.knowledge.facts import NOTES, World
from nsrl.editing.logits import hidden_states, logits_of
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


def tiny_gpt2(
    vocabulary: int, width: int = 128, blocks: int = 4, heads: int = 4, seed: int = 0, inner: int | None = None
) -> Any:
    """An untrained GPT-2 of a given width, in evaluation mode, without dropout.

    Args:
        vocabulary: number of tokens.
        width: of the hidden states.
        blocks: how many.
        heads: of the attention.
        seed: of the weights.
        inner: width of the feed-forward maps; None for four times that of the hidden states.
    """
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
            n_inner=inner,
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
    batch: int = 64,
    spread: float = 1.0,
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
        spread: times the rate that of the embedding is: a name is in one step of many, and then Adam has forgotten it.
        elsewhere: share of the tokens that count besides the last two of a text, its answer and the full stop, drawn
            anew in every step.
        told: called with epoch and mean loss.
    """
    rows = [tokenizer(text)["input_ids"] for text in texts]
    spaced = [tokenizer(" " + text)["input_ids"] for text in texts]
    generator = torch.Generator().manual_seed(seed)
    words = model.get_input_embeddings().weight
    rest = [parameter for parameter in model.parameters() if parameter is not words]
    optimizer = torch.optim.AdamW([{"params": [words]}, {"params": rest}], lr=rate, weight_decay=0.01)
    steps = epochs * -(-len(rows) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [spread * rate, rate], total_steps=steps)
    loss_mean, device = 0.0, next(model.parameters()).device
    for epoch in range(epochs):
        order = torch.randperm(len(rows), generator=generator).tolist()
        partner = torch.randperm(len(rows), generator=generator).tolist()
        loss_mean, count = 0.0, 0
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            sequences = [rows[i] if i % 4 != epoch % 4 else rows[partner[i]] + spaced[i] for i in chosen]
            ids, mask = padded(sequences, tokenizer.pad_token_id, device)
            hidden = hidden_states(model, input_ids=ids, attention_mask=mask, use_cache=False)[:, :-1]
            left = mask.flip(1).cumsum(1).flip(1)[:, 1:]
            drawn = torch.rand(left.shape, generator=generator).to(device) < elsewhere
            told_of = mask[:, 1:].bool() & ((left <= 2) | drawn)
            # The head is most of the work: only the tokens that count go through it.
            loss = F.cross_entropy(logits_of(model, hidden[told_of]).float(), ids[:, 1:][told_of])
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
    epochs: int = 6,
    width: int = 64,
    blocks: int = 2,
    inner: int = 1024,
    told: Callable[[int, float], None] | None = None,
) -> tuple[Any, Any, World]:
    """A tiny GPT-2 that has been taught a generated world; with its tokenizer and that world.

    Args:
        people: in the world, with a fact for each relation.
        seed: of world, weights and order.
        epochs: of training.
        width: of the hidden states.
        blocks: of the model.
        inner: width of its feed-forward maps: a thousand edits need more than four times 64 dimensions.
        told: called with epoch and mean loss.
    """
    world = World.generated(people, seed, NOTES)
    objects = [answer for relation in NOTES.values() for answer in relation.objects]
    tokenizer = word_tokenizer([*world.sentences(), *(" " + text for text in world.sentences()), *objects, " is a"])
    model = tiny_gpt2(len(tokenizer), width, blocks, seed=seed, inner=inner)
    model.train()
    teach(model, tokenizer, world.sentences(), epochs, seed, spread=30.0, elsewhere=0.1, told=told)
    return model.eval(), tokenizer, world
