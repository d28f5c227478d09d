"""Reads hostile files in a process of its own, under limits that end it: python -m tests.reading.hostile.worker FOLDER.

With --command the files are met by the command line, in the same process.

Names of cases come on the standard input, one a line; what each file got goes to the standard output as one JSON object
a line. A case that ends the process (a crash, five seconds of processor time, a minute of waiting) has no line.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nsrl.cli.main import main
from nsrl.errors import NsrlError
from tests.reading.hostile import arrays, controls, documents, pickled, runs, tensors, zipped
from tests.reading.hostile.workbench import Case, Workbench

#: What a file may cost its reader: processor time in seconds (a signal, and not a clock, ends it), waiting in seconds,
#: address space in bytes over what the process has already.
PROCESSOR, WAITING, MEMORY = 5.0, 60, 2**30
FAMILIES = (controls, pickled, zipped, tensors, arrays, runs, documents)
CASES: dict[str, Case] = {
    f"{family.__name__.rpartition('.')[2]}: {name}": case for family in FAMILIES for name, case in family.CASES.items()
}


def commanded(words: list[str]) -> None:
    """Run a command line in this process; NsrlError where it ends with one sentence and exit code 2."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        status = main([*words, "--progress", "false"] if words[0] != "bench" else words)
    sentence = told.getvalue()
    if status == 2 and sentence.count("\n") == 1 and sentence.startswith("nsrl: "):
        raise NsrlError(sentence.removeprefix("nsrl: ").strip())
    if status != 0:
        raise RuntimeError(f"exit code {status}: {sentence}")


def measured(case: Case, read: Callable[[], Any]) -> dict[str, Any]:
    """What reading a file came to: outcome, sentence, and megabytes of memory at the most."""
    before = _reset_peak()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + MEMORY, hard))
    signal.setitimer(signal.ITIMER_PROF, PROCESSOR)
    signal.alarm(WAITING)
    start = time.process_time()
    sentence = ""
    try:
        read()
        outcome = "read"
    except NsrlError as error:
        outcome, sentence = "refused", str(error)
    except BaseException as error:
        outcome, sentence = type(error).__name__, str(error)[:300]
    seconds = time.process_time() - start
    signal.alarm(0)
    signal.setitimer(signal.ITIMER_PROF, 0)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    megabytes = max(0.0, (_status("VmHWM") - before) / 2**20)
    return {"outcome": outcome, "sentence": sentence, "megabytes": megabytes, "seconds": seconds}


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of memory becomes what is in use now
    return _status("VmRSS")


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def read_all(folder: Path, by_command: bool) -> None:
    """Read the files of all cases that are named on the standard input, by the command line or by functions."""
    warnings.simplefilter("ignore")
    logging.disable()
    bench = Workbench(folder)
    assert bench.checkpoint and bench.task  # made before anything is measured
    for name in sys.stdin.read().splitlines():
        case, room = CASES[name], folder / "case"
        room.mkdir()
        path = room / Workbench.names[case.kind]
        case.make(bench, path)
        if by_command:
            words = bench.command(case.kind, path)
            result = measured(case, lambda: commanded(words))  # noqa: B023
        else:
            result = measured(case, lambda: bench.readers[case.kind](path))  # noqa: B023
        print(
            json.dumps({"case": name, **result, "sentence": result["sentence"].replace(str(room), "FOLDER")}),
            flush=True,
        )
        shutil.rmtree(room)


def outcomes(names: Iterable[str], folder: Path, *options: str) -> dict[str, dict[str, Any]]:
    """What each file got, in processes of their own: one, and another behind each case that ended one.

    Args:
        names: of the cases.
        folder: for the files.
        options: of the worker.
    """
    found: dict[str, dict[str, Any]] = {}
    left, root = list(names), Path(__file__).parents[3]
    while left:
        room = Path(tempfile.mkdtemp(dir=folder))
        done = subprocess.run(
            [sys.executable, "-m", "tests.reading.hostile.worker", str(room), *options],
            input="\n".join(left),
            capture_output=True,
            text=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])},
        )
        for row in map(json.loads, filter(lambda line: line.startswith('{"case"'), done.stdout.splitlines())):
            found[row.pop("case")] = row
        left = [name for name in left if name not in found]
        if left:
            told = done.stderr.strip().splitlines()
            ended = {"outcome": f"ended the process ({done.returncode})", "sentence": told[-1] if told else ""}
            found[left.pop(0)] = {**ended, "megabytes": 0.0, "seconds": 0.0}
        shutil.rmtree(room)
    return found


if __name__ == "__main__":
    read_all(Path(sys.argv[1]), "--command" in sys.argv[2:])
