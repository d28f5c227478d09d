"""MaskablePPO: masks come from the environment, go into the buffer, and the KL is that of the masked distribution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch.distributions import Categorical, kl_divergence

from nsrl import NullSpacePPO, NullSpaceTRPO, RetentionBuffer, protect
from nsrl.errors import NsrlError
from nsrl.rl import agents, surgery
from nsrl.rl.playing.action_masks import masked_by
from nsrl.rl.playing.evaluation import evaluate
from nsrl.rl.policies.distributions import INVALID, MaskedCategorical
from nsrl.rl.retention.constraint import RetentionConstraint
from tests.rl.oracles import independent_kl, within

SIZES = {"discrete": (4,), "multi": (3, 2)}


class Open(gym.Env):
    """Random observations and rewards; every action will do."""

    def __init__(self, kind: str = "discrete") -> None:
        self.kind = kind
        self.observation_space = spaces.Box(-1.0, 1.0, (3,), np.float32)
        self.action_space = spaces.Discrete(4) if kind == "discrete" else spaces.MultiDiscrete(SIZES[kind])

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._steps += 1
        return self._observe(), float(self.np_random.standard_normal()), self._steps % 9 == 0, False, {}

    def _observe(self) -> np.ndarray:
        self._seen = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        return self._seen


class Corridor(Open):
    """What is valid follows from the observation; an invalid action is an error; the last choice is never valid."""

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        heads = np.split(self.action_masks(), np.cumsum(SIZES[self.kind])[:-1])
        if not all(head[int(choice)] for head, choice in zip(heads, np.ravel(action), strict=True)):
            raise AssertionError(f"{action} is not valid")
        return super().step(action)

    def action_masks(self) -> np.ndarray:
        return valid(self._seen, self.kind)


def valid(observation: np.ndarray, kind: str = "discrete") -> np.ndarray:
    """Valid actions, the last axis of `observation` its entries."""
    a, b, c = (observation[..., index] > 0.0 for index in range(3))
    if kind == "discrete":
        return np.stack([a, ~a, b, np.zeros_like(c)], -1)
    return np.stack([a, ~a | b, c & b, np.ones_like(a), np.zeros_like(a)], -1)


def build(kind: str = "discrete", env: Any = None, **options: Any) -> MaskablePPO:
    env = env or DummyVecEnv([lambda: Corridor(kind)] * 2)
    settings = {"n_steps": 32, "batch_size": 32, "n_epochs": 3, "learning_rate": 0.01, "seed": 0, "device": "cpu"}
    return MaskablePPO("MlpPolicy", env, policy_kwargs={"net_arch": [8]}, **{**settings, **options})


def envs(kind: str = "discrete") -> DummyVecEnv:
    return DummyVecEnv([lambda: Corridor(kind)] * 3)


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("select", ["expert", "advantage"])
def test_the_buffer_knows_which_actions_were_valid(kind: str, select: str, tmp_path: Path) -> None:
    model = build(kind).learn(64)
    buffer = RetentionBuffer.collect(model, envs(kind), n_states=60, select=select)
    masks = valid(np.asarray(buffer.observations), kind)
    assert 0.2 < masks.mean() < 0.8
    assert np.array_equal(buffer.outputs == np.float32(INVALID), ~masks)
    with torch.no_grad():
        shown = model.policy.obs_to_tensor(np.array(buffer.observations))[0]
        logits = model.policy.action_net(model.policy.mlp_extractor.forward_actor(shown)).numpy()
    assert np.array_equal(buffer.outputs[masks], logits[masks])
    assert not model.policy.action_net._forward_hooks
    loaded = RetentionBuffer.load(buffer.save(tmp_path / "buffer.npz"))
    assert loaded.digest() == buffer.digest()
    loaded.check(model)


def test_masks_reach_through_a_vec_normalize() -> None:
    env = VecNormalize(envs())
    model = build(env=env).learn(96)
    buffer = RetentionBuffer.collect(model, None, n_states=30)
    assert buffer.normalizer is not None
    assert np.array_equal(buffer.outputs > -1e7, valid(np.asarray(buffer.observations)))


@pytest.mark.parametrize("kind", SIZES)
def test_the_measured_kl_is_that_of_sb3_contrib_s_masked_distributions(kind: str) -> None:
    model = build(kind).learn(64)
    buffer = RetentionBuffer.collect(model, envs(kind), n_states=60)
    masks = valid(np.asarray(buffer.observations), kind)

    def heads() -> list[Categorical]:
        with torch.no_grad():
            found = model.policy.get_distribution(buffer.inputs(), action_masks=torch.tensor(masks))
        dists = found.distributions if kind == "multi" else [found.distribution]
        return [Categorical(logits=dist.logits.double()) for dist in dists]

    before = heads()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    expected = sum(kl_divergence(old, new) for old, new in zip(before, heads(), strict=True))
    constraint = RetentionConstraint(model.policy, buffer)
    torch.testing.assert_close(constraint.state_divergences(), expected, rtol=1e-4, atol=1e-7)
    assert constraint.measure().kl_mean == pytest.approx(float(expected.mean()), rel=1e-4)
    alike = torch.stack(
        [old.probs.argmax(-1) == new.probs.argmax(-1) for old, new in zip(before, heads(), strict=True)]
    )
    assert constraint.measure().agreement == pytest.approx(float(alike.all(0).double().mean()))


def test_an_action_that_is_never_valid_is_free() -> None:
    model = build().learn(64)
    buffer = RetentionBuffer.collect(model, envs(), n_states=60)
    constraint = RetentionConstraint(model.policy, buffer)
    linearised = constraint.linearise(constraint.train)
    columns = linearised.jacobian.dense().split(constraint.parameters.sizes, 1)
    head = dict(zip(constraint.names, columns, strict=True))["action_net.bias"]
    assert not head[:, -1].any() and head[:, :-1].any()
    with torch.no_grad():
        model.policy.action_net.bias[-1] += 50.0
    assert constraint.divergence() < 1e-12


@pytest.mark.parametrize("kind", SIZES)
def test_a_protected_maskable_ppo_learns_inside_the_budget_and_saves_a_stock_zip(kind: str, tmp_path: Path) -> None:
    model = build(kind).learn(64)
    buffer = RetentionBuffer.collect(model, envs(kind), n_states=60)
    before = model.policy.action_net.weight.detach().clone()
    assert protect(model, retain=buffer, kl_budget=1e-3) is model
    model.learn(256)
    assert independent_kl(model, buffer) <= within(1e-3, buffer) and model.retention_report().updates == 4
    assert not torch.equal(before, model.policy.action_net.weight)
    model.save(tmp_path / "agent.zip")
    stock = MaskablePPO.load(tmp_path / "agent.zip", device="cpu")
    observations = np.array(buffer.observations)
    masks = valid(observations, kind)
    played = [m.predict(observations, deterministic=True, action_masks=masks)[0] for m in (stock, model)]
    assert np.array_equal(*played)


def test_an_environment_without_masks_leaves_every_action_valid() -> None:
    env = DummyVecEnv([Open])
    model = build(env=env)
    with masked_by(env, model.policy) as masks:
        model.policy.action_net(torch.zeros(1, 8))
    buffer = RetentionBuffer.collect(model, env, n_states=20)
    assert masks == [] and (buffer.outputs > -1e7).all()
    assert not isinstance(RetentionConstraint(model.policy, buffer).metric, MaskedCategorical)


def test_other_policies_are_not_masked() -> None:
    model = PPO("MlpPolicy", DummyVecEnv([Open]), device="cpu")
    with masked_by(envs(), model.policy) as masks:
        assert not model.policy.action_net._forward_hooks and masks == []


def test_masks_of_another_size_are_refused() -> None:
    class Short(Corridor):
        def action_masks(self) -> np.ndarray:
            return super().action_masks()[:3]

    env = DummyVecEnv([Short])
    with pytest.raises(NsrlError, match="has 3 entries, but the policy has 4 logits"):
        RetentionBuffer.collect(build(env=env), env, n_states=5)


@pytest.mark.filterwarnings("error:.*exist only pickled")
@pytest.mark.parametrize("kind", SIZES)
def test_a_zip_is_loaded_without_unpickling_and_protected(kind: str, tmp_path: Path) -> None:
    model = build(kind).learn(64)
    model.save(tmp_path / "agent.zip")
    agent = agents.load(tmp_path / "agent.zip", envs(kind))
    assert type(agent.model) is MaskablePPO and agents.load(agent) is agent
    assert agents.fingerprint(agent.model.policy) == agents.fingerprint(model.policy)
    assert agent.model.n_steps == 32 and agent.hyperparameters["n_epochs"] == 3
    buffer = RetentionBuffer.collect(tmp_path / "agent.zip", envs(kind), n_states=60)
    assert buffer.digest() == RetentionBuffer.collect(model, envs(kind), n_states=60).digest()
    fine = protect(agents.attach_env(tmp_path / "agent.zip", envs(kind), seed=3), retain=buffer, kl_budget=1e-3)
    fine.learn(3 * 32 * 4)
    report = fine.retention_report()
    assert report.updates == 4 and 0.0 < independent_kl(fine, buffer) <= within(1e-3, buffer)
    stock = MaskablePPO.load(agents.export(fine, tmp_path / "fine"), device="cpu")
    observations = np.array(buffer.observations)
    masks = valid(observations, kind)
    played = [m.predict(observations, deterministic=True, action_masks=masks)[0] for m in (stock, fine)]
    assert np.array_equal(*played)


@pytest.mark.parametrize("algorithm", [NullSpacePPO, NullSpaceTRPO])
def test_other_algorithms_say_how_to_keep_a_maskable_agent_s_own(algorithm: Any, tmp_path: Path) -> None:
    model = build()
    model.save(tmp_path / "agent.zip")
    for source in (model, tmp_path / "agent.zip", agents.load(tmp_path / "agent.zip")):
        with pytest.raises(NsrlError, match=r"MaskablePPO, whose action masks .*attach_env.*protect\(model") as caught:
            algorithm.from_pretrained(source, envs())
        assert "\n" not in str(caught.value)


def test_attaching_an_environment_takes_statistics_along_and_leaves_the_policy_alone(tmp_path: Path) -> None:
    model = build(env=VecNormalize(envs())).learn(96)
    agents.export(model, tmp_path / "agent")
    agent = agents.load(tmp_path / "agent.zip")
    before = agents.fingerprint(agent.model.policy)
    attached = agents.attach_env(agent, DummyVecEnv([Corridor] * 2), seed=0)
    around = attached.get_vec_normalize_env()
    assert attached is agent.model and attached.n_envs == 2 and agents.fingerprint(attached.policy) == before
    assert around is not None and np.array_equal(around.obs_rms.mean, model.get_vec_normalize_env().obs_rms.mean)
    attached.learn(64)
    with pytest.raises(NsrlError, match="action space"):
        agents.attach_env(agent, envs("multi"))


class Scored(Corridor):
    """The reward tells the actions apart."""

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        after, _, terminated, truncated, info = super().step(action)
        return after, float((np.ravel(action) + 1) @ [1.0, 10.0][: np.size(action)]), terminated, truncated, info


@pytest.mark.parametrize("kind", SIZES)
def test_evaluation_plays_under_the_masks_of_the_environment(kind: str, tmp_path: Path) -> None:
    model = build(kind).learn(64)
    expected = []
    for episode in range(5):
        env = Scored(kind)
        seen, total, done = env.reset(seed=50 + episode)[0], 0.0, False
        while not done:
            action = model.predict(seen, deterministic=True, action_masks=env.action_masks())[0]
            seen, reward, done, _, _ = env.step(action)
            total += reward
        expected.append(total)
    copies = [Scored(kind), Scored(kind)]
    vectors = DummyVecEnv([lambda: Scored(kind)] * 2)
    model.save(tmp_path / "agent.zip")
    for played in (Scored(kind), copies, vectors):
        found = evaluate(tmp_path / "agent.zip", played, episodes=5, seed=50)
        # DummyVecEnv seeds its next episodes itself, so that only those from fresh seeds are comparable
        assert found.returns[:2] == tuple(expected[:2]) and len(found.returns) == 5
    assert evaluate(model, copies, episodes=5, seed=50).returns == tuple(expected)
    drawn = evaluate(model, copies, episodes=5, seed=50, deterministic=False)  # Corridor refuses what is not valid
    assert drawn.returns != tuple(expected)
    assert drawn.returns == evaluate(model, Scored(kind), episodes=5, seed=50, deterministic=False).returns


def test_masked_returns_are_those_of_sb3_contrib() -> None:
    model = build().learn(64)
    theirs, _ = evaluate_policy(model, DummyVecEnv([Scored]), n_eval_episodes=300, warn=False)
    ours = evaluate(model, DummyVecEnv([Scored] * 10), episodes=300)
    assert ours.mean == pytest.approx(theirs, abs=4 * ours.std / 300**0.5 * 2**0.5)
    free = model.policy.predict(np.zeros((1, 3), np.float32), deterministic=True)[0]
    assert evaluate(model, Open(), episodes=1).returns and free.shape == (1,)


def test_arrays_carry_masks() -> None:
    model = build().learn(64)
    collected = RetentionBuffer.collect(model, envs(), n_states=40)
    masks = valid(np.asarray(collected.observations))
    options = {"heldout": collected.heldout}
    labelled = RetentionBuffer.from_arrays(collected.observations, model, action_masks=masks, **options)
    assert labelled.digest() == collected.digest()
    given = RetentionBuffer.from_arrays(
        collected.observations,
        outputs=np.where(masks, collected.outputs, 0.0),
        action_space=model.action_space,
        action_masks=masks,
        **options,
    )
    assert given.digest() == collected.digest()
    both = RetentionBuffer.from_agents([model, model], envs(), 20, reference=model)
    assert np.array_equal(both.outputs > -1e7, valid(np.asarray(both.observations)))
    both.check(model)
    for wrong in (masks[:5], masks.astype(int), np.zeros_like(masks)):
        with pytest.raises(NsrlError, match="must be bool"):
            RetentionBuffer.from_arrays(collected.observations, model, action_masks=wrong)
    with pytest.raises(NsrlError, match="pass it action_masks"):
        RetentionBuffer.from_arrays(collected.observations, model)


def test_surgery_widens_a_maskable_agent_and_refuses_to_add_actions() -> None:
    model = build().learn(64)
    buffer = RetentionBuffer.collect(model, envs(), n_states=40)
    wide = surgery.add_context(model, 1, scale=0.1)
    assert type(wide) is MaskablePPO
    surgery.widen_buffer(buffer, wide).check(wide)
    with pytest.raises(NsrlError, match="cannot be added to a MaskablePPO"):
        surgery.add_actions(model, 1)


logits = st.lists(st.floats(-5, 5), min_size=4, max_size=4)


@given(old=logits, new=logits, masks=st.lists(st.booleans(), min_size=4, max_size=4).filter(any))
def test_the_kl_over_all_actions_bounds_the_masked_one_only_by_the_mass_of_the_valid(
    old: list[float], new: list[float], masks: list[bool]
) -> None:
    reference, outputs, valid = (torch.tensor([values], dtype=torch.float64) for values in (old, new, masks))
    masked = torch.where(valid.bool(), reference, INVALID)
    kept = float(MaskedCategorical((4,), 0.0, valid.bool()).divergence(masked, outputs))
    whole = float(kl_divergence(Categorical(logits=reference), Categorical(logits=outputs)))
    mass = float((reference.softmax(-1) * valid).sum())
    assert -1e-12 <= kept <= whole / mass + 1e-9


def test_a_small_kl_over_all_actions_can_hide_a_large_masked_one() -> None:
    valid = torch.tensor([[False, True, True]])
    reference, outputs = torch.tensor([[10.0, 2.0, 0.0]]), torch.tensor([[10.0, 0.0, 2.0]])
    whole = kl_divergence(Categorical(logits=reference), Categorical(logits=outputs))
    masked = MaskedCategorical((3,), 0.0, valid).divergence(torch.where(valid, reference, INVALID), outputs)
    assert float(whole) < 1e-3 and float(masked) > 1.0
