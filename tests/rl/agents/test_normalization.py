"""Frozen observation statistics against stock VecNormalize, and the inert reading of its pickles."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from stable_baselines3 import PPO
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from nsrl.errors import NsrlError
from nsrl.rl.agents.normalization import ObservationNormalizer, RetainingVecNormalize
from nsrl.rl.agents.unpickling import OUR_HOMES

ROWS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
DICT = spaces.Dict([("z", ROWS), ("a", spaces.Box(-1.0, 1.0, (2, 2), np.float64)), ("d", spaces.Discrete(4))])


class FakeEnv(gym.Env):
    """Random observations, rewards of growing size, episodes of 5 steps."""

    action_space = spaces.Discrete(2)

    def __init__(self, observation_space=ROWS):
        self.observation_space = copy.deepcopy(observation_space)
        self.steps = 0

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {"odd": object()}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), float(self.steps % 7), self.steps % 5 == 0, False, {}


def vec_env(space=ROWS, n_envs=2, seed=0):
    env = DummyVecEnv([lambda: FakeEnv(space)] * n_envs)
    env.seed(seed)
    return env


def trained(space=ROWS, steps=20, **options):
    """A stock VecNormalize after some steps."""
    env = VecNormalize(vec_env(space), **options)
    env.reset()
    for _ in range(steps):
        env.step(np.zeros(2, dtype=int))
    return env


def same(first, second):
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    return first.dtype == second.dtype and np.array_equal(first, second)


def normalizer(**changes):
    return ObservationNormalizer(**{"mean": np.array([1.0, -2.0, 0.5]), "var": np.array([0.0, 4.0, 1e-3]), **changes})


arrays = hnp.arrays(np.float64, (3,), elements=st.floats(-1e6, 1e6))


@given(arrays, arrays, st.floats(1e-12, 1.0), st.floats(0.1, 100), st.sampled_from(["f4", "f8", "i8"]), st.data())
@settings(max_examples=150, deadline=None)
def test_normalises_as_stock_to_the_last_bit(mean, root, epsilon, clip_obs, dtype, data):
    stock = VecNormalize(vec_env(), training=False, epsilon=epsilon, clip_obs=clip_obs)
    stock.obs_rms.mean, stock.obs_rms.var = mean, np.square(root)
    ours = ObservationNormalizer.from_vec_normalize(stock)
    shape = data.draw(st.sampled_from([(3,), (1, 3), (4, 2, 3)]))
    elements = st.integers(-(10**6), 10**6) if dtype == "i8" else st.floats(-1e6, 1e6, width=int(dtype[1]) * 8)
    obs = data.draw(hnp.arrays(dtype, shape, elements=elements))
    before = obs.copy()
    assert same(ours.normalize(obs), stock.normalize_obs(obs))
    assert np.array_equal(obs, before)


@pytest.mark.parametrize("options", [{"norm_obs_keys": ["a"]}, {"norm_obs_keys": ["z", "a"], "clip_obs": 0.5}])
def test_dict_observations_normalise_as_stock(options):
    env = trained(DICT, **options)
    ours = ObservationNormalizer.from_vec_normalize(env)
    raw = env.get_original_obs()
    assert list(ours.mean) == options["norm_obs_keys"]
    assert same(ours.normalize(raw), env.normalize_obs(raw))
    assert same(ObservationNormalizer.from_arrays(ours.to_arrays()).normalize(raw), env.normalize_obs(raw))


def test_statistics_cannot_move():
    mean = np.zeros(3)
    ours = normalizer(mean=mean)
    mean += 1.0
    assert not ours.mean.any()
    with pytest.raises(ValueError, match="read-only"):
        ours.mean += 1.0


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"var": np.ones(2)}, "differ in shape"),
        ({"var": {"a": np.ones(3)}}, "differ in shape"),
        ({"mean": np.array([0.0, np.nan, 0.0])}, "NaN"),
        ({"var": np.array([1.0, -1.0, 1.0])}, "negative variance"),
        ({"clip_obs": 0.0}, "positive"),
        ({"epsilon": float("nan")}, "positive"),
    ],
)
def test_impossible_statistics_are_refused(changes, reason):
    with pytest.raises(NsrlError, match=reason):
        normalizer(**changes)


def test_wrong_spaces_are_refused_by_name():
    normalizer().check(ROWS)
    with pytest.raises(NsrlError, match=r"\(3,\).*\(4,\)"):
        normalizer().check(spaces.Box(-1, 1, (4,)))
    for ours, space in (
        (normalizer(), DICT),
        (normalizer(mean={"a": np.ones(3)}, var={"a": np.ones(3)}), ROWS),
    ):
        with pytest.raises(NsrlError, match="keys"):
            ours.check(space)


@pytest.mark.parametrize("space", [ROWS, DICT])
@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_and_npz_read_back_equal(space, protocol, tmp_path, monkeypatch):
    env = trained(space, norm_obs_keys=["z", "a"] if space is DICT else None)
    env.reset_infos = [{}, {}]
    env.observation_space.sample()  # gives the space a random generator, which is then in the pickle
    (tmp_path / "stock").write_bytes(pickle.dumps(env, protocol=protocol))
    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, None)
    read = ObservationNormalizer.load(tmp_path / "stock")
    read.save(tmp_path / "ours.npz")
    again = ObservationNormalizer.load(tmp_path / "ours.npz")
    expected = ObservationNormalizer.from_vec_normalize(env)
    assert same(read.to_arrays(), expected.to_arrays()) and same(again.to_arrays(), expected.to_arrays())


@pytest.mark.parametrize("home", OUR_HOMES)
def test_pickles_name_the_module_that_they_were_saved_from(home, tmp_path):
    statistics = normalizer(mean=np.arange(3.0))
    env = RetainingVecNormalize(vec_env(), statistics)
    env.reset_infos = []
    content = pickle.dumps(env, protocol=3)
    now = type(env).__module__.encode()
    assert content.count(now) == 2  # of RetainingVecNormalize and of FrozenMeanStd
    (tmp_path / "a.pkl").write_bytes(content.replace(now, home.encode()))
    assert same(ObservationNormalizer.load(tmp_path / "a.pkl").to_arrays(), statistics.to_arrays())


def test_what_numpy_and_python_may_have_put_in_place_of_arrays(tmp_path):
    env = trained()
    env.reset_infos = []
    env.obs_rms.mean, env.obs_rms.var = [0.0, 1, 2.5], np.asfortranarray(np.ones(3, dtype=">f4"))
    env.obs_rms.count, env.epsilon, env.clip_obs = np.float32(7), np.array(1e-6), 5
    env.save(tmp_path / "a.pkl")
    expected = ObservationNormalizer.from_vec_normalize(env)
    assert same(ObservationNormalizer.load(tmp_path / "a.pkl").to_arrays(), expected.to_arrays())


def test_reward_only_normalisation_means_no_normaliser(tmp_path):
    env = trained(norm_obs=False)
    env.reset_infos = []
    env.save(tmp_path / "a.pkl")
    assert ObservationNormalizer.from_vec_normalize(env) is None
    assert ObservationNormalizer.load(tmp_path / "a.pkl") is None


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize("place", ["root", "attribute", "statistics"])
def test_payloads_are_refused_unless_trusted(place, tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "vecnormalize.pkl"
    env = trained()
    env.reset_infos = []
    if place == "attribute":
        env.stowaway = Payload(trace)
    if place == "statistics":
        env.obs_rms.mean = Payload(trace)
    path.write_bytes(pickle.dumps(Payload(trace) if place == "root" else env))
    with pytest.raises(NsrlError, match=r"import pathlib.*trust=True"):
        ObservationNormalizer.load(path)
    assert not trace.exists()
    if place == "attribute":
        assert same(ObservationNormalizer.load(path, trust=True).mean, env.obs_rms.mean)
    else:
        with pytest.raises(NsrlError):
            ObservationNormalizer.load(path, trust=True)
    assert trace.exists(), "the payload is a dud and the test proves nothing"


class Call:
    """Pickles as a call of any function, as an attacker would write it."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "function, arguments",
    [
        (os.system, ("true",)),
        (eval, ("1",)),
        (getattr, (1, "real")),
        (subprocess.call, (["true"],)),
        (np.load, ("x",)),
        (sys.exit, ()),
        (__import__, ("os",)),
    ],
)
def test_no_function_is_on_the_allow_list(function, arguments, tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Call(function, *arguments)))
    with pytest.raises(NsrlError, match="asks to import"):
        ObservationNormalizer.load(tmp_path / "a.pkl")


def test_a_pickle_cannot_change_the_stand_ins(tmp_path):
    # BUILD with a slot state sets attributes of the named class itself.
    hostile = b"\x80\x04cnumpy\nndarray\nN}X\x06\x00\x00\x00valuesK\x07s\x86b."
    (tmp_path / "a.pkl").write_bytes(hostile)
    with pytest.raises(NsrlError, match="damaged"):
        ObservationNormalizer.load(tmp_path / "a.pkl")
    env = trained()
    env.reset_infos = []
    env.save(tmp_path / "b.pkl")
    assert same(ObservationNormalizer.load(tmp_path / "b.pkl").mean, env.obs_rms.mean)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("statistics")
    env = trained(steps=3)
    env.reset_infos = []
    env.save(folder / "vn.pkl")
    normalizer().save(folder / "vn.npz")
    return folder


@pytest.mark.parametrize("name", ["vn.pkl", "vn.npz"])
def test_no_truncation_gets_through(name, saved, tmp_path):
    content = (saved / name).read_bytes()
    for length in {*range(0, len(content), max(1, len(content) // 200)), len(content) - 1}:
        (tmp_path / name).write_bytes(content[:length])
        with pytest.raises(NsrlError):
            ObservationNormalizer.load(tmp_path / name)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_flipped_bytes_raise_nothing_but_nsrl_errors(saved, data):
    name = data.draw(st.sampled_from(["vn.pkl", "vn.npz"]))
    content = bytearray((saved / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = saved / f"flipped{name}"
    path.write_bytes(content)
    try:
        read = ObservationNormalizer.load(path)
    except NsrlError as error:
        assert str(path) in str(error)
    else:
        assert read is None or read.normalize(np.zeros(np.shape(read.mean))).dtype == np.float32


def test_other_files_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", mean=np.zeros(3))
    np.savez(tmp_path / "b.npz", mean=np.array([object()]), allow_pickle=True)
    (tmp_path / "c.pkl").write_bytes(pickle.dumps({"norm_obs": True}))
    (tmp_path / "d.pkl").write_bytes(pickle.dumps(RunningMeanStd(shape=(3,))))
    for name in ("a.npz", "b.npz", "c.pkl", "d.pkl", "absent.npz", "absent.pkl", "."):
        with pytest.raises(NsrlError):
            ObservationNormalizer.load(tmp_path / name)


def run(env, steps=12):
    """Observations (the first from reset) and rewards of a seeded run."""
    env.seed(3)
    observations, rewards = [env.reset()], []
    for _ in range(steps):
        obs, reward, _, _ = env.step(np.zeros(2, dtype=int))
        observations.append(obs)
        rewards.append(reward)
    return observations, rewards


@pytest.mark.parametrize("space", [ROWS, DICT])
def test_observation_statistics_freeze_while_reward_statistics_move(space):
    keys = ["z"] if space is DICT else None
    ours = ObservationNormalizer.from_vec_normalize(trained(space, norm_obs_keys=keys, clip_obs=1.5))
    retaining = RetainingVecNormalize(vec_env(space), ours, gamma=0.9)
    observations, rewards = run(retaining)
    assert same(ObservationNormalizer.from_vec_normalize(retaining).to_arrays(), ours.to_arrays())

    # Oracles: for observations stock VecNormalize not training, for rewards stock training on rewards only.
    frozen = VecNormalize(vec_env(space), training=False, norm_obs_keys=keys, clip_obs=1.5)
    for key in keys or [None]:
        rms = frozen.obs_rms[key] if keys else frozen.obs_rms
        rms.mean, rms.var = (value[key] if keys else value for value in (ours.mean, ours.var))
    rewarding = VecNormalize(vec_env(space), norm_obs=False, gamma=0.9)
    assert all(same(a, b) for a, b in zip(observations, run(frozen)[0], strict=True))
    assert all(same(a, b) for a, b in zip(rewards, run(rewarding)[1], strict=True))
    assert retaining.ret_rms.count == rewarding.ret_rms.count > 1


def test_without_statistics_observations_pass_unchanged():
    env, bare = RetainingVecNormalize(vec_env(), None), vec_env()
    for wrapped in (env, bare):
        wrapped.seed(1)
    assert same(env.reset(), bare.reset())
    assert ObservationNormalizer.from_vec_normalize(env) is None


def test_wrong_environment_is_refused():
    with pytest.raises(NsrlError, match="shape"):
        RetainingVecNormalize(vec_env(spaces.Box(-1, 1, (4,))), normalizer())


@pytest.mark.parametrize("space", [ROWS, DICT])
def test_stock_code_plays_with_the_saved_statistics(space, tmp_path):
    ours = ObservationNormalizer.from_vec_normalize(trained(space, norm_obs_keys=["a"] if space is DICT else None))
    env = RetainingVecNormalize(vec_env(space), ours)
    run(env)
    env.save_stock(tmp_path / "vecnormalize.pkl")
    # Without nsrl on the path: the pickle must name nothing of ours.
    assert b"nsrl" not in (tmp_path / "vecnormalize.pkl").read_bytes()
    stock = VecNormalize.load(str(tmp_path / "vecnormalize.pkl"), vec_env(space))
    assert type(stock) is VecNormalize and not stock.training
    raw = env.get_original_obs()
    assert same(stock.normalize_obs(raw), ours.normalize(raw))
    assert stock.ret_rms.var == env.ret_rms.var and stock.gamma == env.gamma
    before = ObservationNormalizer.from_vec_normalize(stock).to_arrays()
    run(stock)
    assert same(ObservationNormalizer.from_vec_normalize(stock).to_arrays(), before)
    assert same(ObservationNormalizer.load(tmp_path / "vecnormalize.pkl").to_arrays(), before)


def test_sb3_learns_inside_it_and_leaves_the_statistics_alone(tmp_path):
    env = RetainingVecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 2), normalizer())
    model = PPO("MlpPolicy", env, n_steps=8, batch_size=16, n_epochs=1, device="cpu").learn(32)
    assert model.get_vec_normalize_env() is env
    assert same(ObservationNormalizer.from_vec_normalize(env).to_arrays(), normalizer().to_arrays())
    assert env.ret_rms.count > 30
    env.save(tmp_path / "own.pkl")  # stock save keeps our class, and stock load brings it back
    again = VecNormalize.load(str(tmp_path / "own.pkl"), DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 2))
    again.reset()
    again.step(np.zeros((2, 1), dtype=np.float32))
    assert same(ObservationNormalizer.from_vec_normalize(again).to_arrays(), normalizer().to_arrays())
