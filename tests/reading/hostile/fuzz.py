"""Seeded mutations of valid files: `python -m tests.reading.hostile.fuzz FOLDER COUNT SEED TARGET ...`.

A target is a kind of file and the part of it that is mutated; what lies around that part (checksums, archives) is made
anew, so that the damage is met by the reader of the part and not by a checksum. Prints how many were read and refused,
one JSON object a target; with `--record runs/reference/fuzz.json` in front they replace those of that file, too.
"""

from __future__ import annotations

import io
import json
import random
import resource
import signal
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nsrl.errors import NsrlError
from nsrl.files import write_json
from tests.reading.hostile import controls
from tests.reading.hostile.workbench import Workbench, zipped
from tests.reading.hostile.worker import MEMORY, PROCESSOR, _status

#: The whole file and a way into it: names of members, one inside the other ("*" stands for a folder that torch names).
TARGETS: dict[str, tuple[str, ...]] = {
    "statistics": (),
    "agent": (),
    "agent/data": ("data",),
    "agent/weights": ("policy.pth",),
    "agent/weights/pickle": ("policy.pth", "*/data.pkl"),
    "buffer": (),
    "buffer/header": ("header.npy",),
    "buffer/outputs": ("outputs.npy",),
    "checkpoint": (),
    "checkpoint/state": ("state.json",),
    "checkpoint/tensors": ("tensors.pt",),
    "checkpoint/tensors/pickle": ("tensors.pt", "*/data.pkl"),
    "task": (),
    "task/pickle": ("*/data.pkl",),
    "configuration": (),
    "results": (),
    "history": (),
    "digits": (),
    "labels": (),
    "archive": (),
    "saved": (),
    "saved/data": ("data",),
    "terms": (),
    "runs": (),
    "retention_file": (),
    "moments": (),
}
#: Bytes and words that mean something to one reader or another.
WORDS = [
    *(bytes([code]) for code in b'\xff\x00[]{}()"-RbQthOV\n\x81\x85\x86\x8f\x91\x94'),
    *(b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"h\x00", b"\x8b\xff\xff\xff\x7f", b"PK\x05\x06", b"PK\x01\x02"),
    *(b"NaN", b"1e999", b"null", b"9" * 60, b"&a ", b"*a", b"<<: ", b"!!", b": "),
]


def mutated(content: bytes, draw: random.Random) -> bytes:
    """The content with one to four damages."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at, length = draw.randrange(len(changed) + 1), draw.choice((1, 1, 2, 4, 8, 64))
        way = draw.randrange(6)
        if way == 0 and at < len(changed):
            changed[at] ^= 1 << draw.randrange(8)
        elif way == 1:
            changed[at : at + length] = draw.choice(WORDS)
        elif way == 2:
            changed[at:at] = draw.choice(WORDS) * draw.choice((1, 1, 1, 50))
        elif way == 3:
            del changed[at : at + length]
        elif way == 4:
            start = draw.randrange(len(changed) + 1)
            changed[at:at] = changed[start : start + length]
        else:
            changed[at : at + length] = draw.randbytes(length)
    return bytes(changed)


def inside(content: bytes, way: tuple[str, ...], change: Callable[[bytes], bytes]) -> bytes:
    """A file with a member of it, or of a member, changed."""
    if not way:
        return change(content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    wanted = way[0].removeprefix("*")
    name = next(name for name in parts if (name.endswith(wanted) if way[0].startswith("*") else name == wanted))
    return zipped({**parts, name: inside(parts[name], way[1:], change)})


def original(bench: Workbench, folder: Path, kind: str) -> bytes:
    """A valid file of a kind."""
    path = folder / "original"
    controls.CASES[kind].make(bench, path)
    return path.read_bytes()


def write_row(path: Path, row: dict[str, Any]) -> None:
    """Put the row of a target in the place of the one that the file has, in the order of `TARGETS`."""
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    found = {entry["target"]: entry for entry in [*rows, row]}
    write_json(path, {"rows": [found[target] for target in TARGETS if target in found]})


def main(folder: Path, count: int, seed: int, targets: list[str], record: Path | None = None) -> None:
    """Read `count` mutated files of each target; anything but a value or an NsrlError is told with its number."""
    warnings.simplefilter("ignore")
    bench = Workbench(folder)
    originals = {target: original(bench, folder, target.partition("/")[0]) for target in targets}
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for target in targets:
        row = {"target": target, **fuzzed(bench, folder, target, originals[target], count, seed)}
        print(json.dumps(row), flush=True)
        if record is not None:
            write_row(record, {**row, "mutations": count, "seed": seed})


def fuzzed(bench: Workbench, folder: Path, target: str, whole: bytes, count: int, seed: int) -> Counter[str]:
    """How many mutations were "read" and "refused", and what else happened."""
    kind = target.partition("/")[0]
    room = folder / "mutated" / target.replace("/", "-")
    room.mkdir(parents=True)
    path, read = room / Workbench.names[kind], bench.readers[kind]
    outcomes: Counter[str] = Counter()
    for number in range(count):
        draw = random.Random(f"{target} {seed} {number}")
        path.write_bytes(inside(whole, TARGETS[target], lambda content: mutated(content, draw)))  # noqa: B023
        signal.setitimer(signal.ITIMER_PROF, PROCESSOR)
        try:
            read(path)
            outcomes["read"] += 1
        except NsrlError:
            outcomes["refused"] += 1
        except Exception as error:
            outcomes[f"{number}: {type(error).__name__}: {error}"[:300]] += 1
        signal.setitimer(signal.ITIMER_PROF, 0)
    return outcomes


if __name__ == "__main__":
    words = sys.argv[1:]
    kept = Path(words[1]) if words[0] == "--record" else None
    words = words if kept is None else words[2:]
    main(Path(words[0]), int(words[1]), int(words[2]), words[3:], kept)
