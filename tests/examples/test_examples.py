"""Every script of `examples/` runs, in an empty folder and with few steps, says what it found and is listed."""

from __future__ import annotations

import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
#: Steps of each training: one rollout of most scripts.
STEPS = "256"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a script sets for its own process is put back: here it is everyone's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["example"])
    monkeypatch.setenv("NSRL_EXAMPLE_STEPS", STEPS)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_runs(
    script: Path,
    environment: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if script.stem == "buffer_from_minari" and find_spec("minari") is None:
        with pytest.raises(SystemExit, match=r"needs the package minari: pip install \"nsrl\[minari\]\""):
            runpy.run_path(str(script), run_name="__main__")
        pytest.skip("it says that minari is not installed, and so it is")
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.strip(), "it says nothing"


def test_every_example_is_listed() -> None:
    listed = re.findall(r"\[`?([\w.]+\.py)`?\]\(([\w./]+)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted((path.name, path.name) for path in SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_what_it_is(script: Path) -> None:
    lines = script.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith('"""') and lines[0].endswith((".", '."""'))
    assert len(lines) <= 65, "30 to 60 lines, and an import or two"
