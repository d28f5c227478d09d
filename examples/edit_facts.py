"""Facts written into a language model inside a KL budget on what is to stay, and taken out again bit by bit.

The model is a tiny GPT-2 that is taught a generated world first; any causal language model of transformers will do.
Needs nsrl[llm].
"""

import os

import torch

from nsrl.editing import Editor, ValueSearch
from nsrl.editing.knowledge import Judge, knowing_gpt2

STEPS = int(os.environ.get("NSRL_EXAMPLE_STEPS", 10_000))
PEOPLE = 80

if __name__ == "__main__":
    model, tokenizer, world = knowing_gpt2(PEOPLE, epochs=max(1, STEPS // 250), inner=256)
    before = [parameter.detach().clone() for parameter in model.parameters()]

    facts = world.facts(8, seed=0, neighbours=2)
    edited = {fact.edit.subject for fact in facts}
    texts = [text for text in world.sentences() if not any(name in text for name in edited)]
    judge = Judge(model, tokenizer, facts, heldout=texts[1::2])
    for method in ("nsrl", "alphaedit_energy"):
        editor = Editor(model, tokenizer, method, layers=[0], search=ValueSearch(prefixes=1), kept=(0.0, 1.0))
        editor.preserve(texts[::2])
        for start in (0, 4):
            editor.apply([fact.edit for fact in facts[start : start + 4]])
        scores, report = judge.measure(model), editor.report()
        print(
            f"{method:<17} written {scores.efficacy_exact:.2f}, neighbours kept {scores.specificity_exact:.2f}, "
            f"KL {report.kl_mean:.4f} nats a token (budget {report.budget}), perplexity x {scores.perplexity:.3f}"
        )
        editor.undo()
        same = all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))
        print(f"{'':<17} taken out again, bit by bit: {same}")
