"""What edits did: efficacy, generalisation, specificity, locality, knowledge and perplexity, by the unedited model.

Each rate comes twice: as a comparison of probabilities, as papers report it, and as exact match of the most likely
tokens, which is far harsher (the same run may have 68 and 16 %).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nsrl.editing.knowledge.facts import Fact
from nsrl.editing.logits import hidden_states, logits_of
from nsrl.editing.tokens import longest, padded, text_batches
from nsrl.errors import NsrlError

#: Tokens that run at once.
TOKENS, LENGTH = 2048, 128
Question = tuple[str, str]


@dataclass(frozen=True)
class Answers:
    """What a model says to prompts, of which an answer is expected.

    Attributes:
        likelihood: log-probability of the answer, mean over its tokens, shape (n,).
        exact: whether every token of the answer is the most likely one, shape (n,), bool.
        top: most likely first token, shape (n,).
    """

    likelihood: Tensor
    exact: Tensor
    top: Tensor


def ask(model: Any, tokenizer: Any, questions: Sequence[Question]) -> Answers:
    """Answers to (prompt, answer) pairs.

    Raises:
        NsrlError: an answer without a token.
    """
    device = next(model.parameters()).device
    rows = []
    for prompt, answer in questions:
        whole = tokenizer(prompt + answer, return_offsets_mapping=True)
        spans = whole["offset_mapping"]
        places = [index for index, (a, b) in enumerate(spans) if b > len(prompt) and b > a and index > 0]
        if not places:
            raise NsrlError(f"the tokenizer makes no token of the answer {answer!r} behind {prompt!r}")
        rows.append((whole["input_ids"][: places[-1] + 1], places[0]))
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
    likelihood, exact = torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.bool)
    top = torch.zeros(len(rows), dtype=torch.long)
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * len(rows[order[stop]][0]) <= TOKENS:
            stop += 1
        chosen = order[start:stop]
        ids, mask = padded([rows[index][0] for index in chosen], tokenizer.pad_token_id, device)
        firsts = torch.tensor([rows[index][1] for index in chosen], device=device)
        place = torch.arange(ids.shape[1], device=device)
        asked = (place >= firsts.unsqueeze(1)) & mask.bool()
        with torch.no_grad():
            hidden = hidden_states(model, input_ids=ids, attention_mask=mask, use_cache=False)
            logits = logits_of(model, hidden[:, :-1][asked[:, 1:]]).float()
        labels, owners = ids[asked], torch.arange(len(chosen), device=device).unsqueeze(1).expand_as(ids)[asked]
        told = logits.log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)
        counts = asked.sum(1)
        index = torch.tensor(chosen)
        likelihood[index] = (torch.zeros(len(chosen), device=device).index_add(0, owners, told) / counts).cpu()
        right = (logits.argmax(1) == labels).long()
        exact[index] = (torch.zeros_like(counts).index_add(0, owners, right) == counts).cpu()
        top[index] = logits.argmax(1)[counts.cumsum(0) - counts].cpu()
        start = stop
    return Answers(likelihood, exact, top)


def perplexity(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Of texts, per token that has one in front.

    Raises:
        NsrlError: no texts, or one shorter than a token.
    """
    device, total, count = next(model.parameters()).device, 0.0, 0
    for ids, mask in text_batches(tokenizer, texts, TOKENS, longest(model, LENGTH), device):
        with torch.no_grad():
            hidden = hidden_states(model, input_ids=ids, attention_mask=mask, use_cache=False)[:, :-1]
            told = logits_of(model, hidden[mask[:, 1:].bool()]).float().log_softmax(-1)
        labels = ids[:, 1:][mask[:, 1:].bool()]
        total -= float(told.gather(1, labels.unsqueeze(1)).double().sum())
        count += len(labels)
    return math.exp(min(total / max(count, 1), 700.0))


@dataclass(frozen=True)
class Scores:
    """Rates from 0 to 1; NaN where there is nothing to judge by.

    Attributes:
        edits: how many are judged.
        efficacy: P(new) > P(old) on the edited prompt.
        efficacy_exact: the new target is the most likely continuation.
        generalisation: P(new) > P(old) on paraphrases.
        generalisation_exact: exact match on paraphrases.
        specificity: P(old) > P(new) on neighbours that the unedited model knows.
        specificity_exact: exact match on them.
        locality: neighbours whose most likely token is the unedited model's, known or not.
        knowledge: other facts that the unedited model knows, still matched exactly.
        perplexity: of held-out text, over the unedited model's.
    """

    edits: int
    efficacy: float
    efficacy_exact: float
    generalisation: float
    generalisation_exact: float
    specificity: float
    specificity_exact: float
    locality: float
    knowledge: float
    perplexity: float

    def as_dict(self) -> dict[str, float]:
        """By name."""
        return asdict(self)


class Judge:
    """Judges edits against the model as it is when the judge is made.

    Args:
        model: unedited.
        tokenizer: its own.
        facts: that will be edited, in that order.
        knowledge: (prompt, answer) pairs; only those that the unedited model answers exactly count.
        heldout: texts of the perplexity.

    Attributes:
        known: those of `knowledge` that count.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        facts: Sequence[Fact],
        knowledge: Sequence[Question] = (),
        heldout: Sequence[str] = (),
    ):
        self.tokenizer, self.facts, self.heldout = tokenizer, list(facts), list(heldout)
        questions = list(knowledge)
        told = ask(model, tokenizer, questions).exact.tolist() if questions else []
        self.known = [question for question, right in zip(questions, told, strict=True) if right]
        self._neighbours = [pair for fact in self.facts for pair in fact.neighbours]
        self._before = ask(model, tokenizer, self._neighbours) if self._neighbours else None
        self._perplexity = perplexity(model, tokenizer, self.heldout) if self.heldout else math.nan

    def measure(self, model: Any, first: int = 0, stop: int | None = None) -> Scores:
        """Scores of the facts from `first` on up to `stop`; old knowledge and perplexity are always whole.

        Raises:
            NsrlError: there are neither facts nor knowledge.
        """
        facts = self.facts[first:stop]
        start = sum(len(fact.neighbours) for fact in self.facts[:first])
        near = slice(start, start + sum(len(fact.neighbours) for fact in facts))
        edited = [(fact.edit.text, fact) for fact in facts]
        phrased = [(prompt, fact) for fact in facts for prompt in fact.paraphrases]
        beside = [(prompt, fact) for fact in facts for prompt, _ in fact.neighbours]
        questions: list[Question] = []
        for prompt, fact in (*edited, *phrased):
            questions += [(prompt, fact.edit.target), (prompt, fact.truth)]
        for (prompt, fact), (_, answer) in zip(beside, self._neighbours[near], strict=True):
            questions += [(prompt, answer), (prompt, fact.edit.target)]
        told = ask(model, self.tokenizer, [*questions, *self.known]) if questions or self.known else None
        if told is None:
            raise NsrlError("there is nothing to judge; give facts or knowledge")
        pairs = told.likelihood[: len(questions)].view(-1, 2)
        first_wins, exact = pairs[:, 0] > pairs[:, 1], told.exact[: len(questions) : 2]
        ends = len(edited), len(edited) + len(phrased)
        knows = self._before.exact[near] if self._before is not None else torch.zeros(0, dtype=torch.bool)
        same = told.top[: len(questions) : 2][ends[1] :]
        before = self._before.top[near] if self._before is not None else same
        return Scores(
            edits=len(facts),
            efficacy=_rate(first_wins[: ends[0]]),
            efficacy_exact=_rate(exact[: ends[0]]),
            generalisation=_rate(first_wins[ends[0] : ends[1]]),
            generalisation_exact=_rate(exact[ends[0] : ends[1]]),
            specificity=_rate(first_wins[ends[1] :][knows]),
            specificity_exact=_rate(exact[ends[1] :][knows]),
            locality=_rate(same == before),
            knowledge=_rate(told.exact[len(questions) :]),
            perplexity=perplexity(model, self.tokenizer, self.heldout) / self._perplexity if self.heldout else math.nan,
        )


def _rate(hits: Tensor) -> float:
    return float(hits.double().mean()) if hits.numel() else math.nan
