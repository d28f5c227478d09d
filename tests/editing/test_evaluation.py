"""Scores against the model's own logits, one prompt at a time."""

from __future__ import annotations

import math

import pytest
import torch

from nsrl.editing.knowledge.evaluation import Judge, ask, perplexity
from nsrl.editing.knowledge.facts import RELATIONS, World, subjects
from nsrl.errors import NsrlError
from tests.editing.builders import TEXTS, model, needs_transformers, tokenizer

needs_transformers()


def chances(net, text: str) -> tuple[list[int], torch.Tensor]:
    ids = tokenizer()(text)["input_ids"]
    with torch.no_grad():
        return ids, net(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def test_answers_are_those_of_single_prompts() -> None:
    net = model()
    questions = World.generated(24, 3).questions()
    told = ask(net, tokenizer(), questions)
    for row in range(0, len(questions), 7):
        prompt, answer = questions[row]
        ids, logs = chances(net, prompt + answer)
        assert float(told.likelihood[row]) == pytest.approx(float(logs[-2, ids[-1]]), abs=1e-4)
        assert int(told.top[row]) == int(logs[-2].argmax())
        assert bool(told.exact[row]) == (int(logs[-2].argmax()) == ids[-1])


def test_perplexity_is_that_of_single_texts() -> None:
    net, total, count = model(), 0.0, 0
    for text in TEXTS[:20]:
        ids, logs = chances(net, text)
        total -= sum(float(logs[place, ids[place + 1]]) for place in range(len(ids) - 1))
        count += len(ids) - 1
    assert perplexity(net, tokenizer(), TEXTS[:20]) == pytest.approx(math.exp(total / count), rel=1e-4)


def test_an_unedited_model_is_perfectly_local() -> None:
    net = model()
    world = World.generated(24, 3)
    judge = Judge(net, tokenizer(), world.facts(10, 0), world.questions(), TEXTS[:20])
    scores = judge.measure(net)
    assert scores.locality == 1.0 and scores.perplexity == pytest.approx(1.0)
    assert scores.knowledge == 1.0 or (math.isnan(scores.knowledge) and not judge.known)
    assert judge.measure(net, 2, 5).edits == 3


def test_a_model_that_says_one_thing_only() -> None:
    net = model()
    fact = World.generated(24, 3).facts(1, 0)[0]
    judge = Judge(net, tokenizer(), [fact])
    with torch.no_grad():
        net.lm_head.weight.zero_()
        token = tokenizer()(fact.edit.target)["input_ids"][0]
        net.transformer.ln_f.bias.fill_(1.0)
        net.lm_head.weight[token] = 100.0
    scores = judge.measure(net)
    assert scores.efficacy_exact == scores.generalisation_exact == scores.efficacy == scores.generalisation == 1.0


def test_facts_are_what_they_say() -> None:
    world = World.generated(80, 0)
    facts = world.facts(60, 1)
    edited = {fact.edit.subject for fact in facts}
    for fact in facts:
        relation = next(r for r in RELATIONS.values() if r.templates[0] == fact.edit.prompt)
        assert fact.edit.target in relation.objects and fact.edit.target != fact.truth
        assert all(answer == fact.truth for _, answer in fact.neighbours)
        assert not any(name in prompt for prompt, _ in fact.neighbours for name in edited)
    assert len({fact.edit.text for fact in facts}) == 60
    assert facts == World.generated(80, 0).facts(60, 1)
    with pytest.raises(NsrlError, match="ask for fewer"):
        world.facts(10**4, 1)
    with pytest.raises(NsrlError, match="different subjects"):
        subjects(10**6, 0)
