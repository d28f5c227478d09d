"""`nsrl retain` and `nsrl forecast`: what they write and say is what the functions make of the same texts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nsrl.cli.main import main
from nsrl.editing.post_training.forecast import forecast_cost
from nsrl.editing.retention_file import RetentionFile
from tests.editing.builders import TEXTS, model, needs_transformers, tokenizer

needs_transformers()
OLD, NEW = TEXTS[:9], TEXTS[40:50]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "old.txt").write_text("\n\n".join(OLD))
    (tmp_path / "new.txt").write_text("\n".join(NEW))
    return tmp_path


def test_a_retention_file_has_the_models_answers(folder: Path, capsys) -> None:
    out = folder / "kept.safetensors"
    words = ["retain", "--model", str(folder / "model"), "--texts", str(folder / "old.txt"), "--top_k", "5"]
    assert main([*words, "--out", str(out)]) == 0
    found = RetentionFile.load(out)
    found.check(model(), tokenizer())
    ids = tokenizer()(OLD[0])["input_ids"]
    assert len(found) == len(OLD) and found.ids[: len(ids)].tolist() == ids
    with torch.no_grad():
        expected = model()(torch.tensor([ids])).logits[0].double().log_softmax(-1).topk(5)
    # The same products, padded and by themselves, in float32: a few of its units of logits of order ten.
    assert torch.allclose(found.answers.outputs[: len(ids)].double(), expected.values, atol=1e-4)
    assert f"texts        {len(OLD)}" in capsys.readouterr().out
    assert main([*words, "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_the_model_writes_texts_where_there_are_none(folder: Path, capsys) -> None:
    words = ["retain", "--model", str(folder / "model"), "--samples", "3", "--max_tokens", "8"]
    assert main([*words, "--out", str(folder / "own.safetensors")]) == 0
    assert len(RetentionFile.load(folder / "own.safetensors")) == 3


def loss(net, batch) -> torch.Tensor:
    rows = [net(torch.tensor([tokenizer()(text)["input_ids"]])).logits[0] for text in batch]
    wanted = [torch.tensor(tokenizer()(text)["input_ids"][1:]) for text in batch]
    return F.cross_entropy(torch.cat([row[:-1] for row in rows]), torch.cat(wanted))


def test_a_forecast_is_that_of_the_unpadded_texts(folder: Path, capsys) -> None:
    words = ["forecast", "--model", str(folder / "model"), "--preserve", str(folder / "old.txt"), "--steps", "3"]
    words += ["--new", str(folder / "new.txt"), "--batch_size", "4", "--learning_rate", "1e-4", "--optimizer", "sgd"]
    calibration = {"slope": 1.0, "intercept": 0.0, "spread": 0.5, "rank_correlation": 1.0, "runs": 24}
    (folder / "calibration.json").write_text(json.dumps({"calibration": calibration}))
    assert main([*words, "--calibration", str(folder / "calibration.json")]) == 0
    told = capsys.readouterr().out
    parts = [NEW[start : start + 4] for start in (0, 4, 8)]
    preserve = [torch.tensor([tokenizer()(text)["input_ids"]]) for text in OLD]
    expected = forecast_cost(model(), preserve, parts, loss, learning_rate=1e-4, steps=3, optimizer="sgd")
    number = float(told.split("KL")[1].split()[0])
    assert number == pytest.approx(expected.kl, rel=6e-3)  # three digits are printed
    assert f"{expected.kl * math.e:.2g}"[:3] in told and "24 fine-tunings" in told


@pytest.mark.parametrize(
    "words, what",
    [
        (["retain", "--texts", "nowhere.txt"], "cannot read the texts"),
        (["retain", "--model", "nowhere"], "is no folder of a transformers model"),
        (["retain", "--top_k", "0"], "top_k must be at least 1"),
        (["forecast", "--preserve", "empty.txt"], "holds no texts"),
        (["forecast", "--preserve", "one.txt", "--new", "one.txt"], "no two batches"),
        (["forecast", "--calibration", "nowhere.json"], "cannot read the calibration"),
        (["forecast", "--calibration", "other.json"], "holds no calibration"),
        (["forecast", "--steps", "0"], "steps must be at least 1"),
    ],
)
def test_bad_input_is_a_sentence(tmp_path: Path, monkeypatch, capsys, words: list[str], what: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "one.txt").write_text("a text")
    (tmp_path / "other.json").write_text('{"calibration": 3}')
    assert main(words) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert what in told[-1] and told[-1].startswith("nsrl: ")
