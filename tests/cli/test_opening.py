"""The opening on the command line and in YAML: what is taken, what is refused, and what a run tells of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nsrl.cli.main import main
from nsrl.errors import NsrlError
from nsrl.runs.config import FinetuneConfig
from nsrl.runs.settings import build_parser, load, parse, to_yaml

TAKEN = {"auto": "auto", "off": "off", "0.9": 0.9, "1": 1.0, "1e-1": 0.1}
REFUSED = ("yes", "nan", "2", "true", "-0.5", "0", "inf", "[0.9]", "of")


def written(folder: Path, word: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(f"retention:\n  opening: {word}\n")
    return path


def of_words(*words: str) -> FinetuneConfig:
    return parse(FinetuneConfig, words, build_parser(FinetuneConfig))[0]


@pytest.mark.parametrize("word", TAKEN)
def test_a_setting_is_taken_from_words_and_files_and_survives_being_written(word: str, tmp_path: Path) -> None:
    """YAML reads a bare `off` as false."""
    path = written(tmp_path, word)
    for config in (of_words("--retention.opening", word), of_words("--config", str(path)), load(FinetuneConfig, path)):
        found = config.retention.opening
        assert found == TAKEN[word] and type(found) is type(TAKEN[word])
        again = tmp_path / "again.yaml"
        again.write_text(to_yaml(config))
        assert load(FinetuneConfig, again) == config
    assert of_words("--config", str(path), "--retention.opening", "0.5").retention.opening == 0.5


@pytest.mark.parametrize("word", REFUSED)
def test_anything_else_is_refused_in_a_sentence(word: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = written(tmp_path, word)
    for words in (("--retention.opening", word), ("--config", str(path))):
        assert main(["finetune", *words, "--progress", "false"]) == 2
        told = capsys.readouterr()
        assert told.out == "" and told.err.startswith("nsrl: ") and told.err.count("\n") == 1
        assert "opening must be" in told.err
    with pytest.raises(NsrlError, match="opening must be"):
        load(FinetuneConfig, path)


def test_a_run_says_what_its_opening_did(finetuning, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    assert main(finetuning("--retention.opening", "0.99", "--progress", "true", "--out", str(out))) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fine-tuning")]
    assert lines[0].endswith("opening") and not any("opening" in line for line in lines[1:])
    record = json.loads((out / "metrics.json").read_text())["retention"]["opening"]
    assert record["states"] > 0 and 0.0 <= record["before"] <= 1.0 and record["kl"] <= 0.01
    report = (out / "report.md").read_text()
    assert "Before the first roll-out: opening" in report and f"{record['states']} timesteps" in report
    assert "opening: 0.99" in (out / "config.yaml").read_text()


def test_a_run_without_one_says_nothing(finetuned: Path) -> None:
    assert json.loads((finetuned / "metrics.json").read_text())["retention"]["opening"] is None
    assert "first roll-out" not in (finetuned / "report.md").read_text()
    assert load(FinetuneConfig, finetuned / "config.yaml").retention.opening == "off"
