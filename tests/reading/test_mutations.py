"""Damaged files are read or refused, and nothing else: seeded mutations of every kind of file, part by part."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reading.hostile.fuzz import TARGETS

ROOT = Path(__file__).parents[2]
#: Of these every read trains a small network.
DEAR = ("task", "task/pickle")


def fuzz(folder, count, *targets):
    """How many mutations of each target were read and refused, and what else happened."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.reading.hostile.fuzz", str(folder), str(count), "0", *targets],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    found = {row.pop("target"): row for row in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0, f"ended behind {list(found)}: {done.stderr[-2000:]}"
    return found


@pytest.mark.timeout(900)
def test_mutations_are_read_or_refused(tmp_path):
    found = fuzz(tmp_path, 150, *(target for target in TARGETS if target not in DEAR))
    (tmp_path / "dear").mkdir()
    found |= fuzz(tmp_path / "dear", 40, *DEAR)
    assert found.keys() == TARGETS.keys()
    for target, outcomes in found.items():
        assert outcomes.keys() <= {"read", "refused"}, (target, outcomes)
        # a history is read up to the line that is damaged, runs without it
        assert outcomes.get("refused", 0) > 0 or target in ("history", "runs"), f"the mutations of {target} never hurt"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", TARGETS)
def test_ten_thousand_mutations_are_read_or_refused(target, tmp_path):
    assert fuzz(tmp_path, 10_000, target)[target].keys() <= {"read", "refused"}
