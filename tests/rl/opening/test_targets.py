"""How open a distribution is, against SciPy and torch.distributions, and what makes it opener."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy
from torch import Tensor
from torch.distributions import Bernoulli, Categorical

from nsrl.rl.opening.targets import HALVINGS, CoinTargets, MeanTargets, SoftmaxTargets, SpreadTargets, Targets
from nsrl.rl.policies.distributions import with_masks
from tests.tolerances import assert_near, relative

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
SCALES = st.floats(0.0, 1e3)
SEEDS = st.integers(0, 10**6)
SHARES = st.floats(0.05, 0.99)


def draw_logits(size: int, scale: float, seed: int, states: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(states, size, generator=generator, dtype=torch.float64)


def draw_masks(sizes: tuple[int, ...], seed: int, states: int = 7) -> Tensor:
    """At least one valid action a head, not always the same."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(states, sum(sizes), generator=generator) < 0.5
    for head, size in zip(masks.split(list(sizes), 1), sizes, strict=True):
        head[torch.arange(states), torch.randint(size, (states,), generator=generator)] = True
    return masks


@given(sizes=SIZES, scale=SCALES, seed=SEEDS)
def test_the_share_of_categories_is_scipys_entropy_over_the_largest(sizes: tuple[int, ...], scale: float, seed: int):
    logits = draw_logits(sum(sizes), scale, seed)
    found = SoftmaxTargets(sizes).share(logits, None)
    heads = [
        head.softmax(1).numpy() for head, size in zip(logits.split(list(sizes), 1), sizes, strict=True) if size > 1
    ]
    expected = [entropy(head, axis=1) / math.log(head.shape[1]) for head in heads] or [np.ones(len(logits))]
    # p log p of a logit is off by its rounding: u times the size of the logits
    bound = relative(torch.float64, terms=max(sizes)) * max(scale, 1.0) * 8
    np.testing.assert_allclose(found.numpy(), np.mean(expected, 0), rtol=0, atol=bound)


@given(sizes=SIZES, scale=SCALES, seed=SEEDS)
def test_invalid_actions_count_neither_as_tried_nor_as_to_be_tried(sizes: tuple[int, ...], scale: float, seed: int):
    logits, valid = draw_logits(sum(sizes), scale, seed), draw_masks(sizes, seed + 1)
    found = SoftmaxTargets(sizes).share(logits, valid)
    assert bool(((found >= 0.0) & (found <= 1.0)).all())
    for state, share in enumerate(found):
        shares = []
        rows = zip(logits[state].split(list(sizes)), valid[state].split(list(sizes)), strict=True)
        for row, mask in rows:
            if mask.sum() > 1:
                shares.append(float(Categorical(logits=row[mask]).entropy()) / math.log(int(mask.sum())))
        expected = np.mean(shares) if shares else 1.0
        assert float(share) == pytest.approx(expected, abs=relative(torch.float64, 5) * max(scale, 1.0) * 8)


@given(size=st.integers(1, 4), scale=SCALES, seed=SEEDS)
def test_the_share_of_coins_is_their_entropy_in_bits(size: int, scale: float, seed: int) -> None:
    logits = draw_logits(size, scale, seed)
    expected = Bernoulli(logits=logits).entropy().mean(1) / math.log(2.0)
    assert_near(CoinTargets().share(logits, None), expected, terms=size, scale=max(scale, 1.0))


def openable(targets: Targets, sizes: tuple[int, ...], logits: Tensor, valid: Tensor | None, share: float) -> float:
    """How far the mean share may lie from the wanted one when the temperature is known to so many halvings.

    With z the lead of the likeliest action, d share / d (1 / temperature) is at most the sum over actions of
    z (t z exp(-t z)) / log n, and x exp(-x) is at most 1 / e.
    """
    lead = 2.0 * float(logits.abs().max())
    return 2.0**-HALVINGS * max(sizes) * lead / (math.e * math.log(2.0)) + relative(torch.float64, 5) * (1.0 + lead)


@given(sizes=SIZES, gap=st.floats(0.1, 100.0), share=SHARES, seed=SEEDS, masked=st.booleans())
def test_without_the_excess_categories_have_the_wanted_share_and_their_order(
    sizes: tuple[int, ...], gap: float, share: float, seed: int, masked: bool
) -> None:
    targets, logits = SoftmaxTargets(sizes), draw_logits(sum(sizes), gap, seed)
    valid = draw_masks(sizes, seed + 1) if masked else None
    excess = targets.excess(logits, share, valid)
    opened = logits - excess
    before, after = float(targets.share(logits, valid).mean()), float(targets.share(opened, valid).mean())
    slack = openable(targets, sizes, logits, valid, share)
    assert after == pytest.approx(max(before, share), abs=slack)
    if valid is not None:
        assert not excess[~valid].any()
        logits, opened = with_masks(logits, valid), with_masks(opened, valid)
    for old, new in zip(logits.split(list(sizes), 1), opened.split(list(sizes), 1), strict=True):
        # a lead is divided by the temperature: none turns round by more than rounding
        leads = (old.unsqueeze(1) - old.unsqueeze(2)) * (new.unsqueeze(1) - new.unsqueeze(2))
        assert float(leads.min()) >= -relative(torch.float64, 5) * gap**2 * 100


@given(size=st.integers(1, 4), gap=st.floats(0.1, 100.0), share=SHARES, seed=SEEDS)
def test_without_the_excess_coins_have_the_wanted_share(size: int, gap: float, share: float, seed: int) -> None:
    targets, logits = CoinTargets(), draw_logits(size, gap, seed)
    opened = logits - targets.excess(logits, share, None)
    before, after = float(targets.share(logits, None).mean()), float(targets.share(opened, None).mean())
    assert after == pytest.approx(max(before, share), abs=openable(targets, (2,), logits, None, share))
    assert bool((opened * logits >= 0.0).all())


@given(sizes=SIZES, seed=SEEDS, masked=st.booleans())
def test_the_root_is_that_of_the_hessian_at_the_uniform_distribution(
    sizes: tuple[int, ...], seed: int, masked: bool
) -> None:
    targets, logits = SoftmaxTargets(sizes), draw_logits(sum(sizes), 3.0, seed)
    valid = draw_masks(sizes, seed + 1) if masked else torch.ones_like(logits, dtype=torch.bool)
    root = targets.root(logits, valid if masked else None)
    columns = [root.apply(unit.expand_as(logits)) for unit in torch.eye(sum(sizes), dtype=logits.dtype)]
    rows = torch.stack(columns, 2)
    for state, mask in enumerate(valid):
        blocks = []
        for head in mask.split(list(sizes)):
            p = head.to(logits) / head.sum()
            blocks.append(torch.diag(p) - torch.outer(p, p))
        assert_near(rows[state].T @ rows[state], torch.block_diag(*blocks), terms=max(sizes))


def test_a_spread_is_open_where_it_is_wide_and_only_its_logs_are_asked() -> None:
    wide = torch.tensor([0.0, -1.0], dtype=torch.float64)
    targets = SpreadTargets(wide)
    means = torch.randn(3, 2, dtype=torch.float64)
    logs = torch.tensor([[0.0, -1.0], [2.0, -1.0 + math.log(0.5)], [-40.0, -40.0]], dtype=torch.float64)
    outputs = torch.cat([means, logs], 1)
    expected = torch.tensor([1.0, 0.75, 0.5 * (math.exp(-40.0) + math.exp(-39.0))], dtype=torch.float64)
    assert_near(targets.share(outputs, None), expected, terms=2)
    excess = targets.excess(outputs, 0.9, None)
    seen = targets.root(outputs, None).apply(outputs)
    assert_near(seen, torch.cat([torch.zeros_like(means), math.sqrt(2.0) * logs], 1), scale=60.0)
    opened = outputs - excess
    assert_near(targets.share(opened, None), torch.ones(3, dtype=torch.float64))
    assert torch.equal(opened[:, :2], means) and opened[1, 2] == 2.0


@pytest.mark.parametrize("bounded", [True, False])
def test_means_are_open_where_they_are_inside_the_action_space(bounded: bool) -> None:
    centre, half = torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.5 if bounded else torch.inf])
    targets = MeanTargets(centre, half)
    outputs = torch.tensor([[0.0, 0.4], [3.5, 0.4], [-9.0, -7.0], [3.0, 0.5]])
    inside = [1.0, 0.5, 0.0, 1.0] if bounded else [1.0, 0.5, 0.5, 1.0]
    assert targets.share(outputs, None).tolist() == inside
    left = outputs - targets.excess(outputs, 0.9, None)
    # what is outside comes half-way to the bound on its side, what is inside and what has no bounds stays
    expected = torch.tensor([[0.0, 0.4], [2.0, 0.4], [0.0, -0.25 if bounded else -7.0], [3.0, 0.5]])
    torch.testing.assert_close(left, expected, rtol=0.0, atol=1e-6)
    assert targets.share(left, None).tolist() == [1.0] * 4
    root = targets.root(outputs, None).apply(outputs)
    torch.testing.assert_close(root, outputs / half, rtol=1e-6, atol=0.0)
