"""One process at a time in a folder, whatever becomes of that process."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nsrl.errors import NsrlError
from nsrl.files import TEMPORARY, written_atomically
from nsrl.runs.folder import RunFolder
from nsrl.runs.lock import LOCK, locked

HOLD = """
import sys
from pathlib import Path
from nsrl.runs.folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
with folder.made():
    folder.buffer.write_text("half")
    if sys.argv[2] == "begun":
        folder.config.write_text("seed: 0")
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path, how: str = "begun") -> subprocess.Popen:
    """A process that is at work in a folder until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen, number: int | None = None) -> None:
    if number is not None:
        process.send_signal(number)
    process.communicate()


def test_a_second_process_is_told_who_is_at_work(tmp_path):
    process = hold(tmp_path / "run")
    try:
        with pytest.raises(NsrlError, match=f"run is in use by process {process.pid}; wait"):
            with RunFolder(tmp_path / "run").continued():
                pass
        with pytest.raises(NsrlError, match="is in use; choose another --out, or continue"):
            with RunFolder(tmp_path / "run").made():
                pass
    finally:
        end(process)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", "retention.npz"]


@pytest.mark.parametrize("number", [None, signal.SIGTERM, signal.SIGKILL])
def test_the_lock_goes_with_its_holder(number, tmp_path):
    end(hold(tmp_path / "run"), number)
    with RunFolder(tmp_path / "run").continued():
        assert (tmp_path / "run" / LOCK).read_text() == str(os.getpid())
    assert not (tmp_path / "run" / LOCK).exists()


def test_who_waits_gets_the_folder_when_it_is_free(tmp_path):
    process = hold(tmp_path / "run")
    process.stdin.close()  # ends it, soon
    with locked(tmp_path / "run", patience=60.0):
        assert process.poll() is None or process.returncode == 0
    process.wait()
    process.stdout.close()


def test_a_run_that_was_killed_before_it_began_is_in_nobodys_way(tmp_path):
    end(hold(tmp_path / "run", "setting up"), signal.SIGKILL)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {LOCK, "retention.npz"}
    with RunFolder(tmp_path / "run").made():
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
        (tmp_path / "run" / "config.yaml").write_text("seed: 1")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_what_people_put_there_stays(tmp_path):
    (tmp_path / "retention.npz").write_text("mine")
    with pytest.raises(NsrlError, match=r"is in use; choose another --out$"):
        with RunFolder(tmp_path).made():
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["retention.npz"]


@pytest.mark.parametrize("there", [False, True])
def test_a_block_that_fails_before_there_is_a_run_leaves_no_trace(there, tmp_path):
    folder = RunFolder(tmp_path / "deep" / "run")
    if there:
        folder.path.mkdir(parents=True)
    with pytest.raises(ZeroDivisionError), folder.made():
        folder.pretrained.parent.mkdir()
        folder.buffer.write_text("half")
        1 / 0  # noqa: B018
    assert folder.path.exists() == (tmp_path / "deep").exists() == there
    assert not there or not any(folder.path.iterdir())
    with pytest.raises(ZeroDivisionError), folder.made():
        folder.config.write_text("seed: 0")
        1 / 0  # noqa: B018
    assert [path.name for path in folder.path.iterdir()] == ["config.yaml"]


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("text")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(NsrlError, match="cannot write into"), locked(tmp_path / "run"):
        pass
    assert (tmp_path / "precious").read_text() == "text"


def test_what_killed_writers_left_goes_when_a_run_goes_on(tmp_path):
    names = []
    for suffix in (".json", ".zip", ""):
        with written_atomically(tmp_path / f"file{suffix}") as temporary:
            temporary.write_text(json.dumps(1))
            names.append(temporary.name)
            assert TEMPORARY.fullmatch(temporary.name)
    for name in [*names, ".gitignore", "agent.zip"]:
        (tmp_path / name).write_text("half")
    with RunFolder(tmp_path).continued():
        pass
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"file.json", "file.zip", "file", ".gitignore", "agent.zip"}
