"""Reading SB3 zips as data: against stock SB3, against damage, and against payloads."""

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3.common.save_util as save_util
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from sb3_contrib import TRPO, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule

from nsrl.errors import NsrlError
from nsrl.files import written_atomically
from nsrl.rl.agents.archive import read_archive
from nsrl.rl.agents.descriptions import described_schedule, described_space

VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float32)
TORQUE = spaces.Box(-1.0, 1.0, (2,), np.float32)
IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)
MIXED = spaces.Dict([("v", VECTOR), ("img", IMAGE), ("d", spaces.Discrete(3)), ("b", spaces.MultiBinary(2))])


class FakeEnv(gym.Env):
    """Any spaces, no dynamics."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


def build(cls, policy, observation_space=VECTOR, action_space=TORQUE, **kwargs):
    return cls(policy, FakeEnv(observation_space, action_space), device="cpu", **kwargs)


class OwnExtractor(FlattenExtractor):
    """An extractor that is on no allow list."""


CASES = {
    "ppo": lambda: build(PPO, "MlpPolicy", n_steps=64, gamma=0.97, clip_range=0.1, target_kl=0.03),
    "relu": lambda: build(
        PPO,
        "MlpPolicy",
        policy_kwargs={
            "net_arch": {"pi": [16, 8], "vf": [4]},
            "activation_fn": torch.nn.ReLU,
            "ortho_init": False,
            "log_std_init": -0.5,
            "optimizer_class": torch.optim.AdamW,
            "optimizer_kwargs": {"weight_decay": 0.01},
        },
    ),
    "linear": lambda: build(
        PPO, "MlpPolicy", learning_rate=LinearSchedule(1e-3, 0.0, 1), clip_range=LinearSchedule(0.2, 0.1, 1)
    ),
    "no hidden layer": lambda: build(PPO, "MlpPolicy", policy_kwargs={"net_arch": []}),
    "cartpole": lambda: PPO("MlpPolicy", "CartPole-v1", device="cpu"),
    "cnn": lambda: build(PPO, "CnnPolicy", IMAGE, spaces.Discrete(3), n_steps=8, batch_size=8),
    "cnn apart": lambda: build(
        PPO, "CnnPolicy", IMAGE, n_steps=8, batch_size=8, policy_kwargs={"share_features_extractor": False}
    ),
    "dict": lambda: build(PPO, "MultiInputPolicy", MIXED, spaces.MultiDiscrete([2, 3]), n_steps=8, batch_size=8),
    "a2c": lambda: build(A2C, "MlpPolicy", spaces.Discrete(5), spaces.MultiBinary(3)),
    "trpo": lambda: build(TRPO, "MlpPolicy", spaces.MultiDiscrete([3, 4]), spaces.Discrete(2), n_steps=8),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The path of a small PPO agent and its bytes."""
    path = tmp_path_factory.mktemp("agent") / "small.zip"
    build(PPO, "MlpPolicy", policy_kwargs={"net_arch": [4]}).save(path)
    return path


def edited(path, to, members=None, **data):
    """Copy a zip with other members, and with other entries in its metadata."""
    with zipfile.ZipFile(path) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    contents["data"] = json.dumps({**json.loads(contents["data"]), **data})
    contents |= members or {}
    with zipfile.ZipFile(to, "w") as new:
        for name, content in contents.items():
            if content is not None:
                new.writestr(name, content)
    return to


def metadata(path):
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("data"))


def nothing_unpickles(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for module in (pickle, save_util.cloudpickle):
        monkeypatch.setattr(module, "load", refuse)
        monkeypatch.setattr(module, "loads", refuse)


@pytest.mark.parametrize("case", CASES)
def test_archive_says_what_stock_load_unpickles(case, tmp_path, monkeypatch):
    model = CASES[case]()
    model.save(tmp_path / "agent")
    stock = type(model).load(tmp_path / "agent", device="cpu")
    nothing_unpickles(monkeypatch)
    archive = read_archive(tmp_path / "agent.zip")

    assert archive.algorithm == type(model).__name__
    assert archive.policy_class == type(stock.policy).__name__
    assert archive.observation_space == stock.observation_space
    assert archive.action_space == stock.action_space
    assert archive.untrusted == ()
    assert {name: archive.policy_kwargs.get(name) for name in stock.policy_kwargs} == stock.policy_kwargs
    for name in (
        "n_steps",
        "gamma",
        "gae_lambda",
        "ent_coef",
        "normalize_advantage",
        "target_kl",
        "batch_size",
    ):
        assert archive.hyperparameters.get(name) == getattr(stock, name, None)
    for name in {"learning_rate", "clip_range"} & vars(stock).keys():
        stored, schedule = archive.hyperparameters[name], getattr(stock, name)
        for progress in (1.0, 0.3, 0.0):
            expected = schedule(progress) if callable(schedule) else schedule
            assert (stored(progress) if callable(stored) else stored) == expected
    for name, tensor in stock.policy.state_dict().items():
        assert torch.equal(archive.state_dict[name], tensor)


def test_functions_are_listed_as_untrusted(tmp_path):
    build(PPO, "MlpPolicy", learning_rate=lambda p: p * 1e-3, clip_range=lambda p: 0.1 * p).save(tmp_path / "a.zip")
    archive = read_archive(tmp_path / "a.zip")
    assert archive.untrusted == ("learning_rate", "clip_range")
    assert not {"learning_rate", "clip_range"} & archive.hyperparameters.keys()


def test_schedules_of_older_versions():
    # SB3 before 2.6: a constant is hidden in a lambda; between, FloatSchedules could be nested.
    assert described_schedule({":type:": "<class 'function'>", ":serialized:": "gASV"}) is None
    nested = {":type:": "FloatSchedule", "value_schedule": "FloatSchedule(ConstantSchedule(val=1e-05))"}
    assert described_schedule(nested) == 1e-5
    for schedule in (ConstantSchedule(0.25), LinearSchedule(1.0, 0.5, 0.1)):
        item = json.loads(save_util.data_to_json({"x": schedule}))["x"]
        read = described_schedule(item)
        assert (read(0.95) if callable(read) else read) == schedule(0.95)


def test_weights_decide_the_architecture(tmp_path, small):
    changed = edited(small, tmp_path / "a.zip", policy_kwargs={"net_arch": [64, 64], "ortho_init": False})
    kwargs = read_archive(changed).policy_kwargs
    assert kwargs == {"net_arch": {"pi": [4], "vf": [4]}, "ortho_init": False}


def test_agents_of_sb3_1_and_openai_gym(tmp_path, small):
    kind = "<class 'gym.spaces.{}'>"
    box = {"dtype": "float32", "low": "[-4.8000002e+00 -3.4028235e+38 -inf]", "high": "[4.8 inf inf]"}
    function = {":type:": "<class 'function'>", ":serialized:": "gASVxgIAAAAAAACMF2Nsb3VkcGlja2xl"}
    old = edited(
        small,
        tmp_path / "old.zip",
        {"_stable_baselines3_version": None},
        observation_space={":type:": kind.format("box.Box"), "shape": [3], **box},
        action_space={":type:": kind.format("discrete.Discrete"), "n": 2, "shape": [], "dtype": "int64"},
        policy_kwargs={"net_arch": [{"pi": [4], "vf": [4]}], "ortho_init": False},
        clip_range=function,
        lr_schedule=function,
    )
    archive = read_archive(old)
    lowest = np.float32([-4.8, np.finfo(np.float32).min, -np.inf])
    assert archive.observation_space == spaces.Box(lowest, np.float32([4.8, np.inf, np.inf]))
    assert archive.action_space == spaces.Discrete(2)
    assert archive.policy_kwargs == {"net_arch": {"pi": [4], "vf": [4]}, "ortho_init": False}
    assert archive.hyperparameters["learning_rate"] == 3e-4
    assert archive.untrusted == ("clip_range",) and archive.sb3_version is None


def names():
    return st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=5)


@st.composite
def boxes(draw):
    dtype = np.dtype(draw(st.sampled_from(["float32", "float64", "int8", "uint8", "int64"])))
    shape = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
    if dtype.kind == "f":
        number = st.one_of(st.just(np.inf), st.floats(-1e6, 1e6, width=32))
        draw_one = st.tuples(number.map(lambda x: -abs(x)), number.map(abs))
    else:
        number = st.integers(int(np.iinfo(dtype).min), int(np.iinfo(dtype).max) - 2)
        draw_one = st.tuples(number, number).map(sorted)
    pairs = [draw(draw_one) for _ in range(int(np.prod(shape)))]
    low, high = (np.array([pair[i] for pair in pairs], dtype).reshape(shape) for i in (0, 1))
    return spaces.Box(low, high, shape=shape, dtype=dtype.type)


def counts():
    vectors = st.lists(st.integers(1, 300), min_size=1, max_size=40)
    return st.one_of(
        st.builds(lambda n, start: spaces.Discrete(n, start=start), st.integers(1, 10**6), st.integers(-9, 9)),
        vectors.map(spaces.MultiDiscrete),
        st.builds(spaces.MultiDiscrete, st.just([3, 4]), start=st.just([1, -2])),
        st.just([[2, 3], [4, 5]]).map(lambda nvec: spaces.MultiDiscrete(np.array(nvec))),
        st.integers(1, 9).map(spaces.MultiBinary),
        st.just([2, 3]).map(spaces.MultiBinary),
    )


@given(st.one_of(boxes(), counts()), st.booleans())
@settings(max_examples=150, deadline=None)
def test_spaces_are_read_back_from_their_text(space, printed_before):
    if printed_before:
        str(space)  # fills Box.low_repr, which is stored too
    read = described_space(json.loads(save_util.data_to_json({"space": space}))["space"])
    assert read == space and read.dtype == space.dtype and read.shape == space.shape


@pytest.mark.parametrize("printed_before", [False, True])
def test_a_box_of_one_entry_is_read_back_beside_its_env(printed_before):
    space = spaces.Box(-2.0, 2.0, (1,), np.float32)  # Pendulum's torque; "[-2.]" unless printed before
    if printed_before:
        str(space)
    item = json.loads(save_util.data_to_json({"space": space}))["space"]
    assert described_space(item, space) == described_space(item, spaces.Box(-1.0, 2.0, (1,), np.float32)) == space


@given(st.lists(st.tuples(names(), st.one_of(boxes(), counts())), min_size=1, max_size=4, unique_by=lambda p: p[0]))
@settings(max_examples=100, deadline=None)
def test_dict_spaces_are_read_back_in_order(entries):
    space = spaces.Dict([(key, s) for key, s in entries if getattr(s, "nvec", np.zeros(1)).ndim == 1])
    item = json.loads(save_util.data_to_json({"space": space}))["space"]
    older = {**item, "spaces": str(OrderedDict(space.spaces))}
    for description in (item, older):
        read = described_space(description)
        assert list(read.spaces.items()) == list(space.spaces.items())


def test_ordered_dicts_as_python_before_3_12_prints_them():
    text = "OrderedDict([('b', Discrete(2)), ('a', Box(-1.0, [1. 2.], (2,), float32))])"
    space = described_space({":type:": "<class 'gym.spaces.dict.Dict'>", "spaces": text})
    assert list(space.spaces) == ["b", "a"]
    assert space["a"] == spaces.Box(np.float32([-1, -1]), np.float32([1, 2]))


def test_elided_bounds_come_from_the_env_or_are_refused(tmp_path):
    low = -np.linspace(1, 2, 1500, dtype=np.float32)
    space = spaces.Box(low, -low)
    build(PPO, "MlpPolicy", space, n_steps=2, batch_size=2, policy_kwargs={"net_arch": [1]}).save(tmp_path / "a.zip")
    with pytest.raises(NsrlError, match=r"observation_space .* give an env"):
        read_archive(tmp_path / "a.zip")
    assert read_archive(tmp_path / "a.zip", FakeEnv(space, TORQUE)).observation_space == space
    other = spaces.Box(np.where(np.arange(1500) == 1, -9, low).astype(np.float32), -low)
    with pytest.raises(NsrlError, match="observation_space"):
        read_archive(tmp_path / "a.zip", FakeEnv(other, TORQUE))


def test_env_supplies_the_digits_that_print_rounds(tmp_path):
    exact = spaces.Box(-np.pi, np.pi, (2,), np.float64)
    build(PPO, "MlpPolicy", VECTOR, exact, n_steps=2, batch_size=2).save(tmp_path / "a.zip")
    assert read_archive(tmp_path / "a.zip").action_space == exact
    assert read_archive(tmp_path / "a.zip", FakeEnv(VECTOR, exact)).action_space.high[0] == np.pi


UNSUPPORTED = {
    "sac": (lambda: build(SAC, "MlpPolicy", buffer_size=1), "only on-policy"),
    "dqn": (lambda: build(DQN, "MlpPolicy", VECTOR, spaces.Discrete(2), buffer_size=1), "only on-policy"),
    "extractor": (
        lambda: build(PPO, "MlpPolicy", policy_kwargs={"features_extractor_class": OwnExtractor}),
        "OwnExtractor.*trust",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_agents_are_refused_with_the_reason(case, tmp_path):
    make, reason = UNSUPPORTED[case]
    make().save(tmp_path / "agent.zip")
    with pytest.raises(NsrlError, match=reason):
        read_archive(tmp_path / "agent.zip")


@pytest.mark.parametrize("cls, policy", [(MaskablePPO, "MlpPolicy"), (RecurrentPPO, "MlpLstmPolicy")])
def test_relatives_of_ppo_are_told_apart(cls, policy, tmp_path):
    build(cls, policy, VECTOR, spaces.Discrete(2), n_steps=2, batch_size=2).save(tmp_path / "agent.zip")
    assert read_archive(tmp_path / "agent.zip").algorithm == cls.__name__


def saved_tensors(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


BROKEN = {
    "no data": ({"data": None}, "without data"),
    "no weights": ({"policy.pth": None}, "without policy.pth"),
    "no json": ({"data": b"\xff{"}, "not JSON"),
    "deep json": ({"data": "[" * 100_000}, "not JSON"),
    "no object": ({"data": "[1]"}, "not a JSON object"),
    "empty object": ({"data": "{}"}, "PPO, A2C and TRPO"),
    "no tensors": ({"policy.pth": b"PK"}, "weights"),
    "numbers": ({"policy.pth": saved_tensors({"a": 1})}, "weights"),
    "unnamed": ({"policy.pth": saved_tensors({1: torch.ones(1)})}, "weights"),
    "nan": ({"policy.pth": saved_tensors({"a": torch.tensor(float("nan"))})}, "NaN"),
    "shared": ({"policy.pth": saved_tensors({"mlp_extractor.shared_net.0.weight": torch.ones(1)})}, "1.8"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_archives_are_refused_in_one_sentence(case, tmp_path, small):
    members, reason = BROKEN[case]
    with pytest.raises(NsrlError, match=reason) as caught:
        read_archive(edited(small, tmp_path / "broken.zip", members))
    assert str(tmp_path / "broken.zip") in str(caught.value)


def test_missing_files_and_folders_are_refused(tmp_path):
    for path in (tmp_path / "absent.zip", tmp_path):
        with pytest.raises(NsrlError, match="no agent at"):
            read_archive(path)
    (tmp_path / "text.zip").write_text("hello")
    with pytest.raises(NsrlError, match="not a zip"):
        read_archive(tmp_path / "text.zip")


def test_no_truncation_gets_through(tmp_path, small):
    content, path = small.read_bytes(), tmp_path / "cut.zip"
    lengths = {*range(0, len(content), max(1, len(content) // 150)), *range(len(content) - 30, len(content))}
    for length in lengths:
        path.write_bytes(content[:length])
        with pytest.raises(NsrlError):
            read_archive(path)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_flipped_byte_is_noticed_or_harmless(small, data):
    content = bytearray(small.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = small.with_name("flipped.zip")
    path.write_bytes(content)
    whole = read_archive(small)
    try:
        archive = read_archive(path)
    except NsrlError:
        return
    assert archive.hyperparameters == whole.hyperparameters
    assert all(torch.equal(archive.state_dict[name], tensor) for name, tensor in whole.state_dict.items())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_tampered_metadata_never_escapes_as_another_error(small, data):
    original = metadata(small)
    key = data.draw(st.sampled_from(sorted(original)))
    value = data.draw(JSON)
    if isinstance(original[key], dict) and original[key] and data.draw(st.booleans()):
        value = {**original[key], data.draw(st.sampled_from(sorted(original[key]))): value}
    path = edited(small, small.with_name("tampered.zip"), **{key: value})
    try:
        read_archive(path)
    except NsrlError as error:
        assert str(path) in str(error)


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize("key", ["observation_space", "policy_class", "policy_kwargs", "clip_range", "stranger"])
def test_payloads_in_the_metadata_are_not_decoded(key, tmp_path, small):
    trace = tmp_path / "trace"
    serialized = json.loads(save_util.data_to_json({key: Payload(trace)}))[key][":serialized:"]
    value = {**(metadata(small).get(key) or {":type:": "<class 'dict'>"}), ":serialized:": serialized}
    path = edited(small, tmp_path / "hostile.zip", **{key: value})
    read_archive(path)
    assert not trace.exists()
    with suppress(Exception):
        PPO.load(path, device="cpu")
    assert trace.exists(), "the payload is a dud and the test proves nothing"


def test_payloads_in_the_weights_are_refused(tmp_path, small):
    trace = tmp_path / "trace"
    for weights in (saved_tensors({"a": Payload(trace)}), pickle.dumps(Payload(trace))):
        with pytest.raises(NsrlError, match=r"weights.*trust=True"):
            read_archive(edited(small, tmp_path / "hostile.zip", {"policy.pth": weights}))
        assert not trace.exists()
    torch.load(io.BytesIO(saved_tensors({"a": Payload(trace)})), weights_only=False)
    assert trace.exists(), "the payload is a dud and the test proves nothing"


def test_atomic_writing_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "new folder" / "file.txt"
    with written_atomically(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), written_atomically(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
    with pytest.raises(NsrlError, match="cannot write"), written_atomically(path / "below.txt") as temporary:
        temporary.write_text("x")
