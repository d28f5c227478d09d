"""A retention file: made once beside a checkpoint, and enforced by whoever fine-tunes the model later.

The model is a tiny GPT-2 that is taught a generated world first; any causal language model of transformers will do.
Needs nsrl[llm].
"""

import copy
import os

import torch

from nsrl.editing import RetentionFile, protect_module
from nsrl.editing.knowledge import knowing_gpt2
from nsrl.editing.tokens import padded

STEPS = int(os.environ.get("NSRL_EXAMPLE_STEPS", 10_000))

if __name__ == "__main__":
    model, tokenizer, world = knowing_gpt2(60, epochs=max(1, STEPS // 250), inner=256)
    old, new = world.sentences()[:120], [" is a home of The city." for _ in range(8)]
    RetentionFile.make(model, old, tokenizer, top_k=16, name="tiny").save("retention.safetensors")

    # Later, by somebody else: the file knows which model it is of.
    kept = RetentionFile.load("retention.safetensors")
    kept.check(model, tokenizer)
    ids, mask = padded([tokenizer(text)["input_ids"] for text in new], tokenizer.pad_token_id, torch.device("cpu"))
    for budget in (float("inf"), 0.02):
        trained = copy.deepcopy(model)
        optimizer = torch.optim.Adam(trained.parameters(), 1e-3)
        guard = protect_module(trained, optimizer, preserve=kept, kl_budget=budget, measure_every=10)
        for _ in range(max(10, STEPS // 100)):
            optimizer.zero_grad()
            logits = trained(input_ids=ids, attention_mask=mask).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
        report = guard.finish()
        print(f"budget {budget}: loss on the new {loss.item():.3f}, KL on the old {report.kl_mean:.4f} nats a token")
