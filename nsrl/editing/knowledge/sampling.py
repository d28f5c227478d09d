"""Text from the model itself: what is to be preserved where there is no corpus at hand."""

from __future__ import annotations

from typing import Any

import torch

from nsrl.editing.logits import hidden_states, logits_of


def sample_texts(model: Any, tokenizer: Any, count: int, tokens: int, seed: int = 0, start: str = "") -> list[str]:
    """Texts that a model writes at temperature 1, drawn with a seed, in the order of drawing.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its own.
        count: how many.
        tokens: of each.
        seed: of the draws.
        start: how each begins; without it a first token is drawn at random, so that no two begin alike.
    """
    from transformers import DynamicCache

    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    size = int(model.config.vocab_size)
    if start:
        ids = torch.tensor([tokenizer(start)["input_ids"]] * count)
    else:
        special = set(tokenizer.all_special_ids)
        usable = torch.tensor([index for index in range(size) if index not in special])
        ids = usable[torch.randint(len(usable), (count, 1), generator=generator)]
    cache, step = DynamicCache(), ids
    with torch.no_grad():
        for _ in range(tokens - ids.shape[1]):
            hidden = hidden_states(model, input_ids=step.to(device), cache=cache, use_cache=True)
            chances = logits_of(model, hidden[:, -1]).float().softmax(-1).cpu()
            step = torch.multinomial(chances, 1, generator=generator)
            ids = torch.cat([ids, step], 1)
    texts = (tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids)
    return [text for text in texts if text]
