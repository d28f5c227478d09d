"""`nsrl edit` on a model that lies in a folder; what is wrong is one sentence and exit code 2."""

from __future__ import annotations

import pytest
import torch
import yaml

from nsrl.cli.main import main
from tests.editing.builders import EDITS, TEXTS, model, needs_transformers, tokenizer

needs_transformers()


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


@pytest.mark.parametrize(
    "words, what",
    [
        (["--edits", "[]"], "there are no edits"),
        (["--method", "alphaedits"], "did you mean alphaedit"),
        (["--options", "{colour: 1}"], "no flag 'colour'"),
        (["--layers", "transformer.h.1.mlp.c_porj"], "near it are"),
        (["--model", "nowhere"], "is no folder of a transformers model"),
        (["--preserve", "nowhere.txt"], "cannot read the texts"),
        (["--edits", "[{prompt: Leo sings, subject: Leo, target: loud}]"], "must have one {}"),
    ],
)
def test_bad_input_is_a_sentence(config, capsys, words: list[str], what: str) -> None:
    assert main(["edit", "--config", str(config), *words]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert what in told[-1] and told[-1].startswith("nsrl: ")
