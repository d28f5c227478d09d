"""The parts of the retention engine: draws, the multiplier, restoration and the last resort."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.env_util import make_vec_env

from nsrl import NullSpacePPO
from nsrl.projection.budget.multiplier import FLOOR, Multiplier
from nsrl.rl.budget.draws import StateDraw
from tests.rl.builders import NEW, SHARED, trained
from tests.rl.oracles import independent_kl, within


@given(size=st.integers(1, 40), count=st.integers(1, 60), seed=st.integers(0, 5))
def test_draws_cover_every_state_once_an_epoch(size: int, count: int, seed: int) -> None:
    indices = torch.arange(100, 100 + size)
    draw = StateDraw(indices, seed)
    batches = [draw.draw(count) for _ in range(size // min(count, size))]
    drawn = torch.cat(batches)
    assert len(set(drawn.tolist())) == len(drawn)
    assert set(drawn.tolist()) <= set(indices.tolist())


def test_draws_continue_from_their_state_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    draw, other = StateDraw(torch.arange(50), 1), StateDraw(torch.arange(50), 2)
    draw.draw(30)
    other.set_state(draw.state())
    assert [draw.draw(7).tolist() for _ in range(9)] == [other.draw(7).tolist() for _ in range(9)]
    assert torch.equal(before, torch.get_rng_state())


def test_the_multiplier_rests_at_zero_and_settles_where_the_constraint_is_met() -> None:
    multiplier = Multiplier(target=0.01, rate=0.05, damping=0.3)
    assert multiplier.update(0.0) == 0.0 and multiplier.integral == FLOOR
    # A plant whose KL falls with the multiplier: kl = 0.02 / multiplier meets the target at 2.
    kl = 0.05
    for _ in range(2000):
        kl = 0.9 * kl + 0.1 * min(0.02 / max(multiplier.update(kl), 1e-3), 0.5)
    assert abs(kl - 0.01) < 5e-4


def build(budget: float, **options: Any) -> NullSpacePPO:
    agent, buffer = trained()
    envs = make_vec_env(NEW["discrete"], 2, seed=0)
    return NullSpacePPO.from_pretrained(agent, envs, retain=buffer, kl_budget=budget, **{**SHARED, **options})


def test_a_diverged_update_falls_back_to_the_last_feasible_policy() -> None:
    model = build(1e-3)
    retention, flat = model.retention, model.retention.constraint.parameters
    feasible = flat.read()
    retention.begin()
    flat.write(torch.full_like(feasible, float("nan")))
    scalars = retention.end()
    assert scalars["nullspace/rollbacks"] == 1
    assert torch.equal(flat.read(), feasible)


def test_restoration_keeps_more_of_an_update_than_the_fallback_would() -> None:
    model = build(1e-3)
    retention, flat = model.retention, model.retention.constraint.parameters
    feasible = flat.read()
    step = 0.1 * torch.randn(feasible.shape, generator=torch.Generator().manual_seed(0))
    retention.begin()
    flat.write(feasible + step)
    buffer = retention.constraint.buffer
    assert independent_kl(model, buffer) > 2e-3
    retention.end()
    assert retention.restored == model.retention_report().restored == 1
    restored = flat.read() - feasible
    assert independent_kl(model, buffer) <= within(1e-3, buffer) and retention.rollbacks == 0
    flat.write(feasible + step)
    retention.enforcement.fall_back(feasible)
    assert float(restored @ step) > 1.2 * float((flat.read() - feasible) @ step)


def test_state_dict_round_trip() -> None:
    model, other = build(0.01), build(0.01)
    model.learn(256)
    other.retention.load_state_dict(model.retention.state_dict())
    assert other.retention.updates == model.retention.updates == 2
    assert other.retention.restored == model.retention.restored
    assert other.retention.multiplier.integral == model.retention.multiplier.integral
    assert torch.equal(other.retention.minibatches.draw(9), model.retention.minibatches.draw(9))


def test_active_selection_takes_the_largest_kl_and_weighs_the_rest_for_the_whole() -> None:
    model = build(0.1, projection="euclidean", subset_states=32, selection="active")
    retention, flat = model.retention, model.retention.constraint.parameters
    flat.write(flat.read() + 0.05 * torch.randn(flat.read().shape, generator=torch.Generator().manual_seed(1)))
    train = retention.constraint.train
    kl = retention.constraint.state_divergences()
    estimates = []
    for _ in range(400):
        states, importance = retention._subset()
        assert len(set(states.tolist())) == 32 and set(states.tolist()) <= set(train.tolist())
        assert set(states[:16].tolist()) == set(train[kl[train].topk(16).indices].tolist())
        estimates.append(float((importance * kl[states]).sum() / importance.sum()))
    assert abs(sum(estimates) / 400 - float(kl[train].mean())) < 0.02 * float(kl[train].mean())
    assert build(0.1, subset_states=32).retention._subset()[1] is None
    assert build(0.1, subset_states=10_000, selection="active").retention._subset()[1] is None


def test_active_selection_keeps_the_budget() -> None:
    model = build(1e-3, projection="euclidean", subset_states=16, selection="active")
    model.learn(256)
    buffer = model.retention.constraint.buffer
    assert independent_kl(model, buffer) <= within(1e-3, buffer)
