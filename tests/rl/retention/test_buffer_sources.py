"""Retention buffers from arrays, Minari data sets, several agents and other buffers, and whose they are."""

from __future__ import annotations

import builtins
import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv
from torch.distributions import Normal, kl_divergence

from nsrl import NullSpacePPO, RetentionBuffer, protect
from nsrl.errors import NsrlError
from nsrl.rl import agents
from nsrl.rl.agents.normalization import ObservationNormalizer
from nsrl.rl.policies.observations import reference_outputs
from nsrl.rl.retention.constraint import RetentionConstraint
from tests.rl.builders import NEW, OLD, SMALL, build_agent, generators_left_alone, trained, unzipped, zipped
from tests.rl.oracles import independent_kl, within

STATISTICS = ObservationNormalizer(np.full(5, 0.1), np.full(5, 4.0))


def other_agent(kind: str = "discrete") -> PPO:
    """An agent that behaves unlike that of `trained`; a copy for every call."""
    with generators_left_alone():
        return unzipped(_other_agent(kind), kind)


@lru_cache(maxsize=2)
def _other_agent(kind: str) -> bytes:
    agent = build_agent(kind, seed=5)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return zipped(agent)


# ------------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_arrays_labelled_by_an_agent_are_as_if_collected(kind: str) -> None:
    agent, collected = trained(kind)
    buffer = RetentionBuffer.from_arrays(collected.observations, agent, heldout=collected.heldout, task="old task")
    assert buffer.digest() == collected.digest()
    assert buffer.tasks == ("old task",)
    buffer.check(agent)
    given = RetentionBuffer.from_arrays(
        collected.observations,
        outputs=collected.outputs,
        action_space=agent.action_space,
        log_std=collected.log_std,
        heldout=collected.heldout,
    )
    assert given.digest() == collected.digest()
    given.check(agent)


def test_the_split_and_the_weights_of_arrays() -> None:
    agent, collected = trained()
    weights = np.linspace(0.0, 8.0, len(collected))
    one, two = (
        RetentionBuffer.from_arrays(collected.observations, agent, weights=weights, heldout=0.25, seed=seed)
        for seed in (0, 0)
    )
    assert one.digest() == two.digest() and one.heldout.sum() == 40
    np.testing.assert_allclose(one.weights, weights / weights.mean(), rtol=1e-6)
    assert not np.array_equal(RetentionBuffer.from_arrays(collected.observations, agent, seed=1).heldout, one.heldout)


def test_dict_and_multi_discrete_arrays() -> None:
    observations = {"a": np.zeros((6, 2)), "b": np.ones((6, 3))}
    buffer = RetentionBuffer.from_arrays(
        observations, outputs=np.zeros((6, 5)), action_space=spaces.MultiDiscrete([2, 3]), heldout=0.0
    )
    assert buffer.family == "multi_categorical" and buffer.nvec == (2, 3) and buffer.outputs.dtype == np.float32
    coins = RetentionBuffer.from_arrays(observations, outputs=np.zeros((6, 4)), action_space=spaces.MultiBinary(4))
    assert coins.family == "bernoulli" and len(coins.heldout_indices) == 1


def test_arrays_that_do_not_fit_are_refused() -> None:
    agent, collected = trained()
    states = np.asarray(collected.observations)
    two = spaces.Discrete(2)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (states, {}, "either the agent"),
        (states, {"agent": agent, "outputs": collected.outputs}, "either the agent"),
        (states, {"outputs": collected.outputs}, "action_space is None"),
        (states, {"outputs": collected.outputs, "action_space": spaces.Discrete(3)}, r"needs \(N, 3\)"),
        (states, {"outputs": collected.outputs[:5], "action_space": two}, "observations has shape"),
        (states, {"outputs": collected.outputs, "action_space": spaces.Box(-1, 1, (2,))}, "log_std must be given"),
        (states[:, :3], {"agent": agent}, r"observations has shape \(160, 3\)"),
        ({"a": states}, {"agent": agent}, r"keys \['a'\]"),
        (states[:0], {"agent": agent}, "observations is empty"),
        (states, {"agent": agent, "heldout": 1.0}, "heldout is 1.0"),
        (states, {"agent": agent, "weights": -np.ones(160)}, "weights must not be negative"),
        (states, {"agent": agent, "weights": np.ones(3)}, "weights has shape"),
        (
            states,
            {"agent": agents.Agent(agent, STATISTICS), "normalizer": ObservationNormalizer(np.zeros(5), np.ones(5))},
            "other observation statistics",
        ),
        (states, {"agent": 3}, "must be an on-policy"),
    ]
    for observations, options, message in cases:
        with pytest.raises(NsrlError, match=message):
            RetentionBuffer.from_arrays(observations, **options)


# ------------------------------------------------------------------------------------------------------- minari


def episode(seed: int, steps: int, terminated: bool, width: int = 5) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    ends = np.arange(steps) == steps - 1
    return {
        "observations": rng.standard_normal((steps + 1, width)).astype(np.float32),
        "actions": rng.integers(0, 2, steps),
        "rewards": rng.standard_normal(steps),
        "terminations": ends & terminated,
        "truncations": ends & (not terminated),
        "infos": {},
    }


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """30 steps in three episodes, the second cut off by a time limit."""
    minari = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    agent, _ = trained()
    episodes = [EpisodeBuffer(id=i, **episode(i, 8 + 2 * i, i != 1)) for i in range(3)]
    return minari.create_dataset_from_buffers(
        "cartpole/test-v0",
        episodes,
        observation_space=agent.observation_space,
        action_space=agent.action_space,
        algorithm_name="none",
        author="nobody",
        author_email="nobody@example.com",
        code_permalink="none",
    )


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
def test_minari_states_are_labelled_by_the_agent(dataset: Any, tmp_path: Path) -> None:
    agent, _ = trained()
    every = np.concatenate([episode(i, 8 + 2 * i, i != 1)["observations"][:-1] for i in range(3)])
    whole = RetentionBuffer.from_minari(dataset, agent, n_states=30)
    np.testing.assert_array_equal(whole.observations, every)
    np.testing.assert_array_equal(whole.outputs, reference_outputs(agent.policy, every, None))
    whole.check(agent)
    some = RetentionBuffer.from_minari("cartpole/test-v0", agent, n_states=12, seed=3, task="old")
    rows = [np.flatnonzero((every == row).all(1)) for row in np.asarray(some.observations)]
    assert len({int(row[0]) for row in rows}) == 12 and some.tasks == ("old",)
    again = RetentionBuffer.from_minari(tmp_path / "cartpole" / "test-v0", agent, n_states=12, seed=3)
    assert again.digest() == some.digest()
    with pytest.raises(NsrlError, match="has only 30 steps"):
        RetentionBuffer.from_minari(dataset, agent, n_states=31)
    with pytest.raises(NsrlError, match="observation space"):
        RetentionBuffer.from_minari(dataset, trained("box")[0], n_states=5)


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
def test_minari_advantages_are_those_of_generalised_advantage_estimation(dataset: Any) -> None:
    agent, _ = trained()
    gamma, lam = agent.gamma, agent.gae_lambda
    expected = []
    for index in range(3):
        data = episode(index, 8 + 2 * index, index != 1)
        with torch.no_grad():
            values = agent.policy.predict_values(torch.tensor(data["observations"]))[:, 0].numpy()
        if data["terminations"][-1]:
            values[-1] = 0.0
        deltas = data["rewards"] + gamma * values[1:] - values[:-1]
        expected += [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]
    best = np.sort(np.argsort(expected)[-6:])
    every = np.concatenate([episode(i, 8 + 2 * i, i != 1)["observations"][:-1] for i in range(3)])
    buffer = RetentionBuffer.from_minari(dataset, agent, n_states=6, select="advantage", quantile=0.2)
    np.testing.assert_array_equal(buffer.observations, every[best])


def test_minari_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if name == "minari" and level == 0 and not fromlist:
            raise ImportError("No module named 'minari'")
        return real(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(NsrlError, match=r"pip install \"nsrl\[minari\]\""):
        RetentionBuffer.from_minari("anything-v0", trained()[0])


def test_minari_data_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    for wrong, message in (("no/such-v0", "minari download"), (3, "must be a MinariDataset"), (tmp_path, "cannot be")):
        with pytest.raises(NsrlError, match=message):
            RetentionBuffer.from_minari(wrong, trained()[0])


# ----------------------------------------------------------------------------------------- several, and sequences


def test_several_agents() -> None:
    agent, other = trained()[0], other_agent()
    options = {"n_states": 20, "n_envs": 2, "oversample": 1.0}
    both = RetentionBuffer.from_agents([agent, other], OLD["discrete"], **options)
    parts = [RetentionBuffer.collect(a, OLD["discrete"], seed=i, **options) for i, a in enumerate((agent, other))]
    assert both.digest() == RetentionBuffer.merge(parts).digest()
    assert both.source.tolist() == [0] * 20 + [1] * 20
    labelled = RetentionBuffer.from_agents([agent, other], [OLD["discrete"]] * 2, reference=agent, **options)
    np.testing.assert_array_equal(labelled.observations, both.observations)
    np.testing.assert_array_equal(labelled.outputs, reference_outputs(agent.policy, both.observations, None))
    with pytest.raises(NsrlError, match="2 agents and 1 environments"):
        RetentionBuffer.from_agents([agent, other], [OLD["discrete"]])


def merged_boxes() -> tuple[PPO, RetentionBuffer, list[RetentionBuffer]]:
    """Two Gaussian agents of different spread and their merged buffers, the second weighted."""
    agent, first = trained("box")
    second = RetentionBuffer.collect(other_agent("box"), NEW["box"], n_states=40, n_envs=2, seed=1)
    second = replace(second, weights=np.linspace(1, 5, 40, dtype=np.float32))
    return agent, RetentionBuffer.merge([first, second]), [first, second]


def test_merged_buffers_keep_what_each_state_is_held_to(tmp_path: Path) -> None:
    _, merged, parts = merged_boxes()
    assert merged.log_std is not None and merged.log_std.shape == (2, 1) and len(merged) == 200
    assert merged.tasks == (OLD["box"], NEW["box"]) and merged.weights.mean() == pytest.approx(1.0)
    nested = RetentionBuffer.merge([RetentionBuffer.merge(parts[:1]), merged])
    assert nested.tasks == (OLD["box"], OLD["box"], NEW["box"]) and nested.source.max() == 2
    loaded = RetentionBuffer.load(merged.save(tmp_path / "merged.npz"))
    assert loaded.digest() == merged.digest() and loaded.tasks == merged.tasks
    with np.load(tmp_path / "merged.npz") as file, np.load(parts[0].save(tmp_path / "one.npz")) as one:
        assert file["format"] == 2 and one["format"] == 1 and "source" not in one.files
    assert RetentionBuffer.merge([parts[0]]).digest() == parts[0].digest()


def test_kl_of_a_merged_buffer_is_that_of_torch_by_task_spread_and_weight() -> None:
    agent, merged, parts = merged_boxes()
    constraint = RetentionConstraint(agent.policy, merged)
    with torch.no_grad():
        means = agent.policy.get_distribution(merged.inputs()).distribution.mean
        now = agent.policy.log_std.exp()
        kl = []
        for buffer, rows in zip(parts, (means[:160], means[160:]), strict=True):
            reference = Normal(torch.tensor(buffer.outputs), torch.tensor(buffer.log_std).exp())
            kl.append(kl_divergence(reference, Normal(rows, now)).sum(1).double().numpy())
    weights = [np.ones(160), np.linspace(1, 5, 40) / 3]
    expected = [np.average(values, weights=w) for values, w in zip(kl, weights, strict=True)]
    measured = constraint.measure()
    assert measured.kl_by_task == pytest.approx(dict(zip(merged.tasks, expected, strict=True)), rel=1e-4, abs=1e-9)
    assert measured.kl_mean == pytest.approx(np.average(np.concatenate(kl), weights=np.concatenate(weights)), rel=1e-4)
    assert RetentionConstraint(agent.policy, parts[0]).measure().kl_by_task == {}


@pytest.mark.parametrize("preserve", ["distribution", "mode"])
def test_the_gradient_and_linearisation_of_a_merged_buffer(preserve: str) -> None:
    agent, merged, _ = merged_boxes()
    constraint = RetentionConstraint(agent.policy, merged, preserve)
    states = constraint.train
    spread = torch.tensor(merged.spreads).double()
    now = agent.policy.log_std.double() if preserve == "distribution" else spread
    means = agent.policy.get_distribution(merged.inputs()).distribution.mean.double()
    kl = kl_divergence(Normal(torch.tensor(merged.outputs).double(), spread.exp()), Normal(means, now.exp())).sum(1)
    kl = kl[states]
    weights = torch.tensor(merged.weights).double()[states]
    loss = (weights * kl).sum() / weights.sum()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, constraint.parameters.parameters)])
    value, gradient = constraint.gradient(states)
    assert value == pytest.approx(float(loss.detach()), rel=1e-4)
    torch.testing.assert_close(gradient, expected.float(), rtol=1e-3, atol=1e-6)
    model = constraint.linearise(states)
    assert model.divergence == pytest.approx(value)
    torch.testing.assert_close(model.jacobian.rmatvec(model.residual), gradient, rtol=1e-3, atol=1e-6)


def test_a_sequence_is_fine_tuned_with_kl_reported_by_task() -> None:
    agent, first = trained()
    second = RetentionBuffer.collect(agent, NEW["discrete"], n_states=40, n_envs=2)
    model = NullSpacePPO.from_pretrained(
        agent, make_vec_env(NEW["discrete"], 2, seed=0), RetentionBuffer.merge([first, second]), kl_budget=1e-3, **SMALL
    )
    model.learn(256)
    report = model.retention_report()
    buffer = model.retention.constraint.buffer
    assert independent_kl(model, buffer) <= within(1e-3, buffer)
    assert set(report.kl_by_task) == {OLD["discrete"], NEW["discrete"]}
    assert report.kl_mean == pytest.approx(np.average(list(report.kl_by_task.values()), weights=[160, 40]))


def test_buffers_that_cannot_be_merged() -> None:
    _, first = trained()
    normalized = replace(first, normalizer=STATISTICS)
    with pytest.raises(NsrlError, match="no buffers"):
        RetentionBuffer.merge([])
    with pytest.raises(NsrlError, match="different spaces"):
        RetentionBuffer.merge([first, trained("box")[1]])
    with pytest.raises(NsrlError, match="different observation statistics"):
        RetentionBuffer.merge([first, normalized])
    assert RetentionBuffer.merge([first, normalized], STATISTICS).normalizer is STATISTICS
    with pytest.raises(NsrlError, match="source has entries from 1 to 1"):
        replace(first, source=np.ones(160, dtype=np.int64))


# ----------------------------------------------------------------------------------------------- whose buffer it is


def test_the_measured_kl_decides_whose_buffer_it_is() -> None:
    agent, buffer = trained()
    twin = PPO("MlpPolicy", agent.get_env(), device="cpu", seed=3, **SMALL)
    state = agent.policy.state_dict()
    critic = {key: value + 1.0 for key, value in state.items() if "value" in key}
    twin.policy.load_state_dict({**state, **critic})
    assert agents.fingerprint(twin.policy) != agents.fingerprint(agent.policy)
    buffer.check(twin)  # another critic, the same policy
    kl = RetentionConstraint(other_agent().policy, buffer).measure().kl_mean
    assert kl > 1e-3
    message = rf"another agent \(fingerprint .*mean KL of {kl:.3g} .*trust_agent=True \(trust_buffer"
    with pytest.raises(NsrlError, match=message):
        protect(other_agent(), buffer)
    # the same weights, but outputs that are not theirs
    shifted = replace(buffer, outputs=buffer.outputs + np.float32([0.5, 0.0]))
    with pytest.raises(NsrlError, match="another agent: on its states"):
        shifted.check(agent)
    shifted.check(agent, trust_agent=True)


def test_a_merged_buffer_belongs_to_the_agent_of_any_of_its_sources() -> None:
    agent, first = trained()
    second = RetentionBuffer.collect(other_agent(), NEW["discrete"], n_states=20, n_envs=2)
    merged = RetentionBuffer.merge([first, second])
    merged.check(agent)
    merged.check(other_agent())
    with pytest.raises(NsrlError, match="another agent"):
        merged.check(build_agent("discrete", seed=9))
    assert math.isfinite(RetentionConstraint(agent.policy, merged).divergence())


def test_the_environment_of_a_merged_buffer_is_checked_as_ever() -> None:
    agent, first = trained()
    with pytest.raises(NsrlError, match="the environment has the observation space"):
        RetentionBuffer.merge([first, first]).check(agent, gym.make("Pendulum-v1"))


IMAGES = spaces.Box(0, 255, (1, 36, 36), np.uint8)


def image_agent(space: spaces.Space = IMAGES) -> PPO:
    class Still(gym.Env):
        observation_space, action_space = space, spaces.Discrete(3)

    kind = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "CnnPolicy"
    return PPO(kind, DummyVecEnv([Still]), n_steps=8, batch_size=8, seed=0, device="cpu")


def test_images_are_taken_as_the_environment_gives_them_and_never_scaled_twice() -> None:
    agent = image_agent()
    images = np.random.default_rng(0).integers(0, 256, (20, 1, 36, 36), dtype=np.uint8)
    right = RetentionBuffer.from_arrays(images, agent)
    with torch.no_grad():
        logits = agent.policy.get_distribution(torch.as_tensor(images)).distribution.logits
        wanted = logits - logits.mean(1, keepdim=True)
    found = torch.tensor(right.outputs)
    # logits up to a common shift; float32 sums of a few thousand terms
    torch.testing.assert_close(found - found.mean(1, keepdim=True), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(NsrlError, match=r"holds fractions.*0 to 255"):
        RetentionBuffer.from_arrays(images.astype(np.float32) / 255.0, agent)
    with pytest.raises(NsrlError, match="scaled again"):
        RetentionBuffer.from_arrays((images > 127).astype(np.float64), agent)
    with pytest.raises(NsrlError, match=r"values from .* to 510"):
        RetentionBuffer.from_arrays(2 * images.astype(np.int64), agent)
    given = {"outputs": right.outputs, "action_space": agent.action_space}
    with pytest.raises(NsrlError, match="holds fractions"):
        RetentionBuffer.from_arrays(images / 255.0, observation_space=IMAGES, **given)
    assert RetentionBuffer.from_arrays(images.astype(np.float32), agent).digest() == right.digest()
    dark = np.zeros_like(images)
    dark[:, 0, 0, 0] = 1
    assert len(RetentionBuffer.from_arrays(dark, agent)) == 20
    with pytest.raises(NsrlError, match="holds fractions"):
        protect(agent, replace(right, observations=(images / 255.0).astype(np.float32)), trust_buffer=True)


def test_numbers_that_are_no_observations_of_their_space_are_refused() -> None:
    agent = image_agent(spaces.Dict({"a": spaces.Discrete(3), "b": spaces.Box(0.0, 1.0, (2,))}))
    ones = np.ones((4, 2), np.float32)
    RetentionBuffer.from_arrays({"a": np.array([0.0, 1.0, 2.0, 1.0]), "b": ones}, agent)
    for a, b, message in (
        (np.array([0.5, 1.0, 2.0, 1.0]), ones, r"observations\['a'\] holds fractions"),
        (np.array([0, 1, 2, 3]), ones, "values from 0 to 3"),
        (np.array([0, 1, 2, 1]), np.full((4, 2), 255, np.uint8), "whole numbers up to 255"),
    ):
        with pytest.raises(NsrlError, match=message):
            RetentionBuffer.from_arrays({"a": a, "b": b}, agent)
