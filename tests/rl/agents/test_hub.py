"""Agents on the hub: downloaded through huggingface_hub (a stand-in here), read by the same safe loader."""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from nsrl import NullSpacePPO
from nsrl.errors import NsrlError
from nsrl.rl import agents
from nsrl.rl.agents.locations import is_hub_url


class Steady(gym.Env):
    observation_space = spaces.Box(-1.0, 1.0, (3,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), 1.0, False, False, {}


def normalized() -> PPO:
    env = VecNormalize(DummyVecEnv([Steady]))
    return PPO("MlpPolicy", env, n_steps=8, batch_size=8, n_epochs=1, device="cpu").learn(16)


class Hub:
    """A hub of one repository, user/repo, whose cache is a folder."""

    def __init__(self, root: Path) -> None:
        self.files, self.cache = root / "files", root / "cache"
        self.files.mkdir()
        self.online = True
        self.downloads: list[tuple[str, str | None]] = []

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str | None = None) -> str:
        self.downloads.append((filename, revision))
        cached = self.cache / filename
        if not self.online and not cached.is_file():
            raise self.errors.LocalEntryNotFoundError(filename)
        if self.online:
            if repo_id != "user/repo":
                raise self.errors.RepositoryNotFoundError(repo_id)
            if revision not in (None, "v1"):
                raise self.errors.RevisionNotFoundError(revision)
            if not (self.files / filename).is_file():
                raise self.errors.EntryNotFoundError(filename)
            cached.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.files / filename, cached)
        return str(cached)

    def list_repo_files(self, repo_id: str, *, revision: str | None = None) -> list[str]:
        if not self.online:
            raise OSError("no route to host")
        return [str(file.relative_to(self.files)) for file in self.files.rglob("*") if file.is_file()]

    @property
    def errors(self) -> Any:
        return sys.modules["huggingface_hub.errors"]


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    remote = Hub(tmp_path)
    package, errors = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.errors")
    package.hf_hub_download, package.list_repo_files = remote.hf_hub_download, remote.list_repo_files
    package.errors = errors
    # As in the package: what is not in the cache counts as an entry that is not there.
    errors.EntryNotFoundError = type("EntryNotFoundError", (Exception,), {})
    errors.LocalEntryNotFoundError = type("LocalEntryNotFoundError", (errors.EntryNotFoundError,), {})
    for name, base in (
        ("RepositoryNotFoundError", OSError),
        ("RevisionNotFoundError", OSError),
        ("OfflineModeIsEnabled", ConnectionError),
    ):
        setattr(errors, name, type(name, (base,), {}))
    monkeypatch.setitem(sys.modules, "huggingface_hub", package)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return remote


@pytest.mark.parametrize(
    ("zip_file", "statistics"),
    [
        ("ppo-Env-v1.zip", "vec_normalize.pkl"),  # as rl-zoo3 pushes an agent
        ("runs/agent.zip", "runs/vecnormalize.pkl"),
        ("ppo/Env-v1_1/Env-v1.zip", "ppo/Env-v1_1/Env-v1/vecnormalize.pkl"),  # as rl-zoo3 keeps it on disk
    ],
)
def test_an_agent_comes_with_its_statistics(remote: Hub, zip_file: str, statistics: str) -> None:
    model = normalized()
    (remote.files / statistics).parent.mkdir(parents=True, exist_ok=True)
    model.save(remote.files / zip_file)
    model.get_vec_normalize_env().save(str(remote.files / statistics))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent = agents.load(f"hf://user/repo@v1/{zip_file}")
    assert remote.downloads == [(zip_file, "v1"), (statistics, "v1")]
    assert agent.path == remote.cache / zip_file
    assert agents.fingerprint(agent.model.policy) == agents.fingerprint(model.policy)
    raw = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    assert np.array_equal(agent.normalizer.normalize(raw), model.get_vec_normalize_env().normalize_obs(raw))


def test_fine_tuning_starts_from_the_hub(remote: Hub) -> None:
    source = PPO("MlpPolicy", Steady(), n_steps=8, batch_size=8, device="cpu")
    source.save(remote.files / "agent.zip")
    model = NullSpacePPO.from_pretrained("hf://user/repo/agent.zip", Steady())
    assert agents.fingerprint(model.policy) == agents.fingerprint(source.policy)
    assert remote.downloads == [("agent.zip", None)]


class Bomb:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)

    def __call__(self, progress: float) -> float:
        return 1e-3


def test_nothing_from_the_hub_is_unpickled(remote: Hub, tmp_path: Path) -> None:
    model = PPO("MlpPolicy", Steady(), n_steps=8, batch_size=8, device="cpu")
    mark = tmp_path / "exploded"
    model.learning_rate = Bomb(mark)
    model.save(remote.files / "agent.zip")
    with pytest.warns(UserWarning, match="learning_rate of .* only pickled"):
        agents.load("hf://user/repo/agent.zip")
    assert not mark.exists()
    with pytest.raises(AssertionError):  # what the bomb leaves behind is no schedule
        PPO.load(remote.files / "agent.zip", device="cpu")
    assert mark.exists(), "the bomb is live: stock load sets it off"


def test_what_was_downloaded_before_works_offline(remote: Hub) -> None:
    model = normalized()
    model.save(remote.files / "agent.zip")
    model.get_vec_normalize_env().save(str(remote.files / "vecnormalize.pkl"))
    agents.load("hf://user/repo/agent.zip")
    remote.online = False
    with pytest.warns(UserWarning, match="cannot be asked for observation statistics"):
        agent = agents.load("hf://user/repo/agent.zip")
    assert agent.normalizer is not None
    with pytest.raises(NsrlError, match=r"cannot be reached and other.zip is not in its cache"):
        agents.load("hf://user/repo/other.zip")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("hf://user/repo", "expected hf://user/repo/file.zip"),
        ("hf://repo/agent.zip", "expected hf://user/repo/file.zip"),
        ("hf://user/repo/agent.pkl", "expected hf://user/repo/file.zip"),
        ("hf://user/repo/../agent.zip", "expected hf://user/repo/file.zip"),
        ("hf://user/repo/./agent.zip", "expected hf://user/repo/file.zip"),
        ("hf://us er/repo/agent.zip", "expected hf://user/repo/file.zip"),
        ("hf://user/repo@/agent.zip", "expected hf://user/repo/file.zip"),
        ("hf://user/other/agent.zip", "has no repository user/other"),
        ("hf://user/repo@v2/agent.zip", "no such revision"),
        ("hf://user/repo/agent.zip", "the repository user/repo has no file agent.zip"),
    ],
)
def test_bad_addresses_are_one_sentence(remote: Hub, url: str, reason: str) -> None:
    with pytest.raises(NsrlError, match=reason) as caught:
        agents.load(url)
    assert url in str(caught.value) and "\n" not in str(caught.value)


def test_other_failures_are_one_sentence(remote: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> str:
        raise OSError("No space left\non device")

    monkeypatch.setattr(sys.modules["huggingface_hub"], "hf_hub_download", full)
    with pytest.raises(NsrlError, match=r"cannot be downloaded .OSError: No space left on device"):
        agents.load("hf://user/repo/agent.zip")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(NsrlError, match=r"pip install \"nsrl\[hub\]\""):
        agents.load("hf://user/repo/agent.zip")


def test_only_urls_of_the_hub_are_for_the_hub(tmp_path: Path) -> None:
    assert is_hub_url("hf://user/repo/agent.zip")
    assert not any(map(is_hub_url, ("agent.zip", "hf:/user", tmp_path, None)))
