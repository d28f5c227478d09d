"""Agents and environments as users have them: each an ordinary habit of SB3 or rl-zoo, held against stock SB3."""

import base64
import json
import pickle
import zipfile

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecTransposeImage

from nsrl import NullSpacePPO, RetentionBuffer, protect
from nsrl.errors import NsrlError
from nsrl.rl import agents
from nsrl.rl.agents.openai_gym import gym_in_gymnasium
from nsrl.rl.agents.zoo_settings import read_settings, told_schedule

SMALL = {"n_steps": 16, "device": "cpu", "seed": 0}
MINIBATCHES = {"batch_size": 16, "n_epochs": 2}


class Walk(gym.Env):
    """Observations of any space, three actions of which the last is never valid, episodes of 10 steps."""

    def __init__(self, space=None, bound=np.inf):
        self.observation_space = space or spaces.Box(-bound, bound, (3,), np.float32)
        self.action_space = spaces.Discrete(3)

    def observed(self):
        def drawn(space):
            if isinstance(space, spaces.Dict):
                return {key: drawn(part) for key, part in space.spaces.items()}
            if space.dtype == np.uint8:
                return self.np_random.integers(0, 256, space.shape, np.uint8)
            return self.np_random.normal(size=space.shape).astype(np.float32)

        return drawn(self.observation_space)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observed(), {}

    def step(self, action):
        self.steps += 1
        return self.observed(), float(action == 1), self.steps >= 10, False, {}

    def action_masks(self):
        return np.array([True, True, False])


PICTURES = spaces.Dict(
    {"camera": spaces.Box(0, 255, (36, 36, 3), np.uint8), "speed": spaces.Box(-1, 1, (2,), np.float32)}
)


def pictures(count=2):
    return DummyVecEnv([lambda: Walk(PICTURES)] * count)


@pytest.mark.parametrize("given", ["bare", "transposed", "normalised"])
def test_statistics_of_dict_observations_with_images_are_loaded_by_stock(given, tmp_path):
    """SB3 transposes images outside of VecNormalize, so that statistics belong beneath."""
    own = VecNormalize(pictures(), norm_obs_keys=["speed"])
    agent = PPO("MultiInputPolicy", own, **SMALL, **MINIBATCHES).learn(32)
    buffer = RetentionBuffer.collect(agent, pictures(), n_states=32)
    new = {
        "bare": pictures,
        "transposed": lambda: VecTransposeImage(pictures()),
        "normalised": lambda: agents.RetainingVecNormalize(pictures(), buffer.normalizer),
    }[given]()
    model = NullSpacePPO.from_pretrained(agent, new, retain=buffer, **MINIBATCHES, n_steps=16).learn(32)
    path = model.export(tmp_path / "agent.zip")
    stock = VecNormalize.load(str(tmp_path / "vecnormalize.pkl"), pictures())
    played = PPO.load(path, env=stock, device="cpu")
    stock.seed(0)
    seen = played.get_env().reset()
    assert seen["camera"].shape == (2, 3, 36, 36)
    for _ in range(12):
        raw = stock.get_original_obs()
        ours = model.get_vec_normalize_env().normalize_obs(raw)
        ours["camera"] = raw["camera"].transpose(0, 3, 1, 2)
        actions = played.predict(seen, deterministic=True)[0]
        np.testing.assert_array_equal(actions, model.predict(ours, deterministic=True)[0])
        seen = played.get_env().step(actions)[0]


@pytest.mark.parametrize("algorithm", [A2C, PPO, MaskablePPO])
def test_other_bounds_of_observations_mean_nothing_to_a_policy(algorithm, tmp_path):
    """Between versions of gym the bounds of most environments have changed."""
    old, new = (DummyVecEnv([lambda bound=bound: Walk(bound=bound)] * n) for bound, n in ((5.0, 1), (np.inf, 2)))
    options = {} if algorithm is A2C else MINIBATCHES
    agent = algorithm("MlpPolicy", old, **SMALL, **options).learn(32)
    agent.save(tmp_path / "agent.zip")
    buffer = RetentionBuffer.collect(tmp_path / "agent.zip", new, n_states=32)
    model = agents.attach_env(tmp_path / "agent.zip", new)
    seen = new.reset()
    np.testing.assert_array_equal(model.predict(seen)[0].shape, agent.predict(seen)[0].shape)
    protect(model, retain=buffer, kl_budget=0.01)
    model.learn(64)
    assert model.retention_report().kl_mean <= 0.01
    algorithm.load(agents.export(model, tmp_path / "new.zip"), env=new, device="cpu").learn(32)
    with pytest.raises(NsrlError, match="has the observation space"):
        agents.attach_env(tmp_path / "agent.zip", "CartPole-v1")


@pytest.fixture(scope="module")
def normalised(tmp_path_factory):
    folder = tmp_path_factory.mktemp("normalised")
    env = VecNormalize(DummyVecEnv([Walk] * 2))
    PPO("MlpPolicy", env, **SMALL, **MINIBATCHES).learn(64).save(folder / "agent.zip")
    env.save(str(folder / "vecnormalize.pkl"))
    return folder


@pytest.mark.parametrize("training", [False, True])
def test_the_user_s_own_statistics_are_taken_where_they_are_the_agent_s(training, normalised):
    own = VecNormalize.load(str(normalised / "vecnormalize.pkl"), DummyVecEnv([Walk] * 2))
    own.training = own.norm_reward = training
    before = own.obs_rms.mean.copy(), own.obs_rms.var.copy()
    buffer = RetentionBuffer.collect(normalised, DummyVecEnv([Walk] * 2), n_states=32)
    model = NullSpacePPO.from_pretrained(normalised, own, retain=buffer, n_steps=16, **MINIBATCHES)
    assert model.get_vec_normalize_env() is own
    model.learn(64)
    np.testing.assert_array_equal((own.obs_rms.mean, own.obs_rms.var), before)
    assert model.retention_report().kl_mean <= 0.01
    assert agents.attach_env(normalised, own).get_vec_normalize_env() is own
    own.obs_rms.mean = own.obs_rms.mean + 1.0
    for attempt in (NullSpacePPO.from_pretrained, agents.attach_env):
        with pytest.raises(NsrlError, match="other observation statistics than the agent's"):
            attempt(normalised, own)


def test_what_was_normalised_before_it_was_stacked_is_refused_with_advice_that_holds(tmp_path):
    inner = VecNormalize(DummyVecEnv([Walk] * 2))
    agent = PPO("MlpPolicy", VecFrameStack(inner, 3), **SMALL, **MINIBATCHES).learn(64)
    agent.save(tmp_path / "agent.zip")
    inner.save(str(tmp_path / "vecnormalize.pkl"))
    stacked = VecFrameStack(DummyVecEnv([Walk] * 2), 3)
    for attempt in (
        lambda: agents.load(tmp_path),
        lambda: agents.evaluate(agent, stacked, episodes=2),
        lambda: RetentionBuffer.collect(agent, n_states=32),
        lambda: NullSpacePPO.from_pretrained(agent, stacked),
        lambda: NullSpacePPO.from_pretrained(agent, agent.get_env()),
        lambda: agents.attach_env(agent, stacked),
    ):
        with pytest.raises(NsrlError, match=r"stacks of 3.*TransformObservation.*statistics=False"):
            attempt()

    statistics = agents.ObservationNormalizer.load(tmp_path / "vecnormalize.pkl")
    each = [lambda: gym.wrappers.TransformObservation(Walk(), statistics.normalize, None)] * 2
    advised = VecFrameStack(DummyVecEnv(each), 3)
    theirs = VecNormalize.load(str(tmp_path / "vecnormalize.pkl"), DummyVecEnv([Walk] * 2))
    theirs.training = theirs.norm_reward = False
    theirs = VecFrameStack(theirs, 3)
    envs = (advised, theirs)
    for env in envs:
        env.seed(0)
    seen = [env.reset() for env in envs]
    for _ in range(25):
        np.testing.assert_array_equal(*seen)
        actions = agent.predict(seen[0])[0]
        seen = [env.step(actions)[0] for env in envs]

    loaded = agents.load(tmp_path, statistics=False)
    assert loaded.normalizer is None
    for known in (loaded, agents.Agent(agent)):
        buffer = RetentionBuffer.collect(known, advised, n_states=32)
        model = NullSpacePPO.from_pretrained(known, advised, retain=buffer, n_steps=16, **MINIBATCHES).learn(32)
        assert model.retention_report().kl_mean <= 0.01


def of_before_sb3_2(path, *functions):
    """A zip as SB3 1 wrote it: Gym's spaces, which are unpickled by name, and schedules that are functions."""
    PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu").save(path)
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    data = json.loads(parts["data"])
    for key in ("observation_space", "action_space"):
        space = pickle.loads(base64.b64decode(data[key][":serialized:"]))
        space._np_random = None
        renamed = pickle.dumps(space, protocol=0).replace(b"cgymnasium.", b"cgym.")
        assert b"cgym.spaces" in renamed
        data[key][":serialized:"] = base64.b64encode(renamed).decode()
        data[key][":type:"] = data[key][":type:"].replace("gymnasium.", "gym.")
    for key in functions:
        data[key] = {":type:": "<class 'function'>", ":serialized:": "gASVxgIAAAAAAACMF2Nsb3VkcGlja2xl"}
    parts["data"] = json.dumps(data).encode()
    with zipfile.ZipFile(path, "w") as new:
        for name, content in parts.items():
            new.writestr(name, content)


def settings_of_rl_zoo(folder, **entries):
    """As rl-zoo3 dumps its OrderedDict of settings."""
    lines = ["!!python/object/apply:collections.OrderedDict"]
    for key, value in {**entries, "n_timesteps": "100000.0", "policy": "MlpPolicy"}.items():
        lines += [f"{'- - -' if len(lines) == 1 else '  - -'} {key}", f"    - {value}"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yml").write_text("\n".join(lines) + "\n")


def test_schedules_that_exist_only_pickled_are_read_from_rl_zoo_s_settings(tmp_path):
    run = tmp_path / "ppo" / "CartPole-v1_1"
    run.mkdir(parents=True)
    of_before_sb3_2(run / "CartPole-v1.zip", "learning_rate", "clip_range")
    with pytest.warns(UserWarning, match="learning_rate, clip_range of .* exist only pickled"):
        assert agents.load(run).untrusted == ("learning_rate", "clip_range")
    for place in (run / "CartPole-v1", run):
        settings_of_rl_zoo(place, learning_rate="lin_2.5e-4", batch_size=8)
        agent = agents.load(run)
        assert agent.untrusted == ()
        schedule = agent.hyperparameters["learning_rate"]
        left = np.linspace(1.0, 0.0, 7)
        np.testing.assert_allclose([schedule(share) for share in left], 2.5e-4 * left, rtol=1e-12)
        assert agent.hyperparameters["clip_range"] == 0.2, "not named, so it was the algorithm's default"
        (place / "config.yml").unlink()
    settings_of_rl_zoo(run / "CartPole-v1", learning_rate="3e-4", clip_range="-1")
    with pytest.warns(UserWarning, match="^clip_range of"):
        agent = agents.load(run)
    assert agent.untrusted == ("clip_range",) and agent.hyperparameters["learning_rate"] == 3e-4


@pytest.mark.parametrize(
    "text", ["policy: MlpPolicy", "[1, 2]", "!!python/object/apply:os.system [ls]", "{", "3", "n_timesteps: 1\nx: 2"]
)
def test_other_files_of_that_name_are_not_settings(text, tmp_path):
    (tmp_path / "config.yml").write_text(text)
    assert read_settings(tmp_path / "agent.zip") == {}


@pytest.mark.parametrize("value", ["lin_", "lin_x", "lin_-1", "cos_1", True, None, [1], 0, -0.1, float("nan"), "1e999"])
def test_other_schedules_are_not_made_up(value):
    assert told_schedule({"clip_range": value}, "clip_range", 0.2) is None


def test_pickles_of_gym_are_unpickled_as_gymnasium_s_where_that_is_asked_for(tmp_path):
    of_before_sb3_2(tmp_path / "agent.zip")
    assert agents.load(tmp_path / "agent.zip").model.observation_space.shape == (4,)
    with pytest.raises(ModuleNotFoundError):
        PPO.load(tmp_path / "agent.zip", device="cpu")
    trusted = agents.load(tmp_path / "agent.zip", trust=True).model
    assert trusted.observation_space == gym.make("CartPole-v1").observation_space
    with pytest.raises(ModuleNotFoundError):
        import gym as _  # noqa: F401


def test_gym_is_gym_where_it_is_installed(monkeypatch):
    import sys
    from types import ModuleType

    theirs = ModuleType("gym")
    monkeypatch.setitem(sys.modules, "gym", theirs)
    with gym_in_gymnasium():
        assert sys.modules["gym"] is theirs and "gym.spaces" not in sys.modules
    assert sys.modules["gym"] is theirs
