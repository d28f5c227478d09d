"""Files that mean harm end in one sentence, within bounds of memory and time: see `tests.reading.hostile`."""

from pathlib import Path

import pytest

from tests.reading.hostile.worker import CASES, outcomes

#: Megabytes over what the process had before.
MEMORY = 300
#: One file of each kind that the command line meets.
MET = list({case.kind: name for name, case in reversed(CASES.items()) if not case.harmless}.values())

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured as only Linux does it"),
    pytest.mark.timeout(900),  # all files are read when the first result is asked for
]


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """What each file got from the function that reads its kind."""
    return outcomes(CASES, tmp_path_factory.mktemp("read"))


@pytest.fixture(scope="module")
def met(tmp_path_factory):
    """What some files got from the command line."""
    return outcomes(MET, tmp_path_factory.mktemp("met"), "--command")


def check(found):
    assert found["outcome"] == "refused", found
    assert 20 < len(found["sentence"]) < 500 and found["sentence"].isprintable(), found
    assert found["megabytes"] < MEMORY, found


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_ends_in_one_sentence(name, read):
    if CASES[name].harmless:
        assert read[name]["outcome"] == "read" and read[name]["megabytes"] < MEMORY, read[name]
    else:
        check(read[name])


@pytest.mark.parametrize("name", MET)
def test_the_command_line_ends_with_exit_code_2(name, met):
    check(met[name])
