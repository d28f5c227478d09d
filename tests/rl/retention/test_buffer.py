"""The retention buffer against stock SB3 (VecNormalize, distributions, RolloutBuffer) and plain NumPy."""

import json
import os
import random
import zipfile
from copy import deepcopy
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from nsrl import files
from nsrl.errors import NsrlError
from nsrl.reading.limits import Expansion
from nsrl.rl.agents.normalization import ObservationNormalizer
from nsrl.rl.agents.spaces import describe_space, same_actions, same_observations
from nsrl.rl.playing.environments import as_vec_env
from nsrl.rl.playing.rollout import advantages, critic_reward_scale, evaluation_mode, raw_observations, roll_out
from nsrl.rl.policies.actor_critic import policy_outputs
from nsrl.rl.retention.buffer import RetentionBuffer

TINY = {"n_steps": 8, "batch_size": 8, "device": "cpu", "seed": 0}


class Fake(gym.Env):
    """Random observations; ends itself at step 5 after action 0, else is cut off at step 7."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = deepcopy(observation_space), action_space
        self.time = self.total = 0

    def _observe(self):
        return self.observation_space.sample()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        self.time = 0
        return self._observe(), {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action)) or self.action_space.contains(action)
        self.time += 1
        self.total += 1
        over = self.time == 5 and float(np.sum(action)) <= 0
        return self._observe(), float(np.sin(self.total)), over, self.time == 7 and not over, {}


VECTOR = spaces.Box(-3.0, 3.0, (4,), np.float32)
IMAGE = spaces.Box(0, 255, (40, 36, 3), np.uint8)
TWO = spaces.Discrete(2)


def fake_vec(observation_space=VECTOR, action_space=TWO, n_envs=3):
    return DummyVecEnv([lambda: Fake(observation_space, action_space)] * n_envs)


def model_on(env, policy="MlpPolicy", algorithm=PPO, **options):
    settings_ = {"n_steps": 8, "device": "cpu", "seed": 0} if algorithm is A2C else TINY
    small = {"net_arch": [8]}
    return algorithm(policy, env, policy_kwargs=small, **{**settings_, **options})


@pytest.fixture
def cartpole():
    return model_on("CartPole-v1")


@pytest.fixture
def pendulum():
    return model_on("Pendulum-v1")


@pytest.fixture
def normalized():
    """A Pendulum agent whose VecNormalize has seen 200 steps."""
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 2))
    model = model_on(env, gamma=0.9)
    env.reset()
    rng = np.random.default_rng(0)
    for _ in range(100):
        env.step(rng.uniform(-2, 2, (2, 1)).astype(np.float32))
    return model, env


@pytest.fixture
def small(cartpole):
    return RetentionBuffer.collect(cartpole, "CartPole-v1", n_states=20, n_envs=2, oversample=1)


def arrays_of(buffer):
    observations = buffer.observations
    named = observations if isinstance(observations, dict) else {"": observations}
    rest = {"outputs": buffer.outputs, "heldout": buffer.heldout, "weights": buffer.weights}
    return {f"observations {key}": value for key, value in named.items()} | rest


def assert_same(first, second):
    one, other = arrays_of(first), arrays_of(second)
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key], err_msg=key, strict=True)
    for name in ("family", "nvec"):
        assert getattr(first, name) == getattr(second, name)
    assert first.provenance == second.provenance
    np.testing.assert_equal(first.log_std, second.log_std)
    for normalizer in (first.normalizer, second.normalizer):
        assert (normalizer is None) == (first.normalizer is None)
    if first.normalizer is not None:
        np.testing.assert_equal(first.normalizer.to_arrays(), second.normalizer.to_arrays())


# ------------------------------------------------------------------------------------------ what is collected


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_outputs_are_the_parameters_of_sb3s_distribution(algorithm):
    model = model_on("Pendulum-v1", algorithm=algorithm)
    buffer = RetentionBuffer.collect(model, "Pendulum-v1", n_states=50, n_envs=3)
    observations, _ = model.policy.obs_to_tensor(buffer.observations)
    with torch.no_grad():
        distribution = model.policy.get_distribution(observations).distribution
    np.testing.assert_allclose(buffer.outputs, distribution.mean.numpy(), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(np.exp(buffer.log_std), distribution.stddev[0].numpy(), rtol=1e-6)
    assert buffer.family == "gaussian"
    assert buffer.outputs.dtype == np.float32


def test_logits_give_sb3s_probabilities(cartpole):
    buffer = RetentionBuffer.collect(cartpole, "CartPole-v1", n_states=50, n_envs=2)
    with torch.no_grad():
        distribution = cartpole.policy.get_distribution(cartpole.policy.obs_to_tensor(buffer.observations)[0])
    expected = distribution.distribution.probs.numpy()
    np.testing.assert_allclose(torch.as_tensor(buffer.outputs.copy()).softmax(1), expected, rtol=1e-5)
    assert (buffer.family, buffer.log_std, buffer.nvec) == ("categorical", None, None)


@pytest.mark.parametrize(
    ("action_space", "family", "n_outputs", "nvec"),
    [
        (spaces.MultiDiscrete([2, 3]), "multi_categorical", 5, (2, 3)),
        (spaces.MultiBinary(4), "bernoulli", 4, None),
        (spaces.Box(-0.1, 0.1, (2, 2), np.float32), "gaussian", 4, None),
    ],
)
def test_other_action_spaces_are_sampled_legally_and_survive_a_file(action_space, family, n_outputs, nvec, tmp_path):
    env = fake_vec(action_space=action_space)
    model = model_on(env)
    buffer = RetentionBuffer.collect(model, env, n_states=30)
    assert (buffer.family, buffer.outputs.shape, buffer.nvec) == (family, (30, n_outputs), nvec)
    assert_same(RetentionBuffer.load(buffer.save(tmp_path / "b.npz")), buffer)
    buffer.check(model, env)


def test_actions_follow_the_policys_distribution():
    env = fake_vec(action_space=spaces.MultiDiscrete([2, 3]), n_envs=1)
    model = model_on(env)
    model.policy.action_net.bias.data = torch.tensor([0.0, 1.0, 0.0, 2.0, -1.0])
    model.policy.action_net.weight.data.zero_()
    seen = []
    step = env.envs[0].step
    env.envs[0].step = lambda action: (seen.append(np.array(action)), step(action))[1]
    RetentionBuffer.collect(model, env, n_states=1500, oversample=1)
    actions = np.stack(seen)
    for column, logits in ((0, [0.0, 1.0]), (1, [0.0, 2.0, -1.0])):
        expected = np.exp(logits) / np.exp(logits).sum()
        found = np.bincount(actions[:, column], minlength=len(logits)) / len(actions)
        np.testing.assert_allclose(found, expected, atol=5 * 0.5 / np.sqrt(len(actions)))


def test_gaussian_actions_have_the_policys_spread_and_are_clipped(pendulum):
    model = model_on("Pendulum-v1")
    model.policy.action_net.weight.data.zero_()
    env = DummyVecEnv([lambda: gym.make("Pendulum-v1")])
    seen = []
    step = env.step
    env.step = lambda actions: (seen.append(actions.copy()), step(actions))[1]
    RetentionBuffer.collect(model, env, n_states=2000, oversample=1)
    actions = np.concatenate(seen)[:, 0]
    clipped = np.clip(np.random.default_rng(1).standard_normal(200_000), -2, 2)
    assert np.abs(actions).max() == 2.0
    assert abs(actions.mean()) < 5 / np.sqrt(len(actions))
    assert abs(actions.std() - clipped.std()) < 0.08


def test_states_come_from_whole_episodes():
    model = model_on("Pendulum-v1")
    env = DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 4)
    totals = []
    buffer = RetentionBuffer.collect(model, env, n_states=16, progress=lambda done, total: totals.append((done, total)))
    assert totals[-1] == (800, 800)  # four whole episodes of 200 steps, though 64 transitions were asked for
    assert all(done <= total for done, total in totals)
    assert buffer.provenance["episodes"] == 4
    assert len(np.unique(buffer.observations, axis=0)) == 16


def test_return_of_the_collected_episodes():
    env = fake_vec(n_envs=1)
    model = model_on(env)
    model.policy.action_net.bias.data = torch.tensor([-50.0, 50.0])  # always action 1: each episode has seven steps
    env.envs[0].total = 0
    buffer = RetentionBuffer.collect(model, env, n_states=15, oversample=1)
    expected = np.mean([sum(np.sin(range(1, 8))), sum(np.sin(range(8, 15)))])
    assert buffer.provenance["episodes"] == 2
    assert buffer.provenance["return_mean"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.37, 0.99])
def test_share_held_out(cartpole, share):
    buffer = RetentionBuffer.collect(cartpole, "CartPole-v1", n_states=100, heldout=share, n_envs=2, oversample=1)
    assert len(buffer.heldout_indices) == round(share * 100)
    assert set(buffer.heldout_indices.tolist()) == {index for index in range(100) if buffer.heldout[index]}


def test_provenance_tells_where_the_buffer_comes_from(small, cartpole):
    from nsrl.rl.agents.agent import fingerprint

    origin = small.provenance
    assert origin["fingerprint"] == fingerprint(cartpole.policy)
    assert (origin["env_id"], origin["task"], origin["seed"], origin["select"]) == ("CartPole-v1",) * 2 + (
        0,
        "expert",
    )
    assert set(origin["versions"]) == {"nsrl", "torch", "stable-baselines3", "gymnasium", "numpy"}
    assert origin["versions"]["torch"] == torch.__version__
    assert json.loads(json.dumps(origin, allow_nan=False)) == origin
    assert "20 states of CartPole-v1" in repr(small)


# --------------------------------------------------------------------------------------------- determinism


def test_same_seed_same_buffer_other_seed_other_buffer(cartpole):
    one, two, other = (
        RetentionBuffer.collect(cartpole, "CartPole-v1", n_states=30, seed=seed, n_envs=2) for seed in (3, 3, 4)
    )
    assert one.digest() == two.digest()
    assert_same(replace(one, provenance={}), replace(two, provenance={}))
    assert one.digest() != other.digest()


def test_global_random_state_and_agent_are_untouched(pendulum):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    weights = {key: value.clone() for key, value in pendulum.policy.state_dict().items()}
    pendulum.policy.train()
    pendulum.policy.mlp_extractor.eval()
    modes = [module.training for module in pendulum.policy.modules()]
    RetentionBuffer.collect(pendulum, "Pendulum-v1", n_states=20, select="advantage", n_envs=2)
    assert random.getstate() == before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    assert [module.training for module in pendulum.policy.modules()] == modes
    assert all(torch.equal(value, weights[key]) for key, value in pendulum.policy.state_dict().items())


def test_environments_that_draw_from_the_global_generators_are_deterministic_too():
    class Global(Fake):
        def _observe(self):
            return np.random.uniform(-1, 1, 4).astype(np.float32)

    env = DummyVecEnv([lambda: Global(VECTOR, TWO)] * 2)
    model = model_on(env)
    np.random.seed(5)
    one = RetentionBuffer.collect(model, env, n_states=20)
    np.random.seed(6)
    assert RetentionBuffer.collect(model, env, n_states=20).digest() == one.digest()


def test_the_models_own_env_can_be_used_between_two_learns():
    model = model_on("CartPole-v1")
    model.learn(8)
    RetentionBuffer.collect(model, n_states=10)
    model.learn(8, reset_num_timesteps=False)
    assert model.num_timesteps == 16
    assert model.rollout_buffer.episode_starts[0].all()  # the env has moved on, so SB3 has to begin an episode


# ------------------------------------------------------------------------------------------- normalisation


def test_stored_observations_are_raw_and_inputs_are_what_vecnormalize_makes_of_them(normalized):
    model, env = normalized
    buffer = RetentionBuffer.collect(model, env, n_states=40)
    np.testing.assert_allclose(np.linalg.norm(buffer.observations[:, :2], axis=1), 1.0, rtol=1e-5)  # cos, sin
    np.testing.assert_array_equal(buffer.inputs().numpy(), env.normalize_obs(buffer.observations))
    observations = torch.as_tensor(env.normalize_obs(buffer.observations))
    with torch.no_grad():
        expected = model.policy.get_distribution(observations).distribution.mean.numpy()
    np.testing.assert_allclose(buffer.outputs, expected, rtol=1e-6, atol=1e-7)
    some = buffer.inputs([5, 3])
    np.testing.assert_array_equal(some.numpy(), env.normalize_obs(buffer.observations[[5, 3]]))


@pytest.mark.parametrize("training", [True, False])
def test_vecnormalize_is_left_as_it_was(normalized, training):
    model, env = normalized
    env.training = training
    flags = ("training", "norm_obs", "norm_reward")
    before = [getattr(env, flag) for flag in flags]
    moments = [np.copy(getattr(rms, name)) for rms in (env.obs_rms, env.ret_rms) for name in ("mean", "var", "count")]
    RetentionBuffer.collect(model, env, n_states=20, select="advantage")
    after = [np.copy(getattr(rms, name)) for rms in (env.obs_rms, env.ret_rms) for name in ("mean", "var", "count")]
    np.testing.assert_equal(after, moments)
    assert [getattr(env, flag) for flag in flags] == before


def test_flags_of_vecnormalize_come_back_after_a_crash(normalized):
    model, env = normalized

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RetentionBuffer.collect(model, env, n_states=20, progress=interrupt)
    assert env.training and env.norm_obs and env.norm_reward


def test_a_bare_env_gets_the_models_own_statistics(normalized):
    model, env = normalized
    buffer = RetentionBuffer.collect(model, "Pendulum-v1", n_states=20, n_envs=2)
    np.testing.assert_array_equal(buffer.normalizer.mean, env.obs_rms.mean)
    np.testing.assert_array_equal(buffer.inputs().numpy(), env.normalize_obs(buffer.observations))


def test_statistics_that_contradict_the_agents_are_refused(normalized):
    model, _ = normalized
    other = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    with pytest.raises(NsrlError, match="other observation statistics"):
        RetentionBuffer.collect(model, other, n_states=20)


def test_frame_stacking_after_normalisation_is_refused():
    env = VecFrameStack(VecNormalize(fake_vec()), 2)
    with pytest.raises(NsrlError, match="VecNormalize must be the last"), pytest.warns(UserWarning):
        RetentionBuffer.collect(model_on(env), env, n_states=20)


def test_frame_stacking_before_normalisation_works():
    env = VecNormalize(VecFrameStack(fake_vec(), 2))
    env.reset()
    buffer = RetentionBuffer.collect(model_on(env), env, n_states=20)
    np.testing.assert_array_equal(buffer.inputs().numpy(), env.normalize_obs(buffer.observations))


# ----------------------------------------------------------------------------------- images, dicts, discrete


def test_images_stay_bytes_in_the_policys_channel_order():
    env = fake_vec(IMAGE)
    model = PPO("CnnPolicy", env, policy_kwargs={"features_extractor_kwargs": {"features_dim": 8}}, **TINY)
    buffer = RetentionBuffer.collect(model, env, n_states=12)
    assert buffer.observations.shape == (12, 3, 40, 36)
    inputs = buffer.inputs()
    assert inputs.dtype == torch.uint8
    with torch.no_grad():
        np.testing.assert_allclose(policy_outputs(model.policy, inputs), buffer.outputs, atol=1e-6)
    buffer.check(model)


def test_dict_observations(tmp_path):
    space = spaces.Dict({"pixels": IMAGE, "joints": VECTOR, "mode": spaces.Discrete(3)})
    env = VecNormalize(fake_vec(space), norm_obs_keys=["joints"])
    model = PPO("MultiInputPolicy", env, policy_kwargs={"features_extractor_kwargs": {"cnn_output_dim": 8}}, **TINY)
    env.reset()
    buffer = RetentionBuffer.collect(model, env, n_states=12)
    raw = buffer.observations
    assert {key: raw[key].shape for key in raw} == {
        "joints": (12, 4),
        "mode": (12,),
        "pixels": (12, 3, 40, 36),
    }
    inputs = buffer.inputs()
    np.testing.assert_array_equal(inputs["joints"], env.normalize_obs(raw)["joints"])
    assert inputs["pixels"].dtype == torch.uint8
    model.policy.eval()
    with torch.no_grad():
        expected = model.policy.get_distribution(inputs).distribution.probs
    np.testing.assert_allclose(torch.as_tensor(buffer.outputs.copy()).softmax(1), expected, rtol=1e-5)
    assert_same(RetentionBuffer.load(buffer.save(tmp_path / "b.npz")), buffer)
    buffer.check(model, model.get_env())


@pytest.mark.parametrize("space", [spaces.Discrete(5), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3)])
def test_discrete_observations(space):
    env = fake_vec(space)
    model = model_on(env)
    buffer = RetentionBuffer.collect(model, env, n_states=12)
    model.policy.eval()
    with torch.no_grad():
        expected = model.policy.get_distribution(model.policy.obs_to_tensor(buffer.observations)[0])
    probabilities = torch.as_tensor(buffer.outputs.copy()).softmax(1)
    np.testing.assert_allclose(probabilities, expected.distribution.probs, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- advantages


def rolled_out(model, env, n_transitions=60):
    with evaluation_mode(model.policy), raw_observations(env):
        return roll_out(model.policy, env, n_transitions, seed=0)


def sb3_advantages(model, rollout, scale):
    """Advantages as SB3's own RolloutBuffer computes them, fed as `collect_rollouts` feeds it."""
    n_steps, n_envs = rollout.rewards.shape
    stock = RolloutBuffer(n_steps, VECTOR, TWO, "cpu", gae_lambda=model.gae_lambda, gamma=model.gamma, n_envs=n_envs)
    rewards = rollout.rewards * scale
    with torch.no_grad():
        for (step, index), final in zip(rollout.truncations, rollout.truncation_observations, strict=True):
            rewards[step, index] += model.gamma * model.policy.predict_values(torch.as_tensor(final)[None]).item()
        starts = np.ones(n_envs, dtype=bool)
        for step in range(n_steps):
            values = model.policy.predict_values(torch.as_tensor(rollout.observations[step]))
            zero = np.zeros((n_envs, 1))
            stock.add(rollout.observations[step], zero, rewards[step], starts, values, torch.zeros(n_envs))
            starts = rollout.dones[step]
        last = model.policy.predict_values(torch.as_tensor(rollout.last_observations))
    stock.compute_returns_and_advantage(last, starts)
    return stock.advantages


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_advantages_are_those_of_sb3s_rollout_buffer(scale):
    env = fake_vec()
    model = model_on(env, gamma=0.9, gae_lambda=0.8)
    rollout = rolled_out(model, env)
    endings = len(rollout.truncations), int(rollout.dones.sum())
    assert 0 < endings[0] < endings[1]  # both time limits and true ends occur
    found, used = advantages(model.policy, rollout, None, 0.9, 0.8, reward_scale=scale)
    np.testing.assert_allclose(found, sb3_advantages(model, rollout, scale), rtol=1e-4, atol=1e-5)
    assert used == scale


def test_advantage_selection_keeps_only_states_in_the_top_share():
    env = fake_vec()
    model = model_on(env, gamma=0.9, gae_lambda=0.8)
    options = {"select": "advantage", "quantile": 0.25, "oversample": 8}
    buffer = RetentionBuffer.collect(model, env, n_states=10, **options)
    for single in env.envs:
        single.total = 0  # rewards depend on it
    rollout = rolled_out(model, env, n_transitions=80)
    expected = sb3_advantages(model, rollout, 1.0).ravel()
    best = np.argsort(-expected)[: round(0.25 * expected.size)]
    allowed = {row.tobytes() for row in rollout.observations.reshape(-1, 4)[best]}
    assert {row.tobytes() for row in buffer.observations} <= allowed
    assert (expected.size, len(allowed), len(buffer)) == (81, 20, 10)


def test_rewards_are_scaled_by_the_frozen_statistics(normalized):
    model, env = normalized
    expected = 1 / np.sqrt(env.ret_rms.var + env.epsilon)
    buffer = RetentionBuffer.collect(model, env, n_states=20, select="advantage")
    assert buffer.provenance["reward_scale"] == pytest.approx(expected, rel=1e-12)
    env.norm_reward = False  # whether the critic was trained with it can no longer be told, so it is fitted
    model.policy.value_net.weight.data.zero_()
    model.policy.value_net.bias.data.fill_(-3.0)  # it expects V(s) - gamma V(s') = -3 (1 - 0.9) of every reward
    fitted = RetentionBuffer.collect(model, env, n_states=20, select="advantage")
    with raw_observations(env):
        rewards = roll_out(model.policy, env, 80, 0, fitted.normalizer).rewards
    assert fitted.provenance["reward_scale"] == pytest.approx(-0.3 * rewards.sum() / (rewards**2).sum(), rel=1e-4)
    told = RetentionBuffer.collect(model, env, n_states=20, select="advantage", reward_scale=0.5)
    assert told.provenance["reward_scale"] == 0.5
    raw = RetentionBuffer.collect(model_on("Pendulum-v1"), "Pendulum-v1", n_states=20, select="advantage", n_envs=1)
    assert raw.provenance["reward_scale"] == 1.0


def test_reward_scale_is_found_from_the_critic():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(50, 4)).astype(np.float32)
    noise = rng.normal(size=rewards.shape) * 0.1
    assert critic_reward_scale(rewards, 0.02 * rewards) == pytest.approx(0.02, rel=1e-6)
    slope = np.linalg.lstsq(rewards.reshape(-1, 1), (0.5 * rewards + noise).ravel(), rcond=None)[0][0]
    assert critic_reward_scale(rewards, 0.5 * rewards + noise) == pytest.approx(slope, rel=1e-5)
    assert critic_reward_scale(np.zeros_like(rewards), rewards) == 1.0


# --------------------------------------------------------------------------------------------------- files


@settings(max_examples=25, deadline=None)
@given(data=st.data(), n=st.integers(1, 7), n_outputs=st.integers(1, 4), is_dict=st.booleans())
def test_round_trip_of_any_shape(data, n, n_outputs, is_dict, tmp_path_factory):
    def array():
        shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, max_side=3))
        dtype = data.draw(st.sampled_from([np.float32, np.float64, np.uint8, np.int64]))
        finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
        elements = finite if np.dtype(dtype).kind == "f" else hnp.from_dtype(np.dtype(dtype))
        return data.draw(hnp.arrays(dtype, (n, *shape), elements=elements))

    names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=5)
    keys = data.draw(st.lists(names, min_size=1, max_size=3, unique=True)) if is_dict else []
    buffer = RetentionBuffer(
        observations={key: array() for key in keys} if is_dict else array(),
        outputs=np.arange(n * n_outputs, dtype=np.float32).reshape(n, n_outputs),
        family="gaussian",
        log_std=np.full(n_outputs, -0.5, dtype=np.float32),
        provenance={"task": data.draw(st.text(max_size=5))},
    )
    path = tmp_path_factory.mktemp("round") / "b.npz"
    buffer.save(path)
    loaded = RetentionBuffer.load(path)
    assert_same(loaded, buffer)
    assert loaded.digest() == buffer.digest()


def test_a_key_that_no_file_can_hold_is_refused():
    with pytest.raises(NsrlError, match=r"the key 'a\\x00'"):
        RetentionBuffer({"a\0": np.zeros((1, 2))}, np.zeros((1, 2), dtype=np.float32), "categorical")


def test_round_trip_with_statistics(normalized, tmp_path):
    buffer = RetentionBuffer.collect(*normalized, n_states=20)
    loaded = RetentionBuffer.load(buffer.save(tmp_path / "deep" / "buffer"))
    assert_same(loaded, buffer)
    assert torch.equal(loaded.inputs(), buffer.inputs())
    loaded.check(normalized[0])


def test_the_file_holds_no_pickle(small, tmp_path):
    path = small.save(tmp_path / "b.npz")
    with np.load(path, allow_pickle=False) as file:
        assert all(file[key].dtype.kind in "biuf" for key in file.files)
        assert {"format", "header", "observations", "outputs", "heldout", "weights"} == set(file.files)


def test_digest_changes_with_any_content(small):
    digests = {small.digest()}
    for name in ("observations", "outputs", "heldout", "weights"):
        array = getattr(small, name).copy()
        array.flat[0] = not array.flat[0] if array.dtype == bool else array.flat[0] + 1
        digests.add(replace(small, **{name: array}).digest())
    normalizer = ObservationNormalizer(mean=np.zeros(4), var=np.ones(4))
    digests.add(replace(small, normalizer=normalizer).digest())
    digests.add(replace(small, provenance={}).digest())
    assert len(digests) == 6


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_truncated_file(small, tmp_path, share):
    path = small.save(tmp_path / "b.npz")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(NsrlError, match=r"b\.npz: .*damaged"):
        RetentionBuffer.load(path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])  # all examples leave it alone
@given(position=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_a_flipped_byte_never_loads_other_content(small, tmp_path_factory, position, byte):
    path = tmp_path_factory.mktemp("flip") / "b.npz"
    content = bytearray(small.save(path).read_bytes())
    content[int(position * len(content))] = byte
    path.write_bytes(content)
    try:
        assert RetentionBuffer.load(path).digest() == small.digest()
    except NsrlError as error:
        assert "b.npz" in str(error)


def rewritten(buffer, path, **changes):
    buffer.save(path)
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    for key, value in changes.items():
        arrays.pop(key) if value is None else arrays.update({key: value})
    np.savez(path, **arrays)
    return path


def text(value):
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": None}, "'outputs' is missing"),
        ({"observations": None}, "'observations' is missing"),
        ({"heldout": None}, "'heldout' is missing"),
        ({"format": None}, "'format' is missing"),
        ({"format": np.int64(99)}, "retention buffer of format 99.*reads format 1 to 2; install nsrl"),
        ({"format": np.float64(1)}, "'format' is not a version"),
        ({"header": None}, "'header' is missing"),
        ({"header": np.zeros(3, dtype=np.uint8)}, "'header' is not JSON"),
        ({"header": text([1])}, "'header' is not JSON"),
        ({"header": text({"family": "categorical"})}, "no 'provenance'"),
        ({"header": text({"family": "student", "provenance": {}})}, "family is 'student'"),
        ({"header": text({"family": ["x"], "provenance": {}})}, "family is"),
        ({"header": text({"family": "gaussian", "provenance": {}})}, "log_std must be given"),
        ({"outputs": np.zeros((20, 2))}, "outputs has dtype float64"),
        ({"outputs": np.zeros(20, dtype=np.float32)}, "outputs has shape"),
        ({"outputs": np.zeros((0, 2), dtype=np.float32)}, "empty"),
        ({"outputs": np.full((20, 2), np.nan, dtype=np.float32)}, "outputs holds NaN"),
        ({"outputs": np.array(["a"])}, "'outputs' is damaged or no array of numbers"),
        ({"outputs": np.array([None])}, "key 'outputs' is damaged"),
        ({"observations": np.full((20, 4), np.inf)}, "observations holds NaN or infinity"),
        ({"observations": np.zeros((19, 4))}, r"observations has shape \(19, 4\)"),
        ({"heldout": np.zeros(20, dtype=np.float32)}, "heldout has dtype"),
        ({"heldout": np.ones(20, dtype=bool)}, "every state"),
        ({"weights": np.full(20, -1, dtype=np.float32)}, "weights must not be negative"),
        ({"log_std": np.zeros(2, dtype=np.float32)}, "log_std must be given"),
        ({"nvec": np.array([2])}, "nvec must be given"),
        ({"normalizer/mean": np.zeros(4)}, "statistics"),
        ({"source": np.ones(20, dtype=np.int64)}, "source has entries from 1 to 1"),
        ({"source": np.zeros(20, dtype=np.int32)}, "source has dtype int32"),
        ({"header": text({"family": "categorical", "provenance": {"sources": [1]}})}, "sources in the provenance"),
    ],
)
def test_malformed_content_is_named(small, tmp_path, changes, message):
    path = rewritten(small, tmp_path / "b.npz", **changes)
    with pytest.raises(NsrlError, match=message) as caught:
        RetentionBuffer.load(path)
    assert "b.npz" in str(caught.value)


def test_files_that_are_no_buffer(tmp_path):
    with pytest.raises(NsrlError, match="no such file"):
        RetentionBuffer.load(tmp_path / "nothing.npz")
    with pytest.raises(NsrlError, match="no such file"):
        RetentionBuffer.load(tmp_path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "text").write_text("hello")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("outputs", "not an array")
    for name in ("array.npy", "text", "other.zip"):
        with pytest.raises(NsrlError, match=name.replace(".", r"\.")):
            RetentionBuffer.load(tmp_path / name)


def test_what_compresses_too_well_to_be_told_from_a_bomb_is_stored_as_it_is(small, tmp_path, monkeypatch):
    states = np.zeros((20, 4), dtype=np.float32)
    blank = replace(small, observations=states, outputs=np.zeros_like(small.outputs))
    monkeypatch.setattr(files, "OF_OBSERVATIONS", Expansion(0, 1))
    assert RetentionBuffer.load(blank.save(tmp_path / "b.npz")).digest() == blank.digest()
    monkeypatch.undo()
    assert RetentionBuffer.load(tmp_path / "b.npz").digest() == blank.digest()


def test_a_failing_save_leaves_the_old_file(small, cartpole, tmp_path, monkeypatch):
    path = small.save(tmp_path / "b.npz")
    other = RetentionBuffer.collect(cartpole, "CartPole-v1", n_states=5, n_envs=1)

    def full_disk(file, **arrays):
        file.write(b"half of it")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(NsrlError, match=r"b\.npz.*No space left"):
        other.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["b.npz"]
    assert RetentionBuffer.load(path).digest() == small.digest()


# ---------------------------------------------------------------------------------------------- construction


def test_arrays_are_copies_that_cannot_be_written():
    outputs = np.zeros((3, 2), dtype=np.float32)
    buffer = RetentionBuffer({"a": np.zeros((3, 1))}, outputs, "categorical")
    outputs[:] = 1
    assert not buffer.outputs.any()
    for array in (buffer.observations["a"], buffer.outputs, buffer.weights, buffer.heldout):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    assert len(buffer) == 3
    assert "3 states" in repr(buffer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_states": 0}, "n_states"),
        ({"n_states": -3}, "n_states"),
        ({"n_states": 2.5}, "n_states"),
        ({"select": "expart"}, "did you mean 'expert'"),
        ({"select": "Advantages"}, "did you mean 'advantage'"),
        ({"seed": -1}, "seed"),
        ({"n_envs": 0}, "n_envs"),
        ({"oversample": 0.5}, "oversample"),
        ({"oversample": float("nan")}, "oversample"),
        ({"quantile": 0.0}, "quantile"),
        ({"heldout": 1.0}, "heldout"),
        ({"heldout": -0.1}, "heldout"),
        ({"reward_scale": 0.0}, "reward_scale"),
    ],
)
def test_bad_arguments(cartpole, options, message):
    with pytest.raises(NsrlError, match=message):
        RetentionBuffer.collect(cartpole, "CartPole-v1", **options)


def test_agents_and_environments_that_do_not_fit(cartpole):
    with pytest.raises(NsrlError, match=r"observation space Box.*\(3,\).*agent has Box.*\(4,\)"):
        RetentionBuffer.collect(cartpole, "Pendulum-v1", n_states=5)
    with pytest.raises(NsrlError, match=r"action space Discrete\(3\).*Discrete\(2\)"):
        RetentionBuffer.collect(cartpole, fake_vec(VECTOR, spaces.Discrete(3)), n_states=5)
    with pytest.raises(NsrlError, match="cannot make the environment 'CartPol-v1'"):
        RetentionBuffer.collect(cartpole, "CartPol-v1", n_states=5)
    with pytest.raises(NsrlError, match="env must be"):
        RetentionBuffer.collect(cartpole, 3, n_states=5)
    with pytest.raises(NsrlError, match="on-policy"):
        RetentionBuffer.collect(DQN("MlpPolicy", "CartPole-v1", buffer_size=10), "CartPole-v1", n_states=5)
    with pytest.raises(NsrlError, match="must be an on-policy"):
        RetentionBuffer.collect(3, "CartPole-v1", n_states=5)
    with pytest.raises(NsrlError, match="use_sde=False"):
        RetentionBuffer.collect(model_on("Pendulum-v1", use_sde=True), "Pendulum-v1", n_states=5)
    model = model_on("CartPole-v1")
    model.env = None
    with pytest.raises(NsrlError, match="carries no environment"):
        RetentionBuffer.collect(model, n_states=5)


def test_ids_of_our_own_tasks_need_no_import():
    env = as_vec_env("nsrl/CartPole-v0", 2)
    assert env.num_envs == 2
    env.close()


def test_recurrent_policies_are_refused():
    from sb3_contrib import RecurrentPPO

    with pytest.raises(NsrlError, match="memory"):
        RetentionBuffer.collect(RecurrentPPO("MlpLstmPolicy", "CartPole-v1", n_steps=8), n_states=5)


def test_a_zip_and_a_loaded_agent_give_the_buffer_of_the_model(cartpole, small, tmp_path):
    from nsrl.rl import agents

    path = tmp_path / "agent.zip"
    cartpole.save(path)
    options = {"n_states": 20, "n_envs": 2, "oversample": 1}
    for agent in (path, str(path), agents.load(path)):
        buffer = RetentionBuffer.collect(agent, "CartPole-v1", **options)
        assert buffer.digest() == small.digest()
        buffer.check(cartpole)


# ---------------------------------------------------------------------------------------------------- check


def test_check(small, cartpole, pendulum):
    small.check(cartpole)
    small.check(cartpole, cartpole.get_env())
    with pytest.raises(NsrlError, match=r"observation space .*\(4,\).*agent has .*\(3,\)"):
        small.check(pendulum)
    with pytest.raises(NsrlError, match="the environment has the observation space"):
        small.check(cartpole, gym.make("Pendulum-v1"))
    stranger = model_on("CartPole-v1", seed=7)
    with pytest.raises(NsrlError, match=r"another agent.*trust_agent=True"):
        small.check(stranger)
    small.check(stranger, trust_agent=True)
    with pytest.raises(NsrlError, match="provenance has no 'observation_space'"):
        replace(small, provenance={}).check(cartpole)


def test_spaces_are_alike_when_the_policy_reads_them_alike():
    box = describe_space(spaces.Box(-1, 1, (3,), np.float32))
    assert same_observations(box, describe_space(spaces.Box(-np.inf, np.inf, (3,), np.float64)))
    assert not same_observations(box, describe_space(spaces.Box(-1, 1, (4,), np.float32)))
    assert not same_observations(describe_space(IMAGE), describe_space(spaces.Box(0, 1, IMAGE.shape, np.float32)))
    assert not same_observations(describe_space(spaces.Discrete(2)), describe_space(spaces.Discrete(3)))
    nested = [describe_space(spaces.Dict({"a": spaces.Discrete(n)})) for n in (2, 2, 3)]
    assert same_observations(nested[0], nested[1]) and not same_observations(nested[0], nested[2])
    assert same_actions(box, describe_space(spaces.Box(-1, 1, (3,), np.float64)))
    assert not same_actions(box, describe_space(spaces.Box(-2, 2, (3,), np.float32)))
