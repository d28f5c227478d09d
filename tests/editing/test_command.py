"""`nsrl edit` on a model that lies in a folder; what is wrong is one sentence and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from nsrl.cli.main import main
from nsrl.editing import Editor
from tests.editing.builders import EDITS, TEXTS, model, needs_transformers, tokenizer

needs_transformers()
from safetensors.torch import load_file  # noqa: E402


@pytest.fixture
def config(tmp_path):
    model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    edits = [{"prompt": edit.prompt, "subject": edit.subject, "target": edit.target} for edit in EDITS]
    content = {
        "model": str(tmp_path / "model"),
        "layers": "transformer.h.1.mlp.c_proj",
        "preserve": str(tmp_path / "texts.txt"),
        "edits": edits,
    }
    path = tmp_path / "edit.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_model_is_edited_and_saved(config, tmp_path, capsys) -> None:
    assert main(["edit", "--config", str(config), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "Mira Barabyx works as a" in told and "3 edits in 1 batches" in told
    from transformers import AutoModelForCausalLM

    again, before = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model()
    changed = [
        name
        for (name, new), old in zip(again.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(new, old)
    ]
    assert changed == ["transformer.h.1.mlp.c_proj.weight"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("killed_behind", [1, 2])
def test_a_killed_run_goes_on_to_the_same_bits(config, tmp_path, capsys, monkeypatch, killed_behind: int) -> None:
    words = ["edit", "--config", str(config), "--batch_size", "1", "--preserve", "null", "--samples", "6"]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    save, calls = Editor.save, []

    def killed(self, path):
        save(self, path)
        calls.append(path)
        if len(calls) == killed_behind:
            raise KeyboardInterrupt

    monkeypatch.setattr(Editor, "save", killed)
    assert main([*words, "--out", str(tmp_path / "cut")]) == 130
    assert f"--resume {tmp_path / 'cut'}" in capsys.readouterr().err
    assert not (tmp_path / "cut" / "metrics.json").exists()
    monkeypatch.setattr(Editor, "save", save)
    assert main(["edit", "--resume", str(tmp_path / "cut")]) == 0
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    told = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "cut")]
    for metrics in told:
        for batch in metrics["report"]["batches"]:
            del batch["searching"], batch["seconds"]
    assert told[0] == told[1]
    assert main(["edit", "--resume", str(tmp_path / "cut")]) == 0  # finished: said again, and nothing done
    assert (tmp_path / "cut" / "edits.png").read_bytes().startswith(b"\x89PNG")


def test_facts_of_a_file_are_judged(config, tmp_path, capsys) -> None:
    rewrite = {"prompt": "{} works as a", "subject": "Mira Barabyx"}
    rewrite |= {"target_new": {"str": "doctor"}, "target_true": {"str": "nurse"}}
    record = {"case_id": 0, "requested_rewrite": rewrite}
    record |= {"paraphrase_prompts": ["By profession Mira Barabyx is a"]}
    record |= {"neighborhood_prompts": ["Leo Castelon works as a"]}
    (tmp_path / "facts.json").write_text(json.dumps([record]))
    words = ["--facts", str(tmp_path / "facts.json"), "--edits", "[]", "--count", "1"]
    assert main(["edit", "--config", str(config), *words, "--out", str(tmp_path / "out")]) == 0
    told = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [row[:1] + row[3:4] for row in told["rows"]] == [["Mira Barabyx works as a", " doctor"]]
    assert told["scores"]["efficacy"] in (0.0, 1.0) and told["scores"]["edits"] == 1
    assert "efficacy" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, what",
    [
        (["--edits", "[]"], "there are no edits"),
        (["--method", "alphaedits"], "did you mean alphaedit"),
        (["--options", "{colour: 1}"], "no flag 'colour'"),
        (["--layers", "transformer.h.1.mlp.c_porj"], "near it are"),
        (["--model", "nowhere"], "is no folder of a transformers model"),
        (["--preserve", "nowhere.txt"], "cannot read the texts"),
        (["--facts", "facts.json"], "give edits or a file of facts, not both"),
        (["--facts", "nowhere.json", "--edits", "[]"], "cannot read the facts of nowhere.json"),
        (["--resume", "nowhere", "--seed", "3"], "leave the other options out"),
        (["--edits", "[{prompt: Leo sings, subject: Leo, target: loud}]"], "must have one {}"),
    ],
)
def test_bad_input_is_a_sentence(config, capsys, words: list[str], what: str) -> None:
    assert main(["edit", "--config", str(config), *words]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert what in told[-1] and told[-1].startswith("nsrl: ")
