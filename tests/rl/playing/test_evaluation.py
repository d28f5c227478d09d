"""Evaluation against a plain loop over episodes, and that it leaves no trace."""

import random
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

import nsrl_envs  # noqa: F401  registers the ids
from nsrl.errors import NsrlError
from nsrl.rl.agents.agent import Agent
from nsrl.rl.agents.normalization import ObservationNormalizer
from nsrl.rl.playing.environments import open_copies
from nsrl.rl.playing.evaluation import evaluate


def build_agent(env: str, **kwargs) -> PPO:
    return PPO("MlpPolicy", env, n_steps=32, batch_size=32, device="cpu", seed=1, **kwargs)


@pytest.fixture
def cartpole() -> PPO:
    agent = build_agent("nsrl/CartPole-v0")
    with torch.no_grad():  # big logits: an agent whose episodes differ in length and rarely sit on a tie
        agent.policy.action_net.weight.mul_(300.0)
    return agent


@pytest.fixture
def pendulum() -> PPO:
    agent = build_agent("nsrl/Pendulum-v0")
    with torch.no_grad():
        agent.policy.action_net.weight.mul_(100.0)
    return agent


NORMALIZER = ObservationNormalizer(mean=np.array([0.3, 0.0, 0.1, 0.0]), var=np.array([0.5, 0.4, 9.0, 1.0]))


def reference_returns(model, env_id, normalizer, episodes, seed, deterministic=True):
    """One environment, one episode after the other, nothing vectorised."""
    env = gym.make(env_id)
    results = []
    for episode in range(episodes):
        generator = torch.Generator().manual_seed(seed + episode)
        observation, _ = env.reset(seed=seed + episode)
        total, length, over = 0.0, 0, False
        while not over:
            seen = observation if normalizer is None else normalizer.normalize(observation)
            if deterministic:
                action, _ = model.predict(seen, deterministic=True)
            else:
                with torch.no_grad():
                    inputs = model.policy.obs_to_tensor(np.asarray(seen)[None])[0]
                    logits = model.policy.get_distribution(inputs).distribution.logits
                action = torch.multinomial(logits.softmax(1), 1, generator=generator).numpy()[0, 0]
            observation, reward, terminated, truncated, _ = env.step(action)
            total, length, over = total + float(reward), length + 1, terminated or truncated
        results.append((total, length))
    return [list(column) for column in zip(*results, strict=True)]


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])  # all examples leave it alone
@given(
    episodes=st.integers(1, 9),
    n_envs=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    deterministic=st.booleans(),
)
def test_equals_a_loop_whatever_the_number_of_envs(cartpole, episodes, n_envs, seed, deterministic):
    expected = reference_returns(cartpole, "nsrl/CartPole-v0", None, episodes, seed, deterministic)
    found = evaluate(
        cartpole, "nsrl/CartPole-v0", episodes=episodes, n_envs=n_envs, seed=seed, deterministic=deterministic
    )
    assert [list(found.returns), list(found.lengths)] == expected
    assert found.mean == pytest.approx(np.mean(expected[0]))
    assert found.std == pytest.approx(np.std(expected[0]))
    assert found.minimum == min(expected[0])


def test_sees_through_the_given_normalizer_only(pendulum):
    expected, _ = reference_returns(pendulum, "nsrl/Pendulum-v0", NORMALIZER, 3, 50)
    raw, _ = reference_returns(pendulum, "nsrl/Pendulum-v0", None, 3, 50)
    assert not np.allclose(expected, raw, rtol=0.01)
    direct = evaluate(pendulum, "nsrl/Pendulum-v0", normalizer=NORMALIZER, episodes=3, seed=50)
    agent = evaluate(Agent(pendulum, NORMALIZER), "nsrl/Pendulum-v0", episodes=3, seed=50)
    # batches of another width round differently, and the pendulum amplifies it
    assert direct.returns == pytest.approx(expected, rel=1e-3)
    assert agent.returns == direct.returns

    moving = VecNormalize(DummyVecEnv([lambda: gym.make("nsrl/Pendulum-v0")] * 2), gamma=0.9)
    moving.obs_rms.mean += 7.0
    before = (moving.obs_rms.mean.copy(), moving.obs_rms.count, moving.ret_rms.count)
    inside = evaluate(pendulum, moving, normalizer=NORMALIZER, episodes=3, seed=50)
    assert inside.returns == pytest.approx(expected, rel=1e-3)
    assert (moving.training, moving.norm_obs, moving.norm_reward) == (True, True, True)
    assert np.array_equal(moving.obs_rms.mean, before[0])
    assert (moving.obs_rms.count, moving.ret_rms.count) == before[1:]
    with pytest.raises(NsrlError, match="normalizer"):
        evaluate(pendulum, moving, episodes=1)


# spawned: a fork would copy locks that torch's threads hold
@pytest.mark.parametrize("kind", [DummyVecEnv, partial(SubprocVecEnv, start_method="spawn")])
def test_vec_envs_play_the_same_episodes(cartpole, kind):
    # a spawned process has imported nothing yet
    vec_env = kind([lambda: gym.make("nsrl_envs:nsrl/CartPole-v0")] * 3)
    try:
        expected = reference_returns(cartpole, "nsrl/CartPole-v0", None, 7, 4)
        for _ in range(2):  # a second time, from wherever the first has left it
            found = evaluate(cartpole, vec_env, episodes=7, seed=4)
            assert [list(found.returns), list(found.lengths)] == expected
    finally:
        vec_env.close()


def test_copies_stay_open_and_can_be_played_again(cartpole):
    copies = open_copies("nsrl/CartPole-v0", 3)
    first = evaluate(cartpole, copies, episodes=5)
    assert evaluate(cartpole, copies, episodes=5) == first
    assert evaluate(cartpole, copies[0], episodes=5) == first
    assert evaluate(cartpole, copies, episodes=5, seed=77) != first


def test_short_episodes_do_not_count_more():
    class Countdown(gym.Env):
        """Ends after 2 or 30 steps, by the parity of the seed."""

        observation_space, action_space = spaces.Box(-1.0, 1.0, (1,)), spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.left = 2 if seed is None or seed % 2 else 30
            return np.zeros(1, np.float32), {}

        def step(self, action):
            self.left -= 1
            return np.zeros(1, np.float32), 1.0, self.left == 0, False, {}

    agent = PPO("MlpPolicy", Countdown(), n_steps=16, batch_size=16, device="cpu")
    for env in ([Countdown(), Countdown()], DummyVecEnv([Countdown, Countdown])):
        found = evaluate(agent, env, episodes=6, seed=0)
        assert found.returns == (30.0, 2.0) * 3
        assert found.mean == 16.0


def test_leaves_no_trace_in_the_learner(cartpole):
    class Careless(gym.Wrapper):
        """Draws from every global generator, as badly written environments do."""

        def step(self, action):
            random.random()
            np.random.rand()
            torch.rand(1)
            return self.env.step(action)

    env = Careless(gym.make("nsrl/CartPole-v0"))
    for training in (True, False):
        cartpole.policy.train(training)
        before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        weights = [p.clone() for p in cartpole.policy.parameters()]
        evaluate(cartpole, env, episodes=2, deterministic=False)
        evaluate(cartpole, env, episodes=2)
        after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        assert after == before
        assert all(module.training is training for module in cartpole.policy.modules())
        assert all(torch.equal(a, b) for a, b in zip(weights, cartpole.policy.parameters(), strict=True))


def test_dict_observations():
    class Keyed(gym.ObservationWrapper):
        def __init__(self, env):
            super().__init__(env)
            self.observation_space = spaces.Dict({"pole": env.observation_space, "bias": spaces.Box(0, 1, (1,))})

        def observation(self, observation):
            return {"pole": observation, "bias": np.ones(1, np.float32)}

    agent = PPO("MultiInputPolicy", Keyed(gym.make("nsrl/CartPole-v0")), n_steps=16, batch_size=16, device="cpu")
    copies = [Keyed(gym.make("nsrl/CartPole-v0")) for _ in range(3)]
    assert evaluate(agent, copies, episodes=4).returns == evaluate(agent, copies[0], episodes=4).returns


def test_bad_input_is_refused_in_a_sentence(cartpole, monkeypatch):
    with pytest.raises(NsrlError, match="episodes is 0, but must be a whole number of at least 1"):
        evaluate(cartpole, "nsrl/CartPole-v0", episodes=0)
    with pytest.raises(NsrlError, match="cannot make the environment 'nsrl/Cartpol-v0'"):
        evaluate(cartpole, "nsrl/Cartpol-v0")
    with pytest.raises(NsrlError, match=r"Box\(.*Box\("):
        evaluate(cartpole, "Pendulum-v1")
    with pytest.raises(NsrlError, match="observation statistics have shape"):
        evaluate(cartpole, "nsrl/CartPole-v0", normalizer=NORMALIZER)
    monkeypatch.setattr("nsrl.rl.playing.evaluation.LONGEST", 5)
    with pytest.raises(NsrlError, match="has not ended after 5 steps"):
        evaluate(cartpole, "nsrl/CartPole-v0", episodes=2)
