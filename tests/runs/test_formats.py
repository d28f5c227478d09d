"""Files of the formats so far are read; those of a newer nsrl are refused in a sentence that names it.

`formats/finetune_1` is a run of `nsrl finetune` that was interrupted at half its way, with an nsrl that wrote no
`format.json` and said in no file which nsrl it is.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import nsrl
from nsrl import RetentionBuffer
from nsrl.cli.main import main
from nsrl.continual.config import BenchmarkSettings, ContinualConfig, ModelSettings, TrainingSettings
from nsrl.continual.records import Records
from nsrl.errors import NsrlError
from nsrl.files import STAMP
from nsrl.rl import agents
from nsrl.rl.training.checkpoint import read_checkpoint
from nsrl.runs.config import PretrainConfig
from nsrl.runs.finetuning import resume_finetuning
from nsrl.runs.folder import RunFolder
from nsrl.versions import BUFFER, CHECKPOINT, RUN, VERSION, Format

OLD = Path(__file__).parent / "formats" / "finetune_1"
NEWER = "9.8.7"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The old run, to be gone on with."""
    return shutil.copytree(OLD, tmp_path / "run")


def test_there_is_one_version() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()  # tomllib is of Python 3.11
    assert re.findall(r'^version = "(.*)"$', project, re.MULTILINE) == [VERSION] == [nsrl.__version__]


def test_a_run_of_the_first_format_is_finished(run: Path) -> None:
    assert not (run / STAMP).exists()
    state, _ = read_checkpoint(run / "checkpoint.zip")
    assert state["format"] == 1 and "nsrl" not in state["versions"]
    outcome = resume_finetuning(run)
    assert outcome.metrics["timesteps"] == 384 > state["counters"]["num_timesteps"]
    assert outcome.metrics["after"]["kl_mean"] <= 0.01
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert rows[0] == json.loads((OLD / "history.jsonl").read_text().splitlines()[0])


def test_a_buffer_of_the_first_format_is_that_of_its_agent(run: Path) -> None:
    with np.load(run / "retention.npz") as file:
        assert file["format"] == 1 and b'"nsrl": ' not in file["header"].tobytes().split(b"provenance")[0]
        outputs = file["outputs"]
    buffer = RetentionBuffer.load(run / "retention.npz")
    np.testing.assert_array_equal(buffer.outputs, outputs)
    buffer.check(agents.load(run / "pretrained" / "agent.zip"))  # by its measured KL


def test_a_buffer_of_the_second_format_without_its_writer(run: Path) -> None:
    one = RetentionBuffer.load(run / "retention.npz")
    both = RetentionBuffer.merge([one, one])
    path = both.save(run / "merged.npz")
    with np.load(path) as file:
        arrays = dict(file)
    header = json.loads(arrays["header"].tobytes())
    assert arrays["format"] == 2 and header.pop("nsrl") == VERSION
    np.savez(path, **{**arrays, "header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)})
    assert RetentionBuffer.load(path).digest() == both.digest()


def newer_buffer(run: Path) -> Callable[[], object]:
    np.savez(
        run / "retention.npz",
        format=np.int64(BUFFER.newest + 1),
        header=np.frombuffer(json.dumps({"nsrl": NEWER}).encode(), dtype=np.uint8),
    )
    return lambda: RetentionBuffer.load(run / "retention.npz")


def newer_checkpoint(run: Path) -> Callable[[], object]:
    with zipfile.ZipFile(run / "checkpoint.zip", "w") as archive:
        archive.writestr("state.json", json.dumps({"format": CHECKPOINT.newest + 1, "versions": {"nsrl": NEWER}}))
        archive.writestr("tensors.pt", b"of another form")
    return lambda: resume_finetuning(run)


def newer_folder(run: Path) -> Callable[[], object]:
    (run / STAMP).write_text(json.dumps({"format": RUN.newest + 1, "nsrl": NEWER}))
    (run / "config.yaml").write_text("of: another form")
    return lambda: resume_finetuning(run)


def newer_task(run: Path) -> Callable[[], object]:
    torch.save({"format": 2, "nsrl": NEWER, "results": []}, run / "task0.pt")
    return lambda: Records(run, ContinualConfig()).read()


@pytest.mark.parametrize("newer", [newer_buffer, newer_checkpoint, newer_folder, newer_task])
def test_what_a_newer_nsrl_wrote_is_refused_in_a_sentence_that_names_it(
    newer: Callable[[Path], Callable[[], object]], run: Path
) -> None:
    with pytest.raises(
        NsrlError, match=rf"written by nsrl 9\.8\.7; this is nsrl {re.escape(VERSION)}.*install nsrl 9\.8\.7"
    ):
        newer(run)()


def test_the_command_line_says_it_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newer_folder(run)
    for command in ("finetune", "continual", "pretrain"):
        assert main([command, "--resume", str(run)]) == 2
        assert f"install nsrl {NEWER} or later" in capsys.readouterr().err


@pytest.mark.parametrize("writer", [None, 3, "1.0\n; rm", "x" * 1000, "", "1" * 50])
def test_what_is_no_version_is_not_repeated(writer: object) -> None:
    with pytest.raises(NsrlError, match=r"reads format 1 to 3; install a later nsrl$"):
        Format("a thing", 3).check("file", 4, writer)


@pytest.mark.parametrize("stamp", ["[]", "{}", '{"format": "new"}', '{"format": 0}', '{"format": 1.5}', "{"])
def test_a_damaged_stamp_is_refused(stamp: str, run: Path) -> None:
    (run / STAMP).write_text(stamp)
    with pytest.raises(NsrlError, match=STAMP):
        resume_finetuning(run)


def test_a_finished_task_that_says_no_format_is_read(tmp_path: Path) -> None:
    config = ContinualConfig(
        benchmark=BenchmarkSettings(name="teacher_student", tasks=2),
        model=ModelSettings(hidden=[8]),
        training=TrainingSettings(epochs=1),
    )
    entry = {"task": "a", "scores": [0.5], "losses": [1.0], "diagnostics": {}, "memory_bytes": 0}
    entry |= {"train_seconds": 1.0, "train_cpu_seconds": 1.0}
    torch.save({"entry": entry, "state": {"weights": {}, "progress": {}}}, tmp_path / "task0.pt")
    assert Records(tmp_path, config).read() == [entry]


def test_what_is_written_says_its_format_and_its_writer(run: Path, tmp_path: Path) -> None:
    path = RetentionBuffer.load(run / "retention.npz").save(tmp_path / "new.npz")
    with np.load(path) as file:
        assert json.loads(file["header"].tobytes())["nsrl"] == VERSION
    RunFolder(tmp_path).write_config(PretrainConfig())
    assert json.loads((tmp_path / STAMP).read_text()) == {"format": RUN.newest, "nsrl": VERSION}
