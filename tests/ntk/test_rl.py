"""Kernel analysis of agents: against dense algebra, autograd, and what training then does."""

import json

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from nsrl.errors import NsrlError
from nsrl.ntk.rl import (
    ForgettingAttribution,
    KernelCallback,
    collect_transitions,
    forecast,
    forecast_study,
    retained_behaviour,
)
from nsrl.ntk.rl.study import cartpole_variant
from nsrl.rl.constraint import RetentionConstraint
from nsrl.rl.ppo import NullSpacePPO
from tests.rl.builders import NEW, SMALL, cached_buffer


def finetuner(kind: str = "discrete", **options) -> NullSpacePPO:
    agent, buffer = cached_buffer(kind)
    options = {"retain": buffer, "seed": 3, **SMALL, "learning_rate": 1e-3, **options}
    return NullSpacePPO.from_pretrained(agent, NEW[kind], **options)


@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_the_retained_spectrum_is_that_of_the_dense_fisher_matrix(kind):
    agent, buffer = cached_buffer(kind)
    found = retained_behaviour(agent, buffer, states=20)
    constraint = RetentionConstraint(agent.policy, buffer)
    train = constraint.train
    dense = constraint.linearise(train[torch.linspace(0, len(train) - 1, 20).round().long()]).jacobian.dense().double()
    fisher = torch.linalg.eigvalsh(dense.T @ dense).flip(0)[: found.spectrum.rank]
    torch.testing.assert_close(found.spectrum.values[: found.spectrum.rank], fisher, rtol=1e-4, atol=1e-9)
    assert found.parameters == dense.shape[1] and 0 < found.rank_fraction < 1
    assert 0 < found.effective_dimension(0.01, 0.1) < found.spectrum.rank
    assert found.effective_dimension(0.001, 0.1) > found.effective_dimension(0.1, 0.1)


@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_the_transitions_add_up_to_the_policy_gradient(kind):
    model = finetuner(kind)
    constraint = model.retention.constraint
    transitions = collect_transitions(model)
    names = tuple(name for name in constraint.names if name != "log_std")
    rows = transitions.jacobian(model.policy, names)
    ours = rows.rmatvec(torch.ones(rows.shape[0]))
    buffer = model.rollout_buffer
    observations, actions = torch.as_tensor(buffer.observations), torch.as_tensor(buffer.actions)
    advantages = torch.as_tensor(buffer.advantages).flatten()
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    log_prob = model.policy.get_distribution(observations).log_prob(
        actions.squeeze(1) if kind == "discrete" else actions
    )
    named = dict(model.policy.named_parameters())
    grads = torch.autograd.grad(-(advantages * log_prob).mean(), [named[name] for name in names])
    torch.testing.assert_close(ours, torch.cat([grad.flatten() for grad in grads]), rtol=1e-3, atol=1e-6)


def test_one_small_step_of_gradient_descent_costs_what_was_forecast():
    model = finetuner()
    constraint = model.retention.constraint
    transitions = collect_transitions(model)
    rate = 0.05
    said = forecast(constraint, transitions, learning_rate=rate, updates=1, batch_size=32, optimizer="sgd", states=None)
    rows = transitions.jacobian(model.policy, constraint.names)
    flat = constraint.parameters
    here = flat.read()
    costs = []
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for batch in order.split(32):
        member = torch.zeros(64)
        member[batch] = 2.0
        flat.write(here - rate * rows.rmatvec(member))
        costs.append(constraint.gradient(constraint.train)[0])
    flat.write(here)
    # the second-order model has a tempered Hessian and leaves out the third order
    assert said.kl_step == pytest.approx(np.mean(costs), rel=0.1)
    assert said.kl == pytest.approx(said.kl_drift + said.kl_noise)


def test_the_share_that_survives_is_that_of_a_dense_null_space():
    model = finetuner()
    constraint = model.retention.constraint
    transitions = collect_transitions(model)
    said = forecast(constraint, transitions, learning_rate=1e-3, updates=10, batch_size=32, kl_budget=1e-3, states=8)
    train = constraint.train
    chosen = train[torch.linspace(0, len(train) - 1, 8).round().long()]
    J = constraint.linearise(chosen).jacobian.dense().double()
    rows = transitions.jacobian(model.policy, constraint.names)
    gradient = rows.rmatvec(torch.ones(rows.shape[0])).double()
    right = torch.linalg.svd(J, full_matrices=False)[2]
    expected = float((gradient - right.T @ (right @ gradient)).norm() / gradient.norm())
    assert said.surviving == pytest.approx(expected, rel=1e-3)
    assert 0.0 < said.surviving_budget <= 1.0 and 0.0 < said.alignment <= 1.0


def test_more_and_larger_steps_are_forecast_to_cost_more():
    model = finetuner()
    constraint, transitions = model.retention.constraint, collect_transitions(model)
    costs = [
        forecast(constraint, transitions, learning_rate=rate, updates=updates, batch_size=16).kl
        for rate, updates in ((1e-4, 10), (1e-4, 100), (1e-3, 100))
    ]
    assert costs[0] * 9 < costs[1] and costs[2] == pytest.approx(100 * costs[1])


@pytest.mark.parametrize("method", ["null_space", "finetune"])
def test_forgetting_is_attributed_and_adds_up(method):
    model = finetuner(method=method, kl_budget=0.002)
    _, buffer = cached_buffer()
    watch = ForgettingAttribution(buffer, states=5, memory=64)
    model.learn(128, callback=watch)
    assert len(watch.updates) == 2
    constraint = RetentionConstraint(model.policy, watch.buffer)
    torch.testing.assert_close(sum(update.kl for update in watch.updates), constraint.state_divergences(),
                               rtol=1e-5, atol=1e-9)  # fmt: skip
    first = watch.updates[0]
    assert float(first.path.certificate.max()) < 1e-3
    assert first.contributions.shape == (5, 64)
    torch.testing.assert_close(first.contributions.double().sum(1) + first.rest, first.kl)
    index, nats = first.top(0, 3)[0]
    assert nats == float(first.contributions[0].max()) == float(first.contributions[0, index])
    if method == "finetune":
        # Adam's memory reaches back to the first step, and nothing else acts on the actor
        assert float(first.rest.abs().max()) < 0.05 * float(first.kl.abs().max())
        assert not first.path.outside.any()


def test_removing_the_transition_that_moved_a_state_most_moves_it_less():
    """The attribution is of what happened: for one full-batch SGD step the removal does what was attributed."""
    model = finetuner(method="finetune", n_epochs=1, batch_size=64, learning_rate=1e-2, policy_kwargs={
        "optimizer_class": torch.optim.SGD})  # fmt: skip
    _, buffer = cached_buffer()
    watch = ForgettingAttribution(buffer, states=4, rule="gauss3")
    model.learn(64, callback=watch)
    (update,) = watch.updates
    assert float(update.rest.abs().max()) < 0.02 * float(update.contributions.abs().sum(1).max())


def test_learning_is_bit_for_bit_the_same_with_the_recorder():
    _, buffer = cached_buffer()
    plain = finetuner(kl_budget=0.01).learn(128)
    watched = finetuner(kl_budget=0.01)
    callbacks = [ForgettingAttribution(buffer, states=4), KernelCallback(buffer, states=8)]
    watched.learn(128, callback=callbacks)
    for p, q in zip(plain.policy.parameters(), watched.policy.parameters(), strict=True):
        assert torch.equal(p, q)
    assert "_get_samples" not in vars(watched.rollout_buffer)


def test_the_recorder_works_on_stock_ppo_and_gaussian_policies():
    agent, buffer = cached_buffer("box")
    model = finetuner("box", method="finetune")
    stock = PPO("MlpPolicy", model.env, seed=0, **SMALL)
    stock.policy.load_state_dict(agent.policy.state_dict())
    watch = ForgettingAttribution(buffer, states=3, keep=1)
    stock.learn(128, callback=watch)
    assert len(watch.updates) == 1
    assert float(watch.updates[0].path.certificate.max()) < 1e-2


def test_kernel_tags_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, buffer = cached_buffer()
    model = finetuner(tensorboard_log=str(tmp_path))
    watch = KernelCallback(buffer, states=8)
    model.learn(192, callback=watch)
    (folder,) = tmp_path.iterdir()
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert {"ntk/rank", "ntk/effective_dim", "ntk/drift", "ntk/kappa"} <= set(events.Tags()["scalars"])
    assert events.Images("ntk/spectrum")
    first, last = watch.history[0][1], watch.history[-1][1]
    assert first.drift == 0.0 < last.drift and abs(first.kappa) < 1e-4 < last.kappa


def test_a_study_ranks_runs_and_can_be_resumed(tmp_path):
    agent, buffer = cached_buffer()
    out = tmp_path / "study.json"
    calls = []
    options = {"tasks": ("swapped",), "learning_rates": (1e-4, 1e-3, 3e-3), "timesteps": (256,), "n_envs": 2,
               "n_epochs": 2, "on_run": lambda *counts: calls.append(counts)}  # fmt: skip
    study = forecast_study(agent, buffer, out, **options)
    assert len(study.rows) == 3 and study.spearman == pytest.approx(1.0)
    written = json.loads(out.read_text())
    assert written["spearman"] == study.spearman
    again = forecast_study(agent, buffer, out, **options)
    assert again == study and len(calls) == 6


def test_bad_input_is_told():
    agent, buffer = cached_buffer()
    with pytest.raises(NsrlError, match="retention buffer"):
        retained_behaviour(agent)
    with pytest.raises(NsrlError, match="at least 1"):
        ForgettingAttribution(buffer, states=0)
    with pytest.raises(NsrlError, match="no CartPole variant"):
        cartpole_variant("sideways", 1, 0)
    model = finetuner()
    transitions = collect_transitions(model)
    with pytest.raises(NsrlError, match="two minibatches"):
        forecast(model.retention.constraint, transitions, learning_rate=1e-3, updates=1, batch_size=64)
    with pytest.raises(NsrlError, match="optimizer must be"):
        forecast(model.retention.constraint, transitions, learning_rate=1e-3, updates=1, optimizer="lion")
