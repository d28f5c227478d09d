"""Values of all edits at once: the answers' slopes, the least update and the search, each against another way to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from nsrl.editing import Edit, Editor, Method, ValueSearch
from nsrl.editing.closed_form import Preservation, factor, least_update
from nsrl.editing.joint.answers import MARGIN, Answers
from nsrl.editing.joint.search import cheapest
from nsrl.editing.tokens import mark
from nsrl.editing.values import mark_edit
from nsrl.errors import NsrlError
from tests.editing.builders import EDITS, TEXTS, draws, model, moments, needs_transformers, tokenizer

needs_transformers()
SEARCH = ValueSearch(steps=1, prefixes=1)
#: The subject last, so that what is written at it is what answers.
HOMES = [Edit("The home of {}", e.subject, to) for e, to in zip(EDITS, (" Rome", " chess", " Oslo"), strict=True)]
LONG = Edit("{} works as a", "Mira Barabyx", " doctor. Leo Castelon works")


def answers(net, layer: int = 1, edits=(*EDITS, LONG)) -> tuple[Answers, Editor]:
    editor = Editor(net, tokenizer(), "nsrl", layers=[layer], search=SEARCH)
    return Answers(net, editor.layers[-1], [mark_edit(tokenizer(), edit) for edit in edits], 0), editor


def edited(layer: int = 1, edits=EDITS, **flags) -> Editor:
    net = model()
    with torch.no_grad():
        net.transformer.ln_f.weight.mul_(20.0)  # untrained, it never prefers a word by a nat
    editor = Editor(net, tokenizer(), "nsrl", layers=[layer], search=SEARCH, **flags)
    editor.preserve(TEXTS)
    for edit in edits:
        editor.apply([edit])
    return editor


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_what_is_missing_is_that_of_the_whole_prompts(kind: str) -> None:
    net = model(kind).double()
    found, _ = answers(net)
    missing, _ = found.shortfall(torch.zeros(4, 32, dtype=torch.float64))
    for edit, told in zip((*EDITS, LONG), missing, strict=True):
        row = mark(tokenizer(), edit.text, edit.subject, edit.target)
        with torch.no_grad():
            logits = net(input_ids=torch.tensor([row.ids])).logits[0]
        short = []
        for place in range(row.target, len(row.ids)):
            chance = float(logits[place - 1].softmax(-1)[row.ids[place]])
            short.append(max(0.0, MARGIN - np.log(chance / (1.0 - chance))) ** 2)
        # float64, two orders of summation; an answer's weights are float32
        assert float(told) == pytest.approx(float(np.mean(short)), rel=1e-6)


def test_the_slope_is_that_of_central_differences() -> None:
    net = model().double()
    found, _ = answers(net)
    generator = torch.Generator().manual_seed(0)
    added, way = (torch.randn(4, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    _, slope = found.shortfall(added)
    step = 1e-5
    ahead, behind = (found.shortfall(added + sign * step * way)[0] for sign in (1.0, -1.0))
    # float64: 40 ulps of squares of 40 over the step, and the square of the step
    expected = (slope * way).sum(1)
    torch.testing.assert_close(
        (ahead - behind) / (2 * step), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max())
    )


@pytest.mark.parametrize("rows", [400, 12])
@pytest.mark.parametrize("count", [1, 7])
def test_the_least_update_is_that_of_the_dense_conditions(rows: int, count: int) -> None:
    """Minimising tr(D A D^T) with D K = delta: its optimality conditions, solved as one dense system."""
    part = moments(rows=rows)
    keys, delta, _ = draws(count)
    preservation = Preservation.of(part, Method(penalty=2.0, relative_ridge=1e-2), 3.0)
    scaled = preservation.root(keys)
    update = preservation.root(least_update(scaled, scaled @ scaled.T, delta))
    dimension = keys.shape[1]
    mean = part.moment / part.count
    metric = 3.0 * mean + 3.0 * 1e-2 * mean.trace() / dimension * torch.eye(dimension, dtype=torch.float64)
    system = torch.zeros(dimension + count, dimension + count, dtype=torch.float64)
    system[:dimension, :dimension] = 2 * metric
    system[:dimension, dimension:], system[dimension:, :dimension] = keys.T, keys
    right = torch.cat([torch.zeros(dimension, delta.shape[1], dtype=torch.float64), delta])
    dense = torch.linalg.solve(system, right)[:dimension].T
    # condition of the metric 1e4 at most, a jitter of 1e-10
    torch.testing.assert_close(update, dense, rtol=1e-6, atol=1e-8 * float(dense.abs().max()))
    price = scaled @ scaled.T
    cost = torch.trace(delta.T @ torch.linalg.solve(price, delta))
    assert float(cost) == pytest.approx(float(torch.trace(update @ metric @ update.T)), rel=1e-6)


def test_two_edits_of_one_subject_have_one_key_and_are_solved_all_the_same() -> None:
    keys = draws(3)[0][[0, 0, 1]]
    root = factor(keys @ keys.T)
    assert bool(torch.isfinite(root).all())
    torch.testing.assert_close(root @ root.T, keys @ keys.T, rtol=1e-6, atol=1e-6)
    with pytest.raises(NsrlError, match="diverged"):
        factor(torch.full((2, 2), torch.nan, dtype=torch.float64))


def test_the_ridge_stays_where_the_penalty_grows() -> None:
    """So that a strong penalty turns to what is preserved, where a ridge that grew with it would give up the edits."""
    method = Method(penalty=2.0, relative_ridge=1e-2, kl_budget=0.01, together=1.0)
    part = moments()
    ridges = [Preservation.of(part, method, penalty).ridge for penalty in (2.0, 2e3)]
    mean = float(part.moment.trace()) / part.count / part.moment.shape[0]
    assert ridges == [pytest.approx(2e-2 * mean)] * 2


def test_the_search_finds_the_minimum_that_scipy_finds() -> None:
    net = model().double()
    found, _ = answers(net, edits=EDITS)
    generator = torch.Generator().manual_seed(3)
    factors = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    price, weight = factors @ factors.T + torch.eye(3, dtype=torch.float64), 3.0
    counted = torch.tensor([True, True, True])

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        delta = torch.tensor(flat).view(3, 32)
        missing, slope = found.shortfall(delta)
        dear = torch.linalg.solve(price, delta)
        value = missing.sum() + weight * (delta * dear).sum()
        return float(value), (slope + 2 * weight * dear).flatten().numpy()

    start = torch.zeros(3, 32, dtype=torch.float64)
    ours = cheapest(found, price, weight, counted, start)
    reached, before = objective(ours.flatten().numpy())[0], objective(start.flatten().numpy())[0]
    best = minimize(objective, start.flatten().numpy(), jac=True, method="L-BFGS-B", options={"maxiter": 500}).fun
    # Rounds end where one gains less than a hundredth; the margin's kinks leave either a little short.
    assert reached <= best + 0.03 * (before - best)


def test_an_answer_that_is_given_asks_for_nothing() -> None:
    """Where the model's own answer is the target with its margin, nothing is written."""
    net = model("llama")
    row = mark_edit(tokenizer(), EDITS[0])
    with torch.no_grad():
        hidden = net.model(input_ids=torch.tensor([row.ids[: row.target]])).last_hidden_state[0, -1]
        size = float((net.lm_head.weight @ hidden).abs().max()) + 10 * MARGIN  # of a hundred words
        net.lm_head.weight[row.ids[row.target]] = size * hidden / hidden.square().sum()
    editor = Editor(net, tokenizer(), "nsrl", layers=[1], search=SEARCH)
    editor.preserve(TEXTS)
    before = editor.layers[0].weight.detach().clone()
    assert editor.apply(EDITS[:1]).missing == 0.0
    assert torch.equal(editor.layers[0].weight, before)


def test_edits_are_given_as_answers_and_the_budget_holds() -> None:
    editor = edited(3, HOMES, kl_budget=0.5)
    report = editor.report()
    assert all(batch.kl is not None and batch.kl <= 0.5 for batch in report.batches)
    assert report.kl_mean == report.batches[-1].kl
    for edit in HOMES:
        row = mark_edit(tokenizer(), edit)
        with torch.no_grad():
            logits = editor.model(input_ids=torch.tensor([row.ids])).logits[0]
        assert int(logits[row.target - 1].argmax()) == row.ids[row.target]


def test_a_later_edit_of_the_same_prompt_replaces_the_earlier_one() -> None:
    again = Edit(HOMES[0].prompt, HOMES[0].subject, " chess")
    editor = edited(3, (HOMES[0], again), kl_budget=0.05)
    row = mark_edit(tokenizer(), again)
    with torch.no_grad():
        logits = editor.model(input_ids=torch.tensor([row.ids])).logits[0, row.target - 1]
    assert int(logits.argmax()) == row.ids[row.target]


def test_a_method_that_cannot_search_together_is_refused() -> None:
    for flags in ({"kl_budget": None}, {"anchor": True}, {"energy": 0.5}, {"relative_ridge": 0.0}):
        with pytest.raises(NsrlError, match="searched for together"):
            Editor(model(), tokenizer(), "nsrl", layers=[1], **flags)
    for weight in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(NsrlError, match="positive and finite"):
            Editor(model(), tokenizer(), "nsrl", layers=[1], together=weight)


def test_a_batch_that_fails_leaves_everything_as_it_was(monkeypatch) -> None:
    from nsrl.editing.joint import search

    editor = edited(edits=EDITS[:1], kl_budget=0.05)
    before = [parameter.detach().clone() for parameter in editor.model.parameters()]
    found = editor.report()

    def fail(*_: object, **__: object) -> None:
        raise NsrlError("no")

    monkeypatch.setattr(search.Answers, "shortfall", fail)
    with pytest.raises(NsrlError, match="no"):
        editor.apply(EDITS[1:])
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(before, editor.model.parameters(), strict=True))
    assert editor.report() == found
    assert editor.apply(EDITS[1:]).missing < 1.0
