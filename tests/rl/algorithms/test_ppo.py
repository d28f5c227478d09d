"""NullSpacePPO: stock without a constraint, inside the budget with one, stock again when exported."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from nsrl import NullSpacePPO
from nsrl.errors import NsrlError
from nsrl.rl.policies.actor_critic import policy_outputs
from tests.rl.builders import NEW, OLD, SHARED, SMALL, SpikyReward, trained
from tests.rl.oracles import independent_kl, same_policies, within

STEPS = 512


def finetuned(
    kind: str = "discrete", *, seed: int = 0, steps: int = STEPS, wrapper: type | None = None, **options: object
):
    agent, buffer = trained(kind)
    envs = make_vec_env(NEW[kind], 2, seed=seed, wrapper_class=wrapper)
    model = NullSpacePPO.from_pretrained(agent, envs, retain=buffer, seed=seed, **{**SMALL, **options})
    return model.learn(steps), buffer


@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_without_a_buffer_it_is_stock_ppo_bit_for_bit(kind: str) -> None:
    models = [
        cls("MlpPolicy", make_vec_env(NEW[kind], 2, seed=3), seed=3, device="cpu", **SMALL).learn(STEPS)
        for cls in (PPO, NullSpacePPO)
    ]
    assert same_policies(*models)


@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_an_inactive_constraint_changes_nothing_bit_for_bit(kind: str) -> None:
    """The budget is measured after every update but never binds; stock PPO from the same weights is the oracle."""
    agent, _ = trained(kind)
    model, _ = finetuned(kind, kl_budget=math.inf, critic="keep", opening="off", values="raw", settle=0.0, seed=5)
    stock = PPO("MlpPolicy", make_vec_env(NEW[kind], 2, seed=5), seed=5, device="cpu", **SMALL)
    stock.policy.load_state_dict(agent.policy.state_dict())
    stock.learn(STEPS)
    assert model.retention is not None and model.retention.updates == 4
    assert same_policies(model, stock)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient": "plain", "projection": "euclidean"},
        {"gradient": "projected", "projection": "optimizer"},
        {"gradient": "lagrangian", "projection": "optimizer", "project_every": 2},
        {"gradient": "plain", "projection": "none"},
    ],
)
@pytest.mark.parametrize("budget", [0.0, 1e-9, 1e-7, 1e-4, 0.01])
@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_after_every_update_the_measured_kl_is_within_the_budget(kind: str, budget: float, options: dict) -> None:
    agent, buffer = trained(kind)
    envs = make_vec_env(NEW[kind], 2, seed=1, wrapper_class=SpikyReward)
    model = NullSpacePPO.from_pretrained(agent, envs, retain=buffer, kl_budget=budget, seed=1, **{**SHARED, **options})
    kls = []
    train = model.train

    def watched() -> None:
        train()
        kls.append(independent_kl(model, buffer))

    model.train = watched
    model.learn(STEPS)
    assert len(kls) == 4
    assert max(kls) <= within(budget, buffer)
    if budget == 0.01:
        assert not same_policies(model, agent)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(budget=st.floats(-10.0, -0.5).map(lambda power: 10.0**power), rate=st.floats(1e-4, 0.1), seed=st.integers(0, 50))
def test_the_invariant_holds_for_any_budget_and_learning_rate(budget: float, rate: float, seed: int) -> None:
    model, buffer = finetuned(kl_budget=budget, learning_rate=rate, seed=seed, wrapper=SpikyReward, steps=256)
    assert independent_kl(model, buffer) <= within(budget, buffer)
    assert model.retention_report().kl_mean <= budget


def test_plain_fine_tuning_breaks_the_budget_that_null_space_keeps() -> None:
    plain, buffer = finetuned(method="finetune", seed=2)
    kept, _ = finetuned(kl_budget=1e-3, seed=2)
    assert independent_kl(plain, buffer) > 5e-3
    assert independent_kl(kept, buffer) <= within(1e-3, buffer)
    assert not same_policies(plain, kept)


def test_the_penalty_pulls_towards_the_reference() -> None:
    """Hundreds of times, with any seed; of two penalties that both bind, a short run may end nearer with the weaker."""
    for seed in range(3):
        kls = [independent_kl(*finetuned(method="kl_penalty", penalty=penalty, seed=seed)) for penalty in (0.0, 100.0)]
        assert kls[1] < 0.1 * kls[0]


def test_hard_null_space_leaves_the_context_input_free() -> None:
    """The new task's context is zero on the old task, so its columns may move although the budget is zero."""
    agent, _ = trained()
    model, _ = finetuned(kl_budget=0.0)
    name = "mlp_extractor.policy_net.0.weight"
    moved = (model.policy.state_dict()[name] - agent.policy.state_dict()[name]).norm(dim=0)
    assert moved[-1] > 1e-3


def test_exported_zip_is_stock_and_acts_identically(tmp_path: Path) -> None:
    model, buffer = finetuned("box")
    stock = PPO.load(model.export(tmp_path / "agent"), device="cpu")
    assert type(stock) is PPO
    observations = np.asarray(buffer.observations)
    assert np.array_equal(
        stock.predict(observations, deterministic=True)[0], model.predict(observations, deterministic=True)[0]
    )
    assert torch.equal(policy_outputs(stock.policy, buffer.inputs()), policy_outputs(model.policy, buffer.inputs()))


def test_a_stock_zip_can_be_taken_over(tmp_path: Path) -> None:
    agent, buffer = trained()
    agent.save(tmp_path / "agent.zip")
    model = NullSpacePPO.from_pretrained(tmp_path / "agent.zip", NEW["discrete"], retain=buffer, n_envs=2)
    assert (model.n_steps, model.batch_size, model.learning_rate) == (64, 64, SMALL["learning_rate"])
    names = [name for name, _ in model.policy.named_parameters() if "value" not in name]
    assert all(torch.equal(model.policy.state_dict()[n], agent.policy.state_dict()[n]) for n in names)
    assert not model.policy.optimizer.state, "old Adam moments would push along the old task"


def test_the_critic_is_reset_kept_or_warmed_up() -> None:
    agent, _ = trained()
    value, actor = "value_net.weight", "action_net.weight"
    kept, _ = finetuned(critic="keep", steps=0)
    reset, _ = finetuned(critic="reset", steps=0)
    warmed, _ = finetuned(critic_warmup=10, opening="off")
    assert torch.equal(kept.policy.state_dict()[value], agent.policy.state_dict()[value])
    assert not torch.equal(reset.policy.state_dict()[value], agent.policy.state_dict()[value])
    assert torch.equal(warmed.policy.state_dict()[actor], agent.policy.state_dict()[actor])
    assert not torch.equal(warmed.policy.state_dict()[value], reset.policy.state_dict()[value])


def test_mode_leaves_log_std_to_the_new_task() -> None:
    agent, _ = trained("box")
    model, buffer = finetuned("box", preserve="mode", log_std_init=-1.0, kl_budget=1e-3)
    assert not torch.allclose(model.policy.log_std, agent.policy.log_std, atol=0.3)
    assert independent_kl(model, buffer, "mode") <= within(1e-3, buffer)


def test_report_and_errors() -> None:
    model, buffer = finetuned()
    report = model.retention_report()
    assert report.budget == 0.01 and report.states == (128, 32) and 0 < report.rank <= report.parameters
    assert 0.0 < report.overhead_fraction < 1.0 and report.updates == 4
    with pytest.raises(NsrlError, match="nothing is protected"):
        NullSpacePPO("MlpPolicy", OLD["discrete"], device="cpu").retention_report()
    for bad in ({"kl_budget": -1.0}, {"kl_budget": math.nan}, {"gradient": "lagrange"}, {"method": "nullspace"}):
        with pytest.raises(NsrlError):
            finetuned(steps=0, **bad)
    with pytest.raises(NsrlError, match="log_std"):
        finetuned("box", steps=0, log_std_init=0.0)
    other = build_other()
    with pytest.raises(NsrlError):
        NullSpacePPO.from_pretrained(other, NEW["discrete"], retain=buffer)


def build_other() -> PPO:
    return PPO("MlpPolicy", make_vec_env(OLD["discrete"], 1), seed=9, device="cpu", **SMALL)


def test_settings_that_do_not_exist_or_do_not_fit_are_refused() -> None:
    agent, _ = trained()
    for options, message in (
        ({"n_stps": 8}, "'n_stps' is no setting of PPO.*did you mean n_steps"),
        ({"project_evry": 2}, "did you mean project_every"),
        ({"cg_max_steps": 8}, "'cg_max_steps' is no setting of PPO"),
        ({"policy_kwargs": {"net_arch": [5]}}, "another network than the agent's"),
    ):
        with pytest.raises(NsrlError, match=message):
            NullSpacePPO.from_pretrained(agent, NEW["discrete"], **options)
