"""Two processes with two environments each are one process with four: the same numbers, bit for bit."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from nsrl.rl.training.checkpoint import restore
from tests.rl.parallel import worker
from tests.rl.parallel.worker import ALGORITHMS, BUDGET, COUNT, ENVS, STEPS, learn, model, told, walks

#: Of every process: several on few cores would wait for each other, and rounding is that of so many.
THREADS = 1


@pytest.fixture(autouse=True)
def threads(alone: None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worker.pretrained(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each of the two processes saved; the second one kills itself at the end."""
    context = mp.spawn(worker.work, (str(folder), THREADS), COUNT, join=False)
    assert context is not None
    for process in context.processes:
        process.join()
    for path in map(Path, context.error_files):
        if path.is_file() and path.stat().st_size:
            pytest.fail(pickle.loads(path.read_bytes()))
    return [torch.load(folder / f"{number}.pt", weights_only=False) for number in range(COUNT)]


def alone() -> Any:
    return walks(COUNT * ENVS, -1.0)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected["parameters"].items():
        assert torch.equal(found["parameters"][name], value), name
    assert {**found, "parameters": None} == {**expected, "parameters": None}


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_two_processes_are_one_with_twice_the_environments(kind, folder, ranks):
    expected = learn(kind, folder, alone())
    assert expected["updates"] == 3 and expected["timesteps"] == 3 * STEPS * COUNT * ENVS
    assert len(expected["episodes"]) == len(expected["successes"]) > COUNT * ENVS  # of all environments
    for found in ranks:
        assert_same(found[kind], expected)
        assert found[kind]["kl_most"] <= BUDGET  # on every one of them


def test_so_they_are_where_the_policy_is_opened_on_states_that_all_play(folder, ranks):
    expected = learn("ppo", folder, alone(), opening="auto")
    for found in ranks:
        assert_same(found["opened"], expected)


def test_one_process_goes_on_from_the_checkpoint_of_two(folder, ranks):
    assert_same(ranks[0]["resumed"], ranks[1]["resumed"])
    one = model("ppo", folder, alone())
    restore(folder / "checkpoint_0.zip", one)
    one.learn(STEPS * one.n_envs, reset_num_timesteps=False)
    assert_same(told(one), ranks[1]["resumed"])


def test_a_signal_to_one_stops_both_at_the_same_step(ranks):
    steps = {found["stopped at"] for found in ranks}
    assert steps == {6 * COUNT * ENVS}


def test_the_environments_of_all_are_asked(ranks):
    for found in ranks:
        assert found["attributes"] == ([-1.0] * 4, [-1.0] * 4, [-1.0])
        assert found["asked in vain"].startswith("AttributeError")


@pytest.mark.parametrize(
    ("fault", "told_of"),
    [
        ("other envs", "the environments of the processes differ"),
        ("disturbed", "the processes of this run act differently"),
        ("other seeds", "the processes of this run act differently"),
        ("drifted", "the policies of this run's processes differ (process 1 from process 0) behind update"),
    ],
)
def test_processes_that_cease_to_compute_the_same_say_so_on_both(fault, told_of, ranks):
    for found in ranks:
        assert found[fault].startswith(f"NsrlError: {told_of}")


def test_where_one_is_killed_the_other_says_so_and_leaves_a_checkpoint_to_go_on_from(folder, ranks):
    survivor = torch.load(folder / "survivor.pt", weights_only=False)
    assert survivor["collecting"]
    assert survivor["lost"].startswith("ProcessLost: another of the 2 processes of this run has ended")
    one = model("ppo", folder, alone())
    assert restore(folder / "last_0.zip", one)["timesteps"] == STEPS * COUNT * ENVS
    one.learn(2 * STEPS * one.n_envs, reset_num_timesteps=False)
    assert told(one)["updates"] == 3 and told(one)["kl_most"] <= BUDGET
