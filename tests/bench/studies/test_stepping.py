"""The comparison of environments: what it counts, on a few steps."""

import pytest

from nsrl.bench.studies.stepping import TASKS, measure_stepping


def test_both_are_stepped_and_compared():
    found = measure_stepping(TASKS, counts=(4,), steps=3, repeats=1)
    assert tuple(found) == TASKS
    for counts in found.values():
        speed = counts[4]
        assert speed["stock"] > 0
        assert speed["ratio"] == pytest.approx(speed["arrays"] / speed["stock"])
