"""A disk that fills up at any moment: one sentence, nothing lost that was written, and the run goes on.

No file of a folder can be opened for writing once it is full, as Python's audit hooks see every such opening.
"""

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsrl.cli.main import main
from nsrl.files import read_lines

RUN = {
    "finetune": (
        *("--total_timesteps", "256", "--states.n_states", "32", "--ppo.n_steps", "64", "--ppo.n_epochs", "1"),
        *("--retention.opening", "off"),
        *("--ppo.n_envs", "2", "--checkpoint_every", "128", "--evaluation.every", "128", "--evaluation.episodes", "1"),
        *("--evaluation.final_episodes", "1", "--progress", "false"),
    ),
    "continual": (
        *("--benchmark.name", "teacher_student", "--benchmark.tasks", "2", "--model.hidden", "[8]"),
        *("--strategy.name", "naive", "--training.epochs", "1", "--progress", "false"),
    ),
}


class Disk:
    """A disk with room for so many more openings of a file below a folder; None is room for all."""

    folder: Path | None = None
    left: int | None = None
    openings = 0

    def audit(self, event: str, arguments: tuple) -> None:
        """As `sys.addaudithook` calls it."""
        if event != "open" or self.folder is None or not isinstance(arguments[0], str | bytes):
            return
        path, _, flags = arguments
        if os.fsdecode(path).startswith(str(self.folder)) and flags & (os.O_WRONLY | os.O_RDWR):
            self.openings += 1
            if self.left is not None and self.openings > self.left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(path))


DISK = Disk()


@pytest.fixture(scope="session")
def hook() -> None:
    """Hooks stay for as long as the process lives."""
    sys.addaudithook(DISK.audit)


@pytest.fixture
def disk(hook, tmp_path) -> Iterator[Disk]:
    DISK.folder, DISK.left, DISK.openings = tmp_path, None, 0
    yield DISK
    DISK.folder = None


def check_every_moment(disk: Disk, words: list[str], root: Path, capsys, moments) -> None:
    """Fill the disk at some of the moments of a command, and go on with room each time."""
    assert main([*words, "--out", str(root / "whole")]) == 0
    total, expected = disk.openings, json.loads((root / "whole" / "metrics.json").read_text())
    assert total > 8, "otherwise little is tested"
    for moment in moments(total):
        out = root / f"full{moment}"
        disk.openings, disk.left = 0, moment
        capsys.readouterr()
        assert main([*words, "--out", str(out)]) == 2
        text = capsys.readouterr()
        told = [line for line in text.err.splitlines() if not line.startswith("nsrl: warning: ")]
        assert len(told) == 1 and told[0].startswith("nsrl: cannot write") and "No space left" in told[0], text.err
        assert "Traceback" not in text.err and text.out == "" and not (out / "metrics.json").exists()
        disk.left = None
        before = read_lines(out / "history.jsonl") if (out / "history.jsonl").exists() else []
        if (out / "config.yaml").exists():
            assert f"go on with --resume {out}" in told[0]
            assert main([words[0], "--resume", str(out), "--progress", "false"]) == 0
        else:
            assert "choose another --out" in told[0] and not out.exists()
            assert main([*words, "--out", str(out)]) == 0
        found = json.loads((out / "metrics.json").read_text())
        assert found.keys() == expected.keys() and found.get("timesteps") == expected.get("timesteps")
        if before:
            after = read_lines(out / "history.jsonl")
            steps = [row["timesteps"] for row in after]
            assert before[0] in after and steps == sorted(set(steps)) == [0, 128, 256]
        assert not [path for path in out.rglob(".*")]


@pytest.mark.parametrize("command", RUN)
def test_the_disk_fills_up(command, disk, request, tmp_path, capsys):
    words = [command, *RUN[command]]
    if command == "finetune":
        words += ["--agent", str(request.getfixturevalue("pretrained")), "--pair", "cartpole_swapped"]
    check_every_moment(disk, words, tmp_path, capsys, lambda total: [0, 2, total // 2, total - 1])


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN)
def test_the_disk_fills_up_at_many_moments(command, disk, request, tmp_path, capsys):
    words = [command, *RUN[command]]
    if command == "finetune":
        words += ["--agent", str(request.getfixturevalue("pretrained")), "--pair", "cartpole_swapped"]
    check_every_moment(disk, words, tmp_path, capsys, lambda total: range(1, total, 3))


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from torch import nn
from nsrl.continual.config import ContinualConfig
from nsrl.continual.records import Records
from nsrl.errors import NsrlError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
with Records(Path(sys.argv[1]), ContinualConfig()) as records:
    records._names = []
    try:
        records.finish({"matrix": [[1.0]]}, nn.Linear(500, 500))
    except NsrlError as error:
        print(error)
"""


@pytest.mark.parametrize("room", [100, 50_000, 900_000])
def test_weights_that_do_not_fit_are_told_as_such(room, tmp_path):
    """The system's own limit, in the middle of a file: torch.save answers it with "unexpected pos 576 vs 534"."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    (tmp_path / "run").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "run"), str(room)], capture_output=True, text=True
    )
    path = tmp_path / "run" / "model.pt"
    assert done.stdout == f"cannot write {path}: File too large; make room or choose another --out\n", done.stderr
    assert list(path.parent.iterdir()) == []
