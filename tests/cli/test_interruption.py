"""Ctrl-C, SIGTERM and kill -9: the run goes on where its checkpoint is, and its curves join."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nsrl.cli.main import main
from nsrl.files import read_lines

ROLLOUT = 256
DEMO = (
    "--pretraining.total_timesteps",
    "1024",
    "--pretraining.evaluation.final_episodes",
    "2",
    "--finetuning.states.n_states",
    "64",
)
TOTAL = 20 * ROLLOUT


def stop(words: list[str], folder: Path, number: int, rollouts: int) -> subprocess.CompletedProcess:
    """Start a command, and send it a signal once its history has grown by some rollouts."""
    before = len(read_lines(folder / "history.jsonl"))
    process = subprocess.Popen(
        [sys.executable, "-m", "nsrl.cli.main", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        while len(read_lines(folder / "history.jsonl")) < before + rollouts:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate()
    finally:
        process.kill()
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def long(finetuning, folder: Path) -> list[str]:
    return finetuning(
        "--total_timesteps", str(TOTAL), "--checkpoint_every", str(ROLLOUT), "--ppo.n_epochs", "2", "--out", str(folder)
    )


def test_a_run_survives_ctrl_c_and_kill(finetuning, tmp_path, capsys, a_second_later):
    folder = tmp_path / "run"
    stopped = stop(long(finetuning, folder), folder, signal.SIGINT, 4)
    assert stopped.returncode == 130 and "Traceback" not in stopped.stderr
    assert stopped.stderr.splitlines()[-1] == f"nsrl: interrupted; go on with: nsrl finetune --resume {folder}"
    assert (folder / "checkpoint.zip").is_file() and not (folder / "metrics.json").exists()

    killed = stop(["finetune", "--resume", str(folder), "--progress", "false"], folder, signal.SIGKILL, 4)
    assert killed.returncode == -signal.SIGKILL
    a_second_later()
    assert main(["finetune", "--resume", str(folder), "--progress", "false"]) == 0
    assert not (folder / "checkpoint.zip").exists()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["timesteps"] == TOTAL
    rows = read_lines(folder / "history.jsonl")
    # one row a rollout, none lost and none twice
    assert [row["timesteps"] for row in rows] == list(range(0, TOTAL + 1, ROLLOUT))
    assert all(row["kl_mean"] <= 0.01 for row in rows)
    assert metrics["before"]["kl_mean"] == pytest.approx(0.0, abs=1e-9)
    events = EventAccumulator(str(folder / "tb"), purge_orphaned_data=True)
    events.Reload()
    steps = [event.step for event in events.Scalars("retain/kl_mean")]
    assert steps == list(range(0, TOTAL + 1, ROLLOUT))


@pytest.mark.slow
def test_a_terminated_demo_takes_its_runs_along(tmp_path):
    words = ["demo", "--out", str(tmp_path / "demo"), "--cache", str(tmp_path / "cache"), *DEMO]
    stopped = stop(words, tmp_path / "demo" / "plain", signal.SIGTERM, 3)
    assert stopped.returncode == 143 and "Traceback" not in stopped.stderr
    lines = len(read_lines(tmp_path / "demo" / "plain" / "history.jsonl"))
    assert (tmp_path / "demo" / "plain" / "checkpoint.zip").is_file()
    # every process that works for the demo has a path below its folder among its words
    words = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.is_file()]
    assert not any(str(tmp_path).encode() in word for word in words)
    assert len(read_lines(tmp_path / "demo" / "plain" / "history.jsonl")) == lines


@pytest.mark.slow
def test_the_demo_prints_one_table_and_takes_the_cached_agent(elsewhere, capsys):
    for _ in range(2):
        words = ["demo", "--progress", "false", *DEMO, "--finetuning.total_timesteps", "2048"]
        assert main([*words, "--finetuning.evaluation.final_episodes", "2"]) == 0
        lines = capsys.readouterr().out.splitlines()
        rows = [line.split()[0] for line in lines[3:6]]
        assert rows == ["before", "plain", "NullSpacePPO"] and max(map(len, lines)) <= 100
        paths = [line.split()[-1] for line in lines[6:]]
        assert len(paths) == 3 and all((elsewhere / path).exists() for path in paths)
    assert len(list((elsewhere / "runs" / "cache").iterdir())) == 1
    assert len(list((elsewhere / "runs").glob("demo-*"))) == 2


@pytest.mark.slow
def test_sigterm_leaves_a_run_that_goes_on(finetuning, tmp_path):
    folder = tmp_path / "run"
    stopped = stop(long(finetuning, folder), folder, signal.SIGTERM, 2)
    assert stopped.returncode == 143
    assert f"nsrl finetune --resume {folder}" in stopped.stderr
    assert main(["finetune", "--out", str(folder), *long(finetuning, folder)[1:]]) == 2


def test_a_missing_checkpoint_is_no_new_beginning(finetuned, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finetuned, folder)
    (folder / "metrics.json").unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(["finetune", "--resume", str(folder), "--progress", "false"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"nsrl: {folder / 'checkpoint.zip'} is missing, but history.jsonl goes on to step 512")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_over(finetuned, finetuning, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(finetuning("--out", str(folder))) == 0
    expected = json.loads((folder / "metrics.json").read_text())
    for name in ("metrics.json", "history.jsonl", "agent.zip", "report.md", "curves.png"):
        (folder / name).unlink()
    with pytest.warns(UserWarning, match="has no checkpoint yet: its training begins at step 0"):
        assert main(["finetune", "--resume", str(folder), "--progress", "false"]) == 0
    assert json.loads((folder / "metrics.json").read_text())["after"] == expected["after"]
