"""`nsrl finetune` under torchrun: one run in two processes, of which the first writes what one process would write."""

from __future__ import annotations

import pickle
import socket
from pathlib import Path

import pytest
import torch.multiprocessing as mp

from nsrl.cli.main import main
from nsrl.errors import NsrlError
from nsrl.files import read_lines
from nsrl.rl import agents
from nsrl.rl.parallel.ranks import started_together
from nsrl.runs.folder import RunFolder
from tests.runs import parallel_worker

SMALL = "--ppo.n_steps 64 --ppo.batch_size 64 --states.n_states 64 --total_timesteps 512 --progress false".split()
EVALUATED = "--evaluation.every 256 --evaluation.episodes 2 --evaluation.final_episodes 2".split()


def together(folder: Path, words: list[str], interrupted: int | None = None) -> list[tuple[int, str]]:
    """Exit status of both processes, and what they said."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.spawn(parallel_worker.work, (str(folder), port, words, interrupted), 2, join=False)
    for process in context.processes:
        process.join()
    for path in map(Path, context.error_files):
        if path.is_file() and path.stat().st_size:
            pytest.fail(pickle.loads(path.read_bytes()))
    said = [(folder / f"{number}.txt").read_text().partition("\n") for number in range(2)]
    return [(int(status), text) for status, _, text in said]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """A quick run of fine-tuning, but for its folder and the number of its environments."""
    out = tmp_path_factory.mktemp("agents") / "cartpole"
    small = [*SMALL[:4], "--total_timesteps", "256", "--progress", "false"]
    assert main(["pretrain", "--env", "nsrl/CartPole-v0", "--out", str(out), *small, *EVALUATED]) == 0
    return ["finetune", "--agent", str(out), "--pair", "cartpole_swapped", *SMALL, *EVALUATED]


def rows(folder: Path) -> list[dict[str, object]]:
    return read_lines(folder / "history.jsonl")


@pytest.mark.slow
def test_two_processes_write_the_run_of_one_with_twice_the_environments(words, tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*words, "--ppo.n_envs", "4", "--out", str(one)]) == 0
    (first, said), (second, silence) = together(tmp_path / "said", [*words, "--ppo.n_envs", "2", "--out", str(two)])
    assert first == second == 0
    assert "old-task return" in said and not silence
    assert rows(one) == rows(two) and len(rows(two)) >= 3
    assert len({agents.fingerprint(agents.load(folder).model.policy) for folder in (one, two)}) == 1
    names = [sorted(path.name for path in folder.iterdir() if path.name != "tb") for folder in (one, two)]
    assert names[0] == names[1]


@pytest.mark.slow
def test_a_signal_to_one_process_leaves_a_run_to_go_on_with(words, tmp_path):
    out = tmp_path / "run"
    ended = together(tmp_path / "said", [*words, "--ppo.n_envs", "2", "--out", str(out)], interrupted=1)
    assert [status for status, _ in ended] == [143, 143]
    assert f"go on with: nsrl finetune --resume {out}" in ended[0][1] and "go on with" not in ended[1][1]
    assert RunFolder(out).checkpoint.is_file() and not RunFolder(out).finished
    (first, said), (second, _) = together(tmp_path / "more", ["finetune", "--resume", str(out), "--progress", "false"])
    assert first == second == 0 and "old-task return" in said
    metrics = RunFolder(out).read_metrics()
    assert metrics["timesteps"] >= 512 and metrics["retention"]["kl_most"] <= metrics["kl_budget"]


def test_only_what_torchrun_sets_makes_several_processes():
    told = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    assert started_together(told) == 4
    assert started_together({"WORLD_SIZE": "4"}) == 1  # as some schedulers leave it behind
    with pytest.raises(NsrlError, match="WORLD_SIZE is 'many', but must be a number of processes"):
        started_together({**told, "WORLD_SIZE": "many"})


@pytest.mark.parametrize(
    ("more", "told_of"),
    [
        (["--config", "sequence_cartpole"], "a sequence of tasks is one; leave torchrun out"),
        (
            [
                "--config",
                "cartpole_swapped",
            ],
            "run nsrl pretrain first",
        ),
    ],
)
def test_what_several_processes_cannot_do_is_told_before_anything_begins(more, told_of, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for key, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    assert main(["finetune", *more]) == 2
    assert told_of in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
