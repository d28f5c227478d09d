"""NullSpaceTRPO: a corrected TRPO without a constraint, inside the budget with one, stock again when exported."""

from __future__ import annotations

import copy
import dataclasses
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.vec_env import DummyVecEnv

import nsrl.rl.algorithms.trpo
from nsrl import NullSpacePPO, NullSpaceTRPO, RetentionBuffer, protect
from nsrl.errors import NsrlError
from nsrl.rl.algorithms.surrogate import Surrogate
from nsrl.rl.policies.actor_critic import policy_outputs
from nsrl.rl.training import checkpoint
from tests.rl.builders import NEW, OLD, SpikyReward, trained
from tests.rl.clockwork import AtBoundary, Clockwork
from tests.rl.oracles import independent_kl, same, same_policies, within
from tests.rl.policy_builders import joint_kl

SMALL: dict[str, Any] = {"n_steps": 64, "batch_size": 64, "n_critic_updates": 2}
#: What is tested of the budget is tested where updates have to share the network with the old task.
SHARED: dict[str, Any] = {**SMALL, "confine": "off"}


def finetuned(kind: str = "discrete", *, seed: int = 0, steps: int = 384, wrapper: type | None = None, **options: Any):
    agent, buffer = trained(kind)
    envs = make_vec_env(NEW[kind], 2, seed=seed, wrapper_class=wrapper)
    model = NullSpaceTRPO.from_pretrained(agent, envs, retain=buffer, seed=seed, **{**SHARED, **options})
    return model.learn(steps), buffer


def stock(kind: str = "discrete", cls: type = TRPO, **options: Any) -> TRPO:
    return cls("MlpPolicy", make_vec_env(OLD[kind], 2, seed=0), seed=0, device="cpu", **{**SMALL, **options})


# -- the two trust regions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.0, 1e-9, 1e-7, 1e-4, 0.01])
@pytest.mark.parametrize(("kind", "preserve"), [("discrete", "distribution"), ("box", "distribution"), ("box", "mode")])
def test_after_every_update_the_measured_kl_is_within_the_budget(kind: str, preserve: str, budget: float) -> None:
    agent, buffer = trained(kind)
    envs = make_vec_env(NEW[kind], 2, seed=1, wrapper_class=SpikyReward)
    model = NullSpaceTRPO.from_pretrained(
        agent, envs, retain=buffer, kl_budget=budget, preserve=preserve, seed=1, target_kl=0.05, **SHARED
    )
    kls, train = [], model.train

    def watched() -> None:
        train()
        kls.append(independent_kl(model, buffer, preserve))

    model.train = watched
    model.learn(512)
    assert len(kls) == 4
    assert max(kls) <= within(budget, buffer)
    assert not same_policies(model, agent)


@settings(max_examples=7, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    budget=st.floats(-10.0, -0.5).map(lambda power: 10.0**power),
    target=st.floats(1e-4, 1.0),
    damping=st.floats(0.0, 1.0),
    seed=st.integers(0, 50),
)
def test_the_invariant_holds_for_any_budget_and_step_size(budget: float, target: float, damping: float, seed: int):
    model, buffer = finetuned(
        kl_budget=budget, target_kl=target, cg_damping=damping, seed=seed, wrapper=SpikyReward, steps=256
    )
    assert independent_kl(model, buffer) <= within(budget, buffer)
    assert model.retention_report().kl_mean <= budget


def observed_updates(model: NullSpaceTRPO, monkeypatch: pytest.MonkeyPatch, steps: int) -> list[dict[str, Any]]:
    """Before and after every policy step, by SB3's own distributions."""
    seen: list[dict[str, Any]] = []
    improve = type(model)._improve

    def watched(self: NullSpaceTRPO, surrogate: Surrogate) -> Any:
        samples = next(iter(self.rollout_buffer.get(batch_size=None)))
        discrete = isinstance(self.action_space, spaces.Discrete)
        actions = samples.actions.long().flatten() if discrete else samples.actions
        advantages = (samples.advantages - samples.advantages.mean()) / (samples.advantages.std() + 1e-8)

        def look() -> tuple[Any, float, torch.Tensor]:
            with torch.no_grad():
                now = copy.copy(self.policy.get_distribution(samples.observations))
                ratio = torch.exp(now.log_prob(actions) - samples.old_log_prob)
            return now, float((advantages * ratio).mean()), surrogate.parameters.read()

        old, before, start = look()
        update = improve(self, surrogate)
        new, after, end = look()
        seen.append(
            {
                "before": before,
                "after": after,
                "kl": float(joint_kl(old, new).mean()),
                "update": update,
                "moved": not torch.equal(start, end),
            }
        )
        return update

    monkeypatch.setattr(type(model), "_improve", watched)
    model.learn(steps)
    return seen


@pytest.mark.parametrize("kind", ["discrete", "box"])
@pytest.mark.parametrize("options", [{}, {"kl_budget": 1e-3}, {"kl_budget": 0.0}])
@pytest.mark.parametrize("target", [1e-3, 2.0])
def test_no_step_makes_the_surrogate_worse_or_leaves_the_rollouts_region(
    kind: str, options: dict, target: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, buffer = trained(kind)
    envs = make_vec_env(NEW[kind], 2, seed=3, wrapper_class=SpikyReward)
    retain = buffer if options else None
    model = NullSpaceTRPO.from_pretrained(agent, envs, retain=retain, seed=3, target_kl=target, **{**SHARED, **options})
    seen = observed_updates(model, monkeypatch, 384)
    assert any(update["moved"] for update in seen)
    for update in seen:
        if update["moved"]:
            assert update["after"] > update["before"] and update["kl"] <= target * (1 + 1e-4)
            assert update["update"].kl == pytest.approx(update["kl"], rel=1e-3, abs=1e-7)
        else:
            assert update["update"].length == 0.0 and update["update"].kl == 0.0


def test_the_line_search_shrinks_until_both_regions_and_the_surrogate_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stock(cls=NullSpaceTRPO, line_search_max_iter=4)
    model.learn(1)
    lengths: list[float] = []
    surrogate = Surrogate(model.policy, next(iter(model.rollout_buffer.get(None))))
    start = surrogate.parameters.read()
    step = model._step(
        nsrl.rl.algorithms.trpo.LocalModel(surrogate.fisher(), surrogate.gradient()[1], 0.01, 0.1, 15), surrogate
    )

    def answer(objective: float, kl: float) -> Any:
        def measure() -> tuple[float, float]:
            moved = surrogate.parameters.read() - start
            lengths.append(float(moved @ step.displacement) / float(step.displacement @ step.displacement))
            return objective, kl

        return measure

    monkeypatch.setattr(surrogate, "measure", answer(-1.0, 0.0))
    update = model._improve(surrogate)
    assert update.length == 0.0 and torch.equal(surrogate.parameters.read(), start)
    assert lengths == pytest.approx([1.0, 0.8, 0.64, 0.512], rel=1e-3)
    lengths.clear()
    monkeypatch.setattr(surrogate, "measure", answer(1.0, 0.04))
    assert model._improve(surrogate).length == 0.0
    assert lengths == pytest.approx([0.49**n for n in range(4)], rel=1e-3)
    lengths.clear()
    monkeypatch.setattr(surrogate, "measure", answer(1.0, math.nan))
    assert model._improve(surrogate).length == 0.0 and torch.equal(surrogate.parameters.read(), start)
    assert lengths == pytest.approx([0.1**n for n in range(4)], rel=1e-2)
    monkeypatch.setattr(surrogate, "measure", answer(1.0, 0.01))
    for excess, factor in ((1.1, 0.8), (4.0, 0.49), (math.inf, 0.1)):
        lengths.clear()
        monkeypatch.setattr(model, "_excess", lambda excess=excess: excess)
        assert model._improve(surrogate).length == 0.0
        assert lengths == pytest.approx([factor**n for n in range(4)], rel=1e-2)
    monkeypatch.undo()
    assert model._improve(surrogate).length > 0.0


def test_a_diverged_rollout_moves_nothing() -> None:
    for retain in (None, trained()[1]):
        agent, _ = trained()
        model = NullSpaceTRPO.from_pretrained(agent, make_vec_env(NEW["discrete"], 2, seed=0), retain=retain, **SMALL)
        model.learn(1)
        before = {name: value.clone() for name, value in model.policy.state_dict().items()}
        model.rollout_buffer.advantages[:] = np.nan
        # a protected run would go on to its end and learn nothing
        with nullcontext() if retain is None else pytest.raises(NsrlError, match="nothing can be learnt"):
            model.train()
        names = [name for name in before if "policy" in name or "action" in name]
        assert all(torch.equal(before[name], model.policy.state_dict()[name]) for name in names)


def test_hard_null_space_leaves_the_context_input_free() -> None:
    """The new task's context is zero on the old task, so its columns may move although the budget is zero."""
    agent, _ = trained()
    model, buffer = finetuned(kl_budget=0.0)
    name = "mlp_extractor.policy_net.0.weight"
    moved = (model.policy.state_dict()[name] - agent.policy.state_dict()[name]).norm(dim=0)
    assert moved[-1] > 1e-2 and independent_kl(model, buffer) <= within(0.0, buffer)


def test_mode_leaves_log_std_to_the_new_task() -> None:
    agent, _ = trained("box")
    model, buffer = finetuned("box", preserve="mode", log_std_init=-1.0, kl_budget=1e-3)
    assert not torch.allclose(model.policy.log_std, agent.policy.log_std, atol=0.3)
    assert float((model.policy.log_std.detach() + 1.0).abs().min()) > 0.0
    assert independent_kl(model, buffer, "mode") <= within(1e-3, buffer)


def test_rivals_run_through_the_same_loop() -> None:
    kls = [independent_kl(*finetuned(method="kl_penalty", penalty=penalty, seed=2)) for penalty in (0.0, 100.0)]
    assert kls[1] < 0.1 * kls[0]
    plain, buffer = finetuned(method="finetune", seed=2)
    free, _ = finetuned(kl_budget=math.inf, opening="off", settle=0.0, seed=2)
    assert independent_kl(plain, buffer) == pytest.approx(kls[0], rel=1e-6)
    assert same_policies(plain, free), "an inactive budget changes nothing"


# -- a better TRPO -----------------------------------------------------------------------------------------------------


def test_the_direction_is_upstreams() -> None:
    """Discrete actions, where both mean the same KL: stock TRPO on the same rollout is the oracle."""
    model, reference = stock(n_steps=256, cls=NullSpaceTRPO), stock(n_steps=256)
    model.learn(512)
    reference.policy.load_state_dict(model.policy.state_dict())
    reference.learn(1)  # sets it up
    reference.policy.load_state_dict(model.policy.state_dict())
    model.collect_rollouts(model.env, _silent(model), model.rollout_buffer, 256)
    reference.rollout_buffer = model.rollout_buffer
    start = torch.cat([p.detach().flatten() for p in _actor(model)])
    moved = []
    for one in (model, reference):
        one.train()
        moved.append(torch.cat([p.detach().flatten() for p in _actor(one)]) - start)
    cosine = float(moved[0] @ moved[1] / (moved[0].norm() * moved[1].norm()))
    assert cosine > 0.99 and 0.7 < float(moved[0].norm() / moved[1].norm()) < 1.5


def _actor(model: TRPO) -> list[torch.nn.Parameter]:
    return [p for name, p in model.policy.named_parameters() if "policy" in name or "action" in name]


def _silent(model: TRPO) -> Any:
    return model._init_callback(None)


def test_the_kl_of_the_joint_action_is_held() -> None:
    """Upstream averages it over the dimensions, so that its steps leave the region."""
    env = make_vec_env(lambda: _ManyDimensions(), 2, seed=0)
    ratios = {}
    for cls in (TRPO, NullSpaceTRPO):
        model = cls("MlpPolicy", env, seed=0, device="cpu", **{**SMALL, "n_steps": 256})
        model.learn(1)
        samples = next(iter(model.rollout_buffer.get(None)))
        new = copy.copy(model.policy.get_distribution(samples.observations))
        old = torch.distributions.Normal(*_before(model, samples))
        ratios[cls] = float(torch.distributions.kl_divergence(old, new.distribution).sum(-1).mean()) / model.target_kl
    assert ratios[TRPO] > 3.0 and 0.8 < ratios[NullSpaceTRPO] <= 1.0 + 1e-4


def _before(model: TRPO, samples: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation before the only update: the initial policy, built again from the seed."""
    fresh = type(model)("MlpPolicy", model.env, seed=0, device="cpu", **{**SMALL, "n_steps": 256})
    with torch.no_grad():
        now = fresh.policy.get_distribution(samples.observations).distribution
    return now.mean, now.stddev


class _ManyDimensions(gym.Env):
    observation_space = spaces.Box(-1.0, 1.0, (3,))
    action_space = spaces.Box(-1.0, 1.0, (6,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self._steps = 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> Any:
        self._steps += 1
        return self._observe(), float(-np.square(action - 0.5).sum()), False, self._steps == 20, {}

    def _observe(self) -> np.ndarray:
        return self.np_random.uniform(-1.0, 1.0, 3).astype(np.float32)


def test_it_learns_cartpole() -> None:
    model = NullSpaceTRPO("MlpPolicy", make_vec_env("CartPole-v1", 4, seed=0), n_steps=256, seed=0, device="cpu")
    model.learn(9216)
    assert np.mean([episode["r"] for episode in model.ep_info_buffer][-20:]) > 80.0  # 20 at random


def test_runs_of_one_seed_are_the_same_and_of_another_are_not() -> None:
    models = [finetuned("box", seed=seed, kl_budget=1e-3)[0] for seed in (4, 4, 5)]
    assert same_policies(models[0], models[1]) and not same_policies(models[0], models[2])


def test_sub_sampling_thins_out_the_fisher_information_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    fisher = Surrogate.fisher
    monkeypatch.setattr(
        Surrogate, "fisher", lambda self, every=1, besides=None: seen.append(every) or fisher(self, every, besides)
    )
    model = stock(cls=NullSpaceTRPO, sub_sampling_factor=4).learn(128)
    assert seen == [4] and model.logger.name_to_value["train/kl_divergence_loss"] <= model.target_kl


def test_what_an_update_did_is_logged() -> None:
    model, _ = finetuned(kl_budget=1e-3)
    model.train()
    logged = model.logger.name_to_value
    assert {
        "train/policy_objective",
        "train/kl_divergence_loss",
        "train/is_line_search_success",
        "train/value_loss",
        "train/explained_variance",
        "train/cg_residual",
        "train/cg_iterations",
        "nullspace/multiplier",
        "nullspace/kl_predicted",
        "nullspace/update_kept",
    } <= set(logged)
    assert 0.0 < logged["train/cg_residual"] < 1.0 and logged["nullspace/kl_predicted"] <= 1e-3


# -- zips, checkpoints, other agents -----------------------------------------------------------------------------------


def same_actions(one: Any, other: Any, observations: np.ndarray) -> bool:
    first, second = (model.predict(observations, deterministic=True)[0] for model in (one, other))
    return np.array_equal(first, second)


@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_zips_are_stock_zips_both_ways(kind: str, tmp_path: Path) -> None:
    model, buffer = finetuned(kind)
    observations = np.asarray(buffer.observations)
    exported = TRPO.load(model.export(tmp_path / "exported"), device="cpu")
    model.save(tmp_path / "saved")
    saved = TRPO.load(tmp_path / "saved", env=model.get_env(), device="cpu")
    for loaded in (exported, saved):
        assert type(loaded) is TRPO and same_actions(loaded, model, observations)
        outputs = [policy_outputs(one.policy, buffer.inputs()) for one in (loaded, model)]
        assert torch.equal(*outputs)
        assert not hasattr(loaded, "retention")
    saved.learn(128)  # goes on from the optimizer's state
    saved.save(tmp_path / "again")
    again = NullSpaceTRPO.load(tmp_path / "again", env=model.get_env(), device="cpu")
    assert same_actions(again, saved, observations) and again.retention is None
    assert (again.target_kl, again.cg_max_steps, again.batch_size) == (saved.target_kl, saved.cg_max_steps, 64)
    with pytest.raises(NsrlError, match="has not been given again"):  # stock TRPO carries the record on
        again.learn(128)
    protect(again, retain=buffer, kl_budget=1.0).learn(128)


def test_a_trpo_agent_hands_on_its_hyper_parameters_and_others_what_means_the_same(tmp_path: Path) -> None:
    agent = stock(gamma=0.9, cg_damping=0.02, target_kl=0.03, learning_rate=2e-3).learn(128)
    agent.save(tmp_path / "agent.zip")
    model = NullSpaceTRPO.from_pretrained(tmp_path / "agent.zip", NEW["discrete"], n_envs=2, target_kl=0.04)
    assert (model.gamma, model.cg_damping, model.target_kl, model.learning_rate) == (0.9, 0.02, 0.04, 2e-3)
    assert same_policies(model, agent) and not model.policy.optimizer.state
    envs = make_vec_env(OLD["discrete"], 2)
    ppo = PPO("MlpPolicy", envs, gamma=0.9, n_steps=32, learning_rate=1e-5, target_kl=0.5, batch_size=32, device="cpu")
    a2c = A2C("MlpPolicy", envs, gamma=0.9, device="cpu")
    for other, n_steps in ((ppo, 32), (a2c, 2048)):
        model = NullSpaceTRPO.from_pretrained(other, NEW["discrete"], n_envs=2)
        assert (model.gamma, model.n_steps, model.learning_rate) == (0.9, n_steps, 1e-3)
        assert (model.target_kl, model.batch_size) == (0.01, 128) and same_policies(model, other)
        assert type(model.policy.optimizer) is torch.optim.Adam
    chosen = {"optimizer_class": torch.optim.SGD}
    for cls in (NullSpaceTRPO, NullSpacePPO):
        model = cls.from_pretrained(a2c, NEW["discrete"], n_envs=2, policy_kwargs=chosen)
        assert type(model.policy.optimizer) is torch.optim.SGD
    back = NullSpacePPO.from_pretrained(agent, NEW["discrete"], n_envs=2)
    assert (back.gamma, back.target_kl, back.learning_rate) == (0.9, None, 3e-4)


def test_stock_trpo_can_be_protected_in_place() -> None:
    model = stock().learn(128)
    buffer = RetentionBuffer.collect(model, OLD["discrete"], n_states=100, n_envs=2)
    assert protect(model, retain=buffer, kl_budget=1e-3) is model and type(model) is NullSpaceTRPO
    model.set_env(make_vec_env(NEW["discrete"], 2, seed=0))
    before = model.policy.state_dict()["action_net.weight"].clone()
    model.learn(512)
    report = model.retention_report()
    assert independent_kl(model, buffer) <= within(1e-3, buffer)
    assert report.kl_mean <= 1e-3 and report.updates == 4 and report.rollbacks == 0
    assert report.effective_dimension >= 0.0 and 0.0 < report.overhead_fraction < 1.0
    assert not torch.equal(before, model.policy.state_dict()["action_net.weight"])


def test_a_checkpoint_continues_the_run(tmp_path: Path) -> None:
    model, _ = finetuned("box", kl_budget=1e-3, opening="off")
    checkpoint.save(tmp_path / "state.ckpt", model)
    fresh, _ = finetuned("box", kl_budget=1e-3, opening="off", steps=0)
    found = checkpoint.restore(tmp_path / "state.ckpt", fresh)
    assert found["timesteps"] == model.num_timesteps and same_policies(model, fresh)
    assert fresh.retention.updates == model.retention.updates == 3
    assert fresh.retention.multiplier.target == model.retention.multiplier.target
    assert fresh.retention._guess == model.retention._guess and model.retention._guess.multiplier > 0.0
    other, _ = finetuned("box", kl_budget=1e-3, opening="off", steps=0, method="finetune")
    with pytest.raises(NsrlError, match="retention"):
        checkpoint.restore(tmp_path / "state.ckpt", other)


@pytest.mark.parametrize("budget", [1e-5, 0.0])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(budget: float, tmp_path: Path) -> None:
    """Where resets are deterministic and all episodes have just ended."""
    agent = PPO("MlpPolicy", DummyVecEnv([Clockwork]), n_steps=32, batch_size=32, n_epochs=2, seed=0, device="cpu")
    buffer = RetentionBuffer.collect(agent, DummyVecEnv([Clockwork] * 2), n_states=64, seed=0)

    def build() -> NullSpaceTRPO:
        return NullSpaceTRPO.from_pretrained(
            agent,
            DummyVecEnv([Clockwork] * 2),
            retain=buffer,
            kl_budget=budget,
            opening="off",  # roll-outs begin at multiples of their length
            seed=1,
            **{**SMALL, "n_steps": 32},
        )

    model, resumed = build(), build()
    model.learn(384, callback=AtBoundary(256, partial(checkpoint.save, tmp_path / "middle")))
    checkpoint.restore(tmp_path / "middle", resumed)
    if budget > 0.0:
        assert resumed.retention._guess.multiplier > 0.0  # it binds, and says where the next step begins
    resumed.learn(checkpoint.remaining(resumed, 384), reset_num_timesteps=False)
    assert resumed.num_timesteps == model.num_timesteps == 384
    assert same(resumed.policy.state_dict(), model.policy.state_dict())
    assert same(resumed.policy.optimizer.state_dict(), model.policy.optimizer.state_dict())


def test_the_critic_warms_up_with_the_actor_frozen() -> None:
    agent, _ = trained()
    model, _ = finetuned(critic_warmup=10, opening="off")
    begun, _ = finetuned(critic_warmup=10, steps=0)
    ours, theirs = model.policy.state_dict(), agent.policy.state_dict()
    assert torch.equal(ours["action_net.weight"], theirs["action_net.weight"])
    assert not torch.equal(ours["value_net.weight"], begun.policy.state_dict()["value_net.weight"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_kl", 0.0),
        ("target_kl", -1.0),
        ("target_kl", math.inf),
        ("cg_damping", -0.1),
        ("cg_damping", math.nan),
        ("cg_max_steps", 0),
        ("n_critic_updates", 0),
        ("sub_sampling_factor", 0),
    ],
)
def test_hyper_parameters_out_of_range_are_refused_in_a_sentence(name: str, value: float) -> None:
    with pytest.raises(NsrlError, match=f"{name} must be a .*, not {value}$"):
        stock(cls=NullSpaceTRPO, **{name: value})


def test_a_line_search_turns_back_from_a_step_that_is_no_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stock(cls=NullSpaceTRPO, line_search_max_iter=60)
    model.learn(1)
    step = model._step

    def wild(local: Any, surrogate: Surrogate) -> Any:
        found = step(local, surrogate)
        return dataclasses.replace(found, displacement=1e38 * found.displacement / found.displacement.abs().max())

    monkeypatch.setattr(model, "_step", wild)
    model.train()
    assert 0.0 < model.logger.name_to_value["train/step_length"] < 1e-30


def test_what_makes_no_sense_is_refused_in_a_sentence() -> None:
    with pytest.raises(NsrlError, match="project_every shapes the minibatch steps"):
        finetuned(steps=0, project_every=3)
    for bad in ({"kl_budget": -1.0}, {"method": "ewc"}, {"method": "kl_penalty", "penalty": -1.0}):
        with pytest.raises(NsrlError):
            finetuned(steps=0, **bad)
    agent, _ = trained()
    with pytest.raises(NsrlError, match="TRPO refuses its settings"):
        NullSpaceTRPO.from_pretrained(agent, NEW["discrete"], n_steps=1)
    with pytest.raises(NsrlError, match="makes another network"):
        NullSpaceTRPO.from_pretrained(agent, NEW["discrete"], policy_kwargs={"net_arch": [3]})
    assert NullSpaceTRPO.from_pretrained(agent, NEW["discrete"], policy_kwargs=None).policy_kwargs == {}
    squashed: dict[str, Any] = {"use_sde": True, "policy_kwargs": {"squash_output": True}, "device": "cpu"}
    with pytest.raises(NsrlError, match="squash_output=False"):
        NullSpaceTRPO("MlpPolicy", "Pendulum-v1", **squashed)
    with pytest.raises(NsrlError, match="squash_output=False"):
        protect(TRPO("MlpPolicy", "Pendulum-v1", **squashed), trained("box")[1])


# -- other spaces ------------------------------------------------------------------------------------------------------


class _Spaces(gym.Env):
    """Random observations; rewards the first entry of the action."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self._steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        self._steps += 1
        return self.observation_space.sample(), float(np.ravel(action)[0]), False, self._steps == 10, {}


VECTOR = spaces.Box(-1.0, 1.0, (3,))
IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)
OTHERS = {
    "multi discrete": ("MlpPolicy", VECTOR, spaces.MultiDiscrete([2, 3]), {}),
    "multi binary": ("MlpPolicy", VECTOR, spaces.MultiBinary(3), {}),
    "shared cnn": ("CnnPolicy", IMAGE, spaces.Discrete(3), {"features_extractor_kwargs": {"features_dim": 8}}),
    "separate extractors": (
        "CnnPolicy",
        IMAGE,
        spaces.Box(-1.0, 1.0, (2,)),
        {"features_extractor_kwargs": {"features_dim": 8}, "share_features_extractor": False},
    ),
    "discrete observations": ("MlpPolicy", spaces.Discrete(5), spaces.Discrete(2), {"activation_fn": torch.nn.SiLU}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_all_spaces_and_networks(name: str) -> None:
    policy, observation_space, action_space, kwargs = OTHERS[name]

    def build() -> gym.Env:
        return _Spaces(observation_space, action_space)

    settings = {"n_steps": 32, "batch_size": 16, "n_critic_updates": 1, "target_kl": 0.1}
    model = TRPO(policy, DummyVecEnv([build]), policy_kwargs=kwargs, seed=0, device="cpu", **settings)
    buffer = RetentionBuffer.collect(model, DummyVecEnv([build]), n_states=20)
    for budget in (1e-3, 0.0):
        protected = NullSpaceTRPO.from_pretrained(
            model, DummyVecEnv([build]), retain=buffer, kl_budget=budget, seed=0, **settings
        )
        protected.learn(32)
        assert independent_kl(protected, buffer) <= within(budget, buffer)
        assert protected.retention.updates == 1
        if budget > 0.0:
            assert not same_policies(protected, model)


def test_dict_observations() -> None:
    envs = make_vec_env(lambda: SimpleMultiObsEnv(random_start=True), 1)
    model = NullSpaceTRPO(
        "MultiInputPolicy",
        envs,
        seed=0,
        device="cpu",
        **{**SMALL, "target_kl": 0.05},
        policy_kwargs={"features_extractor_kwargs": {"cnn_output_dim": 4}},
    )
    model.learn(64)
    assert 0.0 < model.logger.name_to_value["train/kl_divergence_loss"] <= 0.05
