"""Digests of the golden trajectories of a checkout, and whether two checkouts have the same.

    python -m tests.golden.record OUT.json              this checkout's digests
    python -m tests.golden.record --against CHECKOUT    this checkout beside another one, on this machine

Rounding differs from one CPU to the next, so no digest is committed: both sides run on one machine, with the recorder
of this checkout, which finds what has moved by `tests.golden.locations`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def record(names: Sequence[str] = ()) -> dict[str, dict[str, str]]:
    """Digests by case and part; all cases, or those named."""
    import torch

    from tests.golden.cases import CASES

    torch.set_num_threads(1)
    found = {}
    for name in names or CASES:
        torch.manual_seed(0)
        found[name] = CASES[name]()
    return found


def record_checkout(checkout: Path, names: Sequence[str] = ()) -> dict[str, dict[str, str]]:
    """Digests of the code of a checkout, by a process of its own.

    Raises:
        RuntimeError: the process failed; with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "digests.json"
        # The code of that checkout, the recorder of this one: `tests` is found here because the process starts here.
        paths = [checkout, checkout / "envs"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-P", "-c", BOOT.format(recorder=str(CHECKOUT)), str(out)]
        for name in names:
            command += ["--only", name]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"no digests of {checkout}:\n{done.stdout}{done.stderr}")
        return json.loads(out.read_text())


#: `tests` of the recorder's checkout beside `nsrl` of the other one, whose own `tests` stay out of the way.
BOOT = (
    "import sys, types; tests = types.ModuleType('tests'); tests.__path__ = [{recorder!r} + '/tests']; "
    "sys.modules['tests'] = tests; from tests.golden.record import main; sys.exit(main())"
)


def differences(ours: dict[str, dict[str, str]], theirs: dict[str, dict[str, str]]) -> list[str]:
    """Cases and parts in which two recordings differ, as "case: part"."""
    found = []
    for name in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(name, {}), theirs.get(name, {})
        found += [f"{name}: {part}" for part in sorted(one.keys() | other.keys()) if one.get(part) != other.get(part)]
    return found


def main() -> int:
    """Record or compare; exit code 1 where two checkouts differ."""
    parser = argparse.ArgumentParser(description="digests of the golden trajectories")
    parser.add_argument("out", nargs="?", type=Path, help="JSON file for this checkout's digests")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout to compare with")
    parser.add_argument("--only", action="append", default=[], metavar="CASE", help="this case only; may be repeated")
    words = parser.parse_args()
    if words.against is None and words.out is None:
        parser.error("give a file to write, or --against CHECKOUT")
    if words.against is None:
        found = record(words.only)
        words.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        return 0
    ours = record_checkout(CHECKOUT, words.only)
    differing = differences(ours, record_checkout(words.against.resolve(), words.only))
    if words.out is not None:
        words.out.write_text(json.dumps(ours, indent=1, sort_keys=True) + "\n")
    parts = sum(map(len, ours.values()))
    print("\n".join(differing) or f"equal: {len(ours)} trajectories, {parts} digests")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
