"""Kernel analysis of agents: against dense algebra, autograd, and what training then does."""

import json

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from nsrl.analysis import (
    ForgettingAttribution,
    KernelCallback,
    collect_transitions,
    forecast,
    forecast_study,
    retained_behaviour,
)
from nsrl.analysis.study import cartpole_variant
from nsrl.analysis.transitions import BatchWatch, transitions_of
from nsrl.errors import NsrlError
from nsrl.rl.algorithms.ppo import NullSpacePPO
from nsrl.rl.policies.actor_critic import policy_outputs
from nsrl.rl.retention.constraint import RetentionConstraint
from tests.rl.builders import NEW, SMALL, trained


def finetuner(kind: str = "discrete", **options) -> NullSpacePPO:
    agent, buffer = trained(kind)
    options = {"retain": buffer, "seed": 3, **SMALL, "learning_rate": 1e-3, **options}
    options.setdefault("opening", "off")  # what is watched here is the updates
    return NullSpacePPO.from_pretrained(agent, NEW[kind], **options)


@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_the_retained_spectrum_is_that_of_the_dense_fisher_matrix(kind):
    agent, buffer = trained(kind)
    found = retained_behaviour(agent, buffer, states=20)
    constraint = RetentionConstraint(agent.policy, buffer)
    train = constraint.train
    dense = constraint.linearise(train[torch.linspace(0, len(train) - 1, 20).round().long()]).jacobian.dense().double()
    # the eigenvalues of J^T J, which has thousands of rows, are the squares of J's singular values
    fisher = torch.linalg.svdvals(dense).square()[: found.spectrum.rank]
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


def test_a_small_update_costs_what_was_forecast():
    """Four epochs of plain descent; a second order that is tempered, and the third is left out."""
    model = finetuner(
        method="finetune",
        n_epochs=4,
        learning_rate=0.02,
        max_grad_norm=1e9,
        policy_kwargs={"optimizer_class": torch.optim.SGD},
    )
    said = []

    class Foresee(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            said.append(
                forecast(
                    self.model.retention.constraint,
                    transitions_of(self.model),
                    learning_rate=0.02,
                    updates=4,
                    batch_size=32,
                    optimizer="sgd",
                    states=None,
                )
            )

    model.learn(64, callback=Foresee())
    constraint = model.retention.constraint
    assert said[0].kl == pytest.approx(constraint.gradient(constraint.train)[0], rel=0.1)
    assert said[0].kl_noise == 0.0


def test_forecasting_changes_nothing():
    class Foresee(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            transitions_of(self.model)

    plain, watched = finetuner().learn(128), finetuner().learn(128, callback=Foresee())
    for p, q in zip(plain.policy.parameters(), watched.policy.parameters(), strict=True):
        assert torch.equal(p, q)


def test_several_rollouts_tell_drift_from_noise():
    """Against the sum itself: R independent draws of an update, E 1/2 |sum|^2 = R^2/2 |E u|^2 + R/2 E |u - E u|^2."""
    model = finetuner()
    constraint = model.retention.constraint
    played = [collect_transitions(model) for _ in range(3)]
    options = {"learning_rate": 1e-3, "updates": 5, "batch_size": 32, "optimizer": "sgd", "states": None}
    said = forecast(constraint, played, rollouts=7, **options)
    J = constraint.linearise(constraint.train).jacobian.dense().double()
    updates = []
    for rollout in played:
        rows = rollout.jacobian(model.policy, constraint.names)
        updates.append(-5e-3 * J @ rows.rmatvec(torch.ones(rows.shape[0])).double())
    updates = torch.stack(updates)
    scatter = updates.var(0).sum()
    drift = updates.mean(0).square().sum() - scatter / 3
    assert drift > 0
    assert said.kl_drift == pytest.approx(float(49 * drift / 2), rel=1e-3)
    assert said.kl_noise == pytest.approx(float(7 * scatter / 2), rel=1e-3)
    alone = [forecast(constraint, rollout, **options).kl for rollout in played]
    assert alone == pytest.approx((updates.square().sum(1) / 2).tolist(), rel=1e-3)


def test_more_and_larger_steps_are_forecast_to_cost_more():
    model = finetuner()
    constraint, transitions = model.retention.constraint, collect_transitions(model)
    costs = [
        forecast(constraint, transitions, learning_rate=rate, updates=updates, batch_size=16).kl
        for rate, updates in ((1e-4, 10), (1e-4, 100), (1e-3, 100))
    ]
    assert costs[1] == pytest.approx(100 * costs[0]) and costs[2] == pytest.approx(100 * costs[1])


@pytest.mark.parametrize("method", ["null_space", "finetune"])
def test_forgetting_is_attributed_and_adds_up(method):
    model = finetuner(method=method, kl_budget=1e-5)
    _, buffer = trained()
    watch = ForgettingAttribution(buffer, states=5, memory=64)
    model.learn(128, callback=watch)
    assert len(watch.updates) == 2
    constraint = RetentionConstraint(model.policy, watch.buffer)
    torch.testing.assert_close(
        sum(update.kl for update in watch.updates), constraint.state_divergences(), rtol=1e-5, atol=1e-9
    )
    first = watch.updates[0]
    assert float(first.path.certificate.max()) < 1e-3
    assert first.contributions.shape == (5, 64)
    index, nats = first.top(0, 3)[0]
    assert nats == float(first.contributions[0].max()) == float(first.contributions[0, index])
    if method == "finetune":
        # Adam's memory reaches back to the first step, and nothing else acts on the actor
        assert float(first.rest.abs().max()) < 0.05 * float(first.kl.abs().max())
        assert not first.path.outside.any()
    else:
        assert first.path.outside.abs().max() > 0.01 * first.path.steps.abs().max()  # restored


def one_step_of_descent(removed: int | None = None, callback=None) -> NullSpacePPO:
    """A rollout of 2 x 32 transitions and one full-batch SGD step, with a transition left out of the policy's loss."""
    envs = make_vec_env(NEW["discrete"], 2, seed=0)
    agent, buffer = trained()
    model = NullSpacePPO.from_pretrained(
        agent,
        envs,
        retain=buffer,
        method="finetune",
        seed=3,
        n_steps=32,
        batch_size=64,
        n_epochs=1,
        learning_rate=1e-2,
        max_grad_norm=1e9,
        policy_kwargs={"optimizer_class": torch.optim.SGD},
    )
    if removed is not None:
        drawn = []
        draw = model.rollout_buffer._get_samples
        model.rollout_buffer._get_samples = lambda indices, *rest: drawn.append(indices) or draw(indices, *rest)

        def leave_out(_, __, outputs):
            if drawn and outputs.requires_grad:
                keep = torch.as_tensor(drawn[-1] != removed).unsqueeze(1)
                outputs.register_hook(lambda slope: slope * keep)

        leave_out.watches = True  # the outputs stay what they are: only their slope is another
        model.policy.action_net.register_forward_hook(leave_out)
    return model.learn(64, callback=callback)


def test_without_the_transition_a_state_moves_by_so_much_less():
    """What is attributed to a transition is what its removal undoes."""
    _, buffer = trained()
    watch = ForgettingAttribution(buffer, states=4, rule="gauss3")
    model = one_step_of_descent(callback=watch)
    (update,) = watch.updates
    assert float(update.rest.abs().max()) < 1e-4 * float(update.contributions.abs().sum(1).max())
    constraint = RetentionConstraint(model.policy, watch.buffer)
    shares = update.path.contributions
    for number in shares.abs().sum((0, 1)).topk(2).indices.tolist():
        twin = one_step_of_descent(removed=number)
        with torch.no_grad():
            undone = policy_outputs(model.policy, constraint.inputs) - policy_outputs(twin.policy, constraint.inputs)
        # other steps lead elsewhere in second order
        torch.testing.assert_close(shares[..., number], undone, rtol=0.05, atol=0.02 * float(undone.abs().max()))


def test_transitions_are_numbered_as_the_flattened_rollout():
    seen, rollouts = [], []

    class Keep(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            rollouts.append(self.model.rollout_buffer.observations.copy())

    agent, buffer = trained()
    model = NullSpacePPO.from_pretrained(
        agent,
        make_vec_env(NEW["discrete"], 2, seed=0),
        retain=buffer,
        opening="off",
        seed=3,
        **{**SMALL, "n_steps": 32},
    )
    watch = BatchWatch(model, lambda *told: seen.append(told))
    model.learn(64, callback=Keep())
    watch.detach()
    observations, cotangents, numbers = seen[0]
    for row, number in zip(observations, numbers.tolist(), strict=True):
        env, step = divmod(number, 32)
        assert np.array_equal(row, rollouts[0][step, env])
    assert len(seen) == 3 and cotangents.shape == (64, 2) and sorted(numbers.tolist()) == list(range(64))


def test_learning_is_bit_for_bit_the_same_with_the_recorder():
    _, buffer = trained()
    for fused in ("off", "auto"):
        plain = finetuner(kl_budget=0.01, fused=fused).learn(128)
        watched = finetuner(kl_budget=0.01, fused=fused)
        callbacks = [KernelCallback(buffer, states=8)]
        if fused == "off":  # it watches the optimizer, and has the updates left to SB3
            callbacks.append(ForgettingAttribution(buffer, states=4))
        watched.learn(128, callback=callbacks)
        for p, q in zip(plain.policy.parameters(), watched.policy.parameters(), strict=True):
            assert torch.equal(p, q)
        assert "_get_samples" not in vars(watched.rollout_buffer)


def test_the_recorder_works_on_stock_ppo_and_gaussian_policies():
    agent, buffer = trained("box")
    model = finetuner("box", method="finetune")
    stock = PPO("MlpPolicy", model.env, seed=0, **SMALL)
    stock.policy.load_state_dict(agent.policy.state_dict())
    watch = ForgettingAttribution(buffer, states=3, keep=1)
    stock.learn(128, callback=watch)
    assert len(watch.updates) == 1
    assert float(watch.updates[0].path.certificate.max()) < 1e-2


@pytest.mark.parametrize("stock", [False, True])
def test_kernel_tags_reach_tensorboard_where_they_were_measured(tmp_path, stock):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    agent, buffer = trained()
    model = finetuner(tensorboard_log=str(tmp_path))
    if stock:
        model = PPO("MlpPolicy", model.env, seed=0, tensorboard_log=str(tmp_path), **SMALL)
        model.policy.load_state_dict(agent.policy.state_dict())
    watch = KernelCallback(buffer, states=8)
    model.learn(192, callback=watch)
    (folder,) = tmp_path.iterdir()
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()
    history = dict(watch.history)
    assert list(history) == [0, 64, 128, 192]
    for tag in ("ntk/rank", "ntk/effective_dim", "ntk/lambda_max", "ntk/drift", "ntk/kappa"):
        points = {event.step: event.value for event in events.Scalars(tag)}
        assert points == {step: pytest.approx(state.scalars()[tag]) for step, state in history.items()}
    pictures = events.Images("ntk/spectrum")
    assert [event.step for event in pictures] == list(history)
    assert all(event.encoded_image_string.startswith(b"\x89PNG") and event.width == 400 for event in pictures)
    first, last = history[0], history[192]
    assert first.drift == 0.0 < last.drift and abs(first.kappa) < 1e-4 < last.kappa


def test_a_study_ranks_runs_and_can_be_resumed(tmp_path):
    agent, buffer = trained()
    out = tmp_path / "study.json"
    calls = []
    options = {
        "tasks": ("swapped",),
        "learning_rates": (1e-4, 1e-3, 3e-3),
        "timesteps": (512,),
        "seeds": (0,),
        "n_envs": 2,
        "n_epochs": 2,
        "on_run": lambda *counts: calls.append(counts),
    }
    study = forecast_study(agent, buffer, out, **options)
    assert len(study.rows) == 3 and study.first_update.forecast.spearman == pytest.approx(1.0)
    assert study.whole_run.forecast.partial is None  # one run of each setting
    written = json.loads(out.read_text())
    assert written["first_update"]["forecast"]["spearman"] == study.first_update.forecast.spearman
    again = forecast_study(agent, buffer, out, **options)
    assert again == study and calls == [(1, 3), (2, 3), (3, 3)] * 2
    more = forecast_study(agent, buffer, out, **{**options, "learning_rates": (1e-4, 1e-3, 3e-3, 6e-3)})
    assert more.rows[:3] == study.rows and len(more.rows) == 4 and calls[-1] == (4, 4)
    assert forecast_study(agent, buffer, out, **options) == study
    assert len(json.loads(out.read_text())["rows"]) == 4  # what was not asked for stays
    with pytest.raises(NsrlError, match="other settings"):
        forecast_study(agent, buffer, out, **{**options, "n_epochs": 3})
    assert forecast_study(agent, buffer, out, again=True, **options).rows[0]["whole_run"] == study.rows[0]["whole_run"]
    assert len(json.loads(out.read_text())["rows"]) == 3
    out.write_text("rows")
    with pytest.raises(NsrlError, match="is not a study"):
        forecast_study(agent, buffer, out, **options)


def test_a_studys_numbers_are_those_of_the_runs(tmp_path):
    """One row against a run made by hand: the KL after the first update, and after the last."""
    agent, buffer = trained()
    study = forecast_study(
        agent,
        buffer,
        tmp_path / "study.json",
        tasks=("swapped",),
        learning_rates=(1e-3,),
        timesteps=(256, 512),
        seeds=(0, 1),
        n_envs=2,
    )
    row = next(row for row in study.rows if row["timesteps"] == 512 and row["seed"] == 1)
    measured = []
    for steps in (256, 512):
        model = NullSpacePPO.from_pretrained(
            agent,
            cartpole_variant("swapped", 2, 1),
            retain=buffer,
            method="finetune",
            learning_rate=1e-3,
            seed=1,
            clip_range=0.2,
            n_steps=128,
            batch_size=64,
            n_epochs=5,
        )
        model.learn(steps)
        measured.append(model.retention.constraint.measure().kl_mean)
    assert [row["first_update"]["measured_kl"], row["whole_run"]["measured_kl"]] == pytest.approx(measured)
    assert row["rollouts"] == 2 and row["updates"] == 20


def test_bad_input_is_told():
    agent, buffer = trained()
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
    with pytest.raises(NsrlError, match="one rollout does not tell"):
        forecast(model.retention.constraint, transitions, learning_rate=1e-3, updates=1, batch_size=8, rollouts=2)
    with pytest.raises(NsrlError, match="must be positive"):
        forecast(model.retention.constraint, transitions, learning_rate=float("nan"), updates=1)
    with pytest.raises(NsrlError, match="one or more rollouts"):
        forecast(model.retention.constraint, [], learning_rate=1e-3, updates=1)
    with pytest.raises(NsrlError, match="no CartPole variant sideways"):
        forecast_study(agent, buffer, "study.json", tasks=("sideways",))
    with pytest.raises(NsrlError, match="three or more runs"):
        forecast_study(agent, buffer, "study.json", tasks=("same",), seeds=(0, 0, 0), learning_rates=(1e-3,))
    with pytest.raises(NsrlError, match="must be positive"):
        forecast_study(agent, buffer, "study.json", learning_rates=(0.0,))
    with pytest.raises(NsrlError, match="optimizer must be"):
        forecast(model.retention.constraint, transitions, learning_rate=1e-3, updates=1, optimizer="lion")
