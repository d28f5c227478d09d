"""A tiny agent and runs made with it, shared by all tests of the command line."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nsrl.cli.main import main

#: Options that make any training take a second.
QUICK = (
    "--progress",
    "false",
    "--ppo.n_envs",
    "2",
    "--evaluation.every",
    "256",
    "--evaluation.episodes",
    "2",
    "--evaluation.final_episodes",
    "2",
)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> Iterator[Path]:
    """A run folder of `nsrl pretrain`."""
    out = tmp_path_factory.mktemp("agents") / "cartpole"
    options = ("--total_timesteps", "512", "--ppo.n_steps", "128", "--ppo.batch_size", "64")
    assert main(["pretrain", "--env", "nsrl/CartPole-v0", "--out", str(out), *options, *QUICK]) == 0
    before = contents(out)
    yield out
    assert contents(out) == before, "a test has changed the run that all share"


@pytest.fixture(scope="session")
def finetuning(pretrained) -> Callable[..., list[str]]:
    """The words of a quick fine-tuning run; later words win."""

    def words(*more: str) -> list[str]:
        return [
            "finetune",
            "--agent",
            str(pretrained),
            "--pair",
            "cartpole_swapped",
            "--total_timesteps",
            "512",
            "--states.n_states",
            "64",
            # so that rows stand on the grid of the roll-outs; test_opening has it on
            "--retention.opening",
            "off",
            *QUICK,
            *more,
        ]

    return words


@pytest.fixture(scope="session")
def finetuned(finetuning, tmp_path_factory) -> Iterator[Path]:
    """A run folder of `nsrl finetune`."""
    out = tmp_path_factory.mktemp("runs") / "swapped"
    assert main(finetuning("--out", str(out))) == 0
    before = contents(out)
    yield out
    assert contents(out) == before, "a test has changed the run that all share"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """An empty working directory, to see that nothing is written there."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder
