# ruff: noqa: E501  (rows of a table are one line each)
"""Writes docs/reliability.md: `python -m tests.reading.hostile.table docs/reliability.md`, then `make reliability`.

Every hostile file is met by the command line that reads its kind, in processes of their own under a limit of memory and
of processor time; what is written there is what happened.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from nsrl.reading import limits
from nsrl.reading.pickles import LONGEST_NUMBER
from nsrl.reading.zips import DIRECTORY
from nsrl.runs.machine import describe_environment
from tests.reading.hostile import controls
from tests.reading.hostile.worker import CASES, MEMORY, PROCESSOR, outcomes

TRIED = {name: case for name, case in CASES.items() if case not in controls.CASES.values()}
#: Kind of file, what it is, and the command that met it.
KINDS = {
    "statistics": ("observation statistics (pickle, npz)", "evaluate --agent FOLDER"),
    "agent": ("agents (zip: JSON, tensors)", "evaluate --agent FILE"),
    "buffer": ("retention buffers (npz)", "evaluate --buffer FILE"),
    "checkpoint": ("checkpoints (zip: JSON, tensors)", "finetune --resume FOLDER"),
    "task": ("finished tasks (`taskN.pt`)", "continual --resume FOLDER"),
    "configuration": ("configurations (YAML)", "finetune --config FILE"),
    "suite": ("suites (YAML)", "bench FILE"),
    "results": ("results (`metrics.json`)", "continual --resume FOLDER"),
    "history": ("histories (`history.jsonl`)", "finetune --resume FOLDER"),
    "digits": ("MNIST (idx, gzip)", "continual --benchmark.data FOLDER"),
    "pictures": ("TinyImageNet (JPEG, PNG)", "continual --benchmark.data FOLDER"),
}
TEXT = """\
# Reliability

<!-- made by `make reliability` -->
<!-- end of what `make reliability` makes -->

## Files that mean harm

Whatever nsrl reads, somebody else may have made: an agent from the hub, a buffer, a run's folder, a configuration. All of it is
read as data, within bounds that are looked at before anything is allocated, and what does not fit ends in one sentence and exit
code 2. The readers are in `nsrl/reading` and know nothing of reinforcement learning; nothing else in nsrl opens such a file.

| what | how |
|---|---|
| pickles | a machine of our own follows the opcodes; it imports nothing, calls nothing, and hashes only text and small numbers |
| tensors | read from the zip (or the stream of before torch 1.6) by the same machine, not by `torch.load`: dense, not overlapping, no larger than their storage |
| arrays | headers in the one form that numpy writes; sizes must agree before memory is taken; numpy sees exact arrays only |
| zips | only members that lie apart, once each, stored or deflated, and that come to no more than a multiple of the file |
| JSON, YAML | depth, entries (as often as aliases repeat them), digits; a key once; no tags beyond JSON's values; no class to import |
| policies | built without memory first: nothing is allocated unless the described policy has the shapes of the weights in the file |
| attributes | by name from a fixed list for each class; states of generators, optimizers and engines are compared with what they can be |

Bounds (`nsrl/reading/limits.py`): {bounds}.

`trust=True` (`--trust true`) unpickles with Python's own unpickler and runs whatever a file says; it has to be said on the
command line or in the call, a configuration or a run's folder cannot say it of itself. Not covered: Minari data sets (HDF5, read
by minari), the packages that download from the hub, the decoders of JPEG and PNG (Pillow; dimensions are looked at first), and
environments, which are code: a configuration that names `module:Env-v0` runs that module.

## Hostile files tried, and what each got

`python -m tests.reading.hostile.table docs/reliability.md`: {count} files, each met by a command line in a process with {memory} MB
of address space to spare and {processor:g} s of processor time ({machine}). The same files, through the functions that read them, are a
test of the gate (`tests/reading/test_hostile_files.py`); so are seeded mutations of valid files of every kind
(`tests/reading/test_mutations.py`, 10,000 a part with `make test-all`).

| kind of file | command | files | refused in one sentence, exit code 2 | read, the harm being ignored | anything else | most memory |
|---|---|---|---|---|---|---|
{rows}

{lists}
"""


def bounds() -> str:
    """The limits, in words."""
    megabyte = limits.MIB
    return ", ".join(
        [
            f"{limits.DEPTH} levels of nesting",
            f"{limits.ELEMENTS:,} entries of a JSON text of at most {limits.JSON // megabyte} MB",
            f"{limits.NODES:,} entries of a YAML text of at most {limits.YAML // 1024} KB",
            f"{limits.DIGITS} digits of a number",
            f"{limits.OPCODES:,} opcodes of a pickle, numbers of {LONGEST_NUMBER} bytes in it",
            f"{limits.STATISTICS // megabyte} MB of observation statistics",
            f"{DIRECTORY // megabyte} MB of a zip's directory",
            f"weights of {limits.OF_WEIGHTS.least // megabyte} MB, or {limits.OF_WEIGHTS.ratio} times the zip's own size",
            f"observations of {limits.OF_OBSERVATIONS.least // megabyte} MB, or {limits.OF_OBSERVATIONS.ratio} times",
        ]
    )


def document(found: dict[str, dict[str, Any]]) -> str:
    """The page."""
    rows, lists = [], []
    for kind, (what, command) in KINDS.items():
        names = [name for name, case in TRIED.items() if case.kind == kind]
        counts = {outcome: [n for n in names if found[n]["outcome"] == outcome] for outcome in ("refused", "read")}
        odd = [name for name in names if name not in counts["refused"] + counts["read"]]
        memory = max(found[name]["megabytes"] for name in names)
        cells = [what, f"`nsrl {command}`", len(names), len(counts["refused"]), len(counts["read"]), len(odd)]
        rows.append(f"| {' | '.join(map(str, cells))} | {max(10, round(memory, -1)):.0f} MB |")
        told = "; ".join(name.partition(": ")[2] + ("" if name in counts["refused"] else " (read)") for name in names)
        example = found[counts["refused"][0]]["sentence"]
        lists.append(f"**{what[0].upper()}{what[1:]}**: {told}. For example: *{example.replace('*', chr(92) + '*')}*")
    machine = describe_environment()
    return TEXT.format(
        bounds=bounds(),
        count=len(TRIED),
        memory=MEMORY // limits.MIB,
        processor=PROCESSOR,
        rows="\n".join(rows),
        lists="\n\n".join(lists),
        machine=f"Python {machine['python']}, torch {machine['packages']['torch']}",
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        Path(sys.argv[1]).write_text(document(outcomes(TRIED, Path(folder), "--command")), encoding="utf-8")
