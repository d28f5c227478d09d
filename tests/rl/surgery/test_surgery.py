"""Policy surgery against stock SB3: the enlarged agent is the old one on what the old one knew."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from sb3_contrib import TRPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch.distributions import Categorical, kl_divergence

from nsrl import NullSpacePPO, RetentionBuffer
from nsrl.errors import NsrlError
from nsrl.projection import jacobian
from nsrl.projection.budget.projection import SpectralProjection
from nsrl.rl import agents, surgery
from nsrl.rl.policies.actor_critic import policy_outputs
from tests.rl.builders import SMALL, trained
from tests.rl.oracles import WIDTHS, independent_kl, within
from tests.rl.surgery.builders import TINY, VECTOR, Still, build, function_of, normal
from tests.tolerances import assert_near


def assert_equal_functions(first: torch.Tensor, second: torch.Tensor) -> None:
    assert_near(first, second, terms=WIDTHS)


# ------------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("algorithm", [PPO, A2C, TRPO])
@pytest.mark.parametrize(
    ("net_arch", "share"), [([16, 16], True), ([], True), ({"pi": [8], "vf": []}, False), ({"pi": [], "vf": [8]}, True)]
)
def test_a_context_changes_nothing(algorithm: Any, net_arch: Any, share: bool, tmp_path: Any) -> None:
    model = build(VECTOR, spaces.Box(-1, 1, (2,)), algorithm, net_arch=net_arch, share_features_extractor=share)
    model.learn(16)
    wide = surgery.add_context(model, 2)
    old = normal(50, 4)
    both = np.concatenate([old, normal(50, 2, seed=1)], 1)
    assert_equal_functions(function_of(wide, both), function_of(model, old))
    assert torch.equal(wide.policy.log_std, model.policy.log_std)
    assert type(wide) is algorithm and wide.num_timesteps == model.num_timesteps and wide.gamma == model.gamma
    assert not wide.policy.optimizer.state and type(wide.policy.optimizer) is type(model.policy.optimizer)
    wide.save(tmp_path / "wide.zip")
    stock = algorithm.load(tmp_path / "wide.zip", env=Still(wide.observation_space, wide.action_space), device="cpu")
    assert torch.equal(function_of(stock, both), function_of(wide, both))
    stock.learn(8)


@settings(max_examples=15, deadline=None)
@given(size=st.integers(5, 9), data=st.data())
def test_new_entries_can_be_anywhere(size: int, data: Any) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=size - 4, max_size=size - 4, unique=True))
    model = build()
    wide = surgery.widen_observation(model, spaces.Box(-np.inf, np.inf, (size,)), positions)
    observations = normal(20, size)
    assert_equal_functions(function_of(wide, observations), function_of(model, np.delete(observations, positions, 1)))


def test_arrays_of_several_dimensions_need_positions() -> None:
    model = build(spaces.Box(-1, 1, (2, 3)))
    larger = spaces.Box(-1, 1, (2, 4))
    wide = surgery.widen_observation(model, larger, [3, 7])
    observations = normal(20, 2, 4)
    assert_equal_functions(function_of(wide, observations), function_of(model, observations[:, :, :3]))
    with pytest.raises(NsrlError, match="pass positions"):
        surgery.widen_observation(model, larger)


def test_dict_observations_take_new_keys_and_longer_vectors() -> None:
    parts = {"b": spaces.Box(-1, 1, (3,)), "d": spaces.Discrete(4), "image": spaces.Box(0, 255, (3, 36, 36), np.uint8)}
    model = build(spaces.Dict(parts))
    larger = spaces.Dict({**parts, "b": spaces.Box(-1, 1, (5,)), "a": spaces.Box(-1, 1, (2,)), "z": spaces.Discrete(2)})
    larger.seed(0)
    samples = [larger.sample() for _ in range(20)]
    new = {key: np.stack([sample[key] for sample in samples]) for key in larger.spaces}
    old = {"b": new["b"][:, [1, 2, 4]], "d": new["d"], "image": new["image"]}
    wide = surgery.widen_observation(model, larger, {"b": [0, 3]})
    assert_equal_functions(function_of(wide, new), function_of(model, old))
    context = surgery.add_context(model, 2)
    assert list(context.observation_space.spaces) == [*model.observation_space.spaces, "context"]
    assert_equal_functions(function_of(context, {**old, "context": normal(20, 2)}), function_of(model, old))
    with pytest.raises(NsrlError, match="has a key 'b' already"):
        surgery.add_context(model, 2, key="b")


def test_weights_that_are_not_zero_wait_for_the_context() -> None:
    model = build()
    wide = surgery.add_context(model, 1, scale=0.1)
    old = normal(30, 4)
    off, on = (function_of(wide, np.concatenate([old, np.full((30, 1), bit, np.float32)], 1)) for bit in (0.0, 1.0))
    assert_equal_functions(off, function_of(model, old))
    assert float((on - off).abs().min()) > 0.0
    again = surgery.add_context(model, 1, scale=0.1)
    assert torch.equal(wide.policy.mlp_extractor.policy_net[0].weight, again.policy.mlp_extractor.policy_net[0].weight)


def test_observation_statistics_grow_with_the_agent() -> None:
    env = VecNormalize(DummyVecEnv([lambda: Still(VECTOR, spaces.Discrete(3))]))
    model = PPO("MlpPolicy", env, **TINY).learn(32)
    with pytest.raises(NsrlError, match=r"agents\.load"):
        surgery.add_context(model, 2)
    agent = agents.load(model)
    wide = surgery.widen_observation(agent, spaces.Box(-np.inf, np.inf, (6,)), [0, 3])
    raw = normal(20, 6)
    assert agent.normalizer is not None and wide.normalizer is not None
    new, old = wide.normalizer.normalize(raw), agent.normalizer.normalize(raw[:, [1, 2, 4, 5]])
    np.testing.assert_array_equal(new[:, [1, 2, 4, 5]], old)
    np.testing.assert_allclose(new[:, [0, 3]], raw[:, [0, 3]], rtol=1e-6)
    assert_equal_functions(function_of(wide.model, new), function_of(model, old))


def test_building_leaves_random_numbers_and_the_old_agent_alone() -> None:
    model = build()
    before, weights = (torch.get_rng_state(), np.random.get_state()[1].copy()), agents.fingerprint(model.policy)
    surgery.add_context(model, 1, scale=0.1)
    surgery.add_actions(model, 1)
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])
    assert agents.fingerprint(model.policy) == weights


# --------------------------------------------------------------------------------------------------- null space


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_weights_of_a_context_that_is_zero_are_exactly_in_the_null_space(scale: float) -> None:
    model = surgery.add_context(build(), 2, scale=scale)
    old = torch.tensor(normal(30, 6))
    old[:, 4:] = 0.0
    names = [name for name, _ in model.policy.named_parameters() if "value" not in name]
    rows = jacobian(model.policy, old, forward=policy_outputs, parameters=names)
    start, columns = 0, {}
    for name in rows.names:
        size = model.policy.get_parameter(name).numel()
        columns[name] = torch.arange(start, start + size)
        start += size
    new = columns["mlp_extractor.policy_net.0.weight"].view(16, 6)[:, 4:].flatten()
    assert float(rows.dense()[:, new].abs().max()) == 0.0
    assert float(rows.dense().abs().max()) > 0.0
    vector = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0))
    projected = SpectralProjection(rows, torch.zeros(rows.shape[0]), 0.0).null(vector)
    assert torch.equal(projected[new], vector[new])
    assert float((projected - vector).norm()) > 0.1
    # hence steps of any size along them leave the old behaviour where it is, to the last bit
    before = policy_outputs(model.policy, old)
    with torch.no_grad():
        model.policy.mlp_extractor.policy_net[0].weight[:, 4:] += 100.0
    assert torch.equal(policy_outputs(model.policy, old), before)


def test_a_widened_agent_is_fine_tuned_inside_the_budget_of_its_old_buffer() -> None:
    old = make_vec_env("CartPole-v1", 2, seed=0)
    model = PPO("MlpPolicy", old, seed=0, device="cpu", **SMALL).learn(256)
    buffer = RetentionBuffer.collect(model, "CartPole-v1", n_states=100, n_envs=2)
    wide = surgery.add_context(model, 1)
    retain = surgery.widen_buffer(buffer, wide)
    retain.check(wide)
    with pytest.raises(NsrlError, match="observation space"):
        buffer.check(wide)
    assert wide.observation_space == gym.make("nsrl_envs:nsrl/CartPole-v0").observation_space
    tuned = NullSpacePPO.from_pretrained(wide, "nsrl/CartPoleSwapped-v0", retain, kl_budget=1e-3, n_envs=2, seed=0)
    tuned.learn(256)
    assert independent_kl(tuned, retain) <= within(1e-3, retain)
    assert float(tuned.policy.mlp_extractor.policy_net[0].weight[:, 4].detach().abs().max()) > 0.0


# ------------------------------------------------------------------------------------------------------ actions


@settings(max_examples=10, deadline=None)
@given(count=st.integers(1, 5), margin=st.floats(-1.0, 12.0))
def test_new_actions_are_unlikely_by_the_margin(count: int, margin: float) -> None:
    model = build(actions=spaces.Discrete(3, start=1))
    wide, report = surgery.add_actions(model, count, margin=margin)
    assert wide.action_space == spaces.Discrete(3 + count, start=1)
    observations = torch.tensor(3.0 * normal(200, 4))
    with torch.no_grad():
        old, new = (policy_outputs(agent.policy, observations) for agent in (model, wide))
    assert_near(new[:, :3], old, terms=WIDTHS)
    torch.testing.assert_close(new[:, 3:], old.mean(1, keepdim=True).expand(-1, count) - margin, rtol=1e-5, atol=1e-5)
    padded = torch.cat([old.double(), torch.full((200, count), -1e9, dtype=torch.float64)], 1)
    kl = kl_divergence(Categorical(logits=padded), Categorical(logits=new.double()))
    assert float(kl.max()) <= report.kl_bound * (1 + 1e-5)
    assert 0.0 < report.kl_mean <= report.kl_max <= report.kl_bound * (1 + 1e-5)


def test_the_change_of_the_old_distribution_is_measured_on_a_buffer() -> None:
    agent, buffer = trained("discrete")
    wide, report = surgery.add_actions(agents.load(agent), 2, margin=3.0, buffer=buffer)
    retain = surgery.widen_buffer(buffer, wide, margin=3.0)
    retain.check(wide)
    probabilities = torch.softmax(torch.tensor(retain.outputs).double(), 1)
    assert report.new_probability == pytest.approx(float(probabilities[:, 2:].sum(1).max()), rel=1e-4)
    assert report.kl_mean == pytest.approx(float(-torch.log(probabilities[:, :2].sum(1)).mean()), rel=1e-4)
    with pytest.raises(NsrlError, match="pass margin"):
        surgery.widen_buffer(buffer, wide)


# ----------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_widened_is_refused_in_a_sentence() -> None:
    model = build()
    image = build(spaces.Box(0, 255, (3, 36, 36), np.uint8), spaces.Box(-1, 1, (2,)))
    cases = [
        (lambda: surgery.add_context(model, 0), "at least one entry"),
        (lambda: surgery.add_context(image, 1), "flat floating-point"),
        (lambda: surgery.widen_observation(image, spaces.Box(0, 255, (4, 36, 36), np.uint8), range(1296)), "CNN"),
        (lambda: surgery.add_context(build(spaces.Discrete(4)), 1), "flat floating-point"),
        (lambda: surgery.widen_observation(build(spaces.Discrete(4)), spaces.Discrete(5)), "only Box and Dict"),
        (lambda: surgery.widen_observation(model, VECTOR), "has nothing that"),
        (lambda: surgery.widen_observation(model, spaces.Box(-1, 1, (3,))), r"grows from \(4,\) to \(3,\)"),
        (lambda: surgery.widen_observation(model, spaces.Box(-1, 1, (6,)), [1]), "2 new entries"),
        (lambda: surgery.widen_observation(model, spaces.Box(-1, 1, (6,)), [1, 1]), "2 new entries"),
        (lambda: surgery.widen_observation(model, spaces.Box(-1, 1, (6,)), [1, 6]), "flat positions 0 to 5"),
        (lambda: surgery.widen_observation(model, spaces.Dict({"a": VECTOR})), "lacks"),
        (lambda: surgery.widen_observation(model, spaces.Box(-1, 1, (6,)), {"a": [4, 5]}), r"positions name \['a'\]"),
        (lambda: surgery.add_actions(image, 1), "Discrete action spaces only"),
        (lambda: surgery.add_actions(model, 0), "at least one action"),
        (lambda: surgery.add_actions(model, 1, margin=float("nan")), "finite margin"),
        (lambda: surgery.add_context(DQN("MlpPolicy", "CartPole-v1", buffer_size=10, device="cpu"), 1), "on-policy"),
    ]
    for call, message in cases:
        with pytest.raises(NsrlError, match=message):
            call()


def test_policies_of_cnns_and_own_extractors_are_refused() -> None:
    from stable_baselines3.common.torch_layers import FlattenExtractor

    class Own(FlattenExtractor):
        def forward(self, observations: torch.Tensor) -> torch.Tensor:
            return super().forward(observations).flip(1)

    with pytest.raises(NsrlError, match="features come from Own"):
        surgery.add_context(build(features_extractor_class=Own), 1)
    cnn = PPO("CnnPolicy", Still(spaces.Box(0, 255, (3, 36, 36), np.uint8), spaces.Discrete(2)), **TINY)
    with pytest.raises(NsrlError, match="an image, which a CNN reads"):
        surgery.widen_observation(cnn, spaces.Box(0, 255, (4, 36, 36), np.uint8), range(1296))
    wide, _ = surgery.add_actions(cnn, 1)  # the head of a CNN policy grows all the same
    assert wide.policy.action_net.out_features == 3


def test_surgery_that_changes_the_function_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsrl.rl.surgery.surgery.feature_columns", lambda *_: np.array([1, 2, 3, 4]))
    with pytest.raises(NsrlError, match="surgery changed the 3 outputs or the values by"):
        surgery.add_context(build(), 1)


@pytest.mark.parametrize("head", ["action_net", "value_net"])
def test_an_agent_that_has_diverged_is_not_widened(head: str) -> None:
    """NaN differs from NaN by NaN, which is not within any bound, wherever in a list it stands."""
    model = build()
    getattr(model.policy, head).bias.data[0] = torch.nan
    with pytest.raises(NsrlError, match="by nan on random inputs"):
        surgery.add_context(model, 2)
