"""Facts in the forms of CounterFact and ZsRE: what is read, and what a damaged file is told."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from nsrl.editing.knowledge.fact_files import read_facts
from nsrl.errors import NsrlError

COUNTERFACT: dict[str, Any] = {
    "case_id": 7,
    "pararel_idx": 1,
    "requested_rewrite": {
        "prompt": "The home of {} is in",
        "relation_id": "P0",
        "target_new": {"str": "Oslo", "id": "Q1"},
        "target_true": {"str": "Rome", "id": "Q2"},
        "subject": "Mira Toladane",
    },
    "paraphrase_prompts": ["Rain fell. Mira Toladane lives in the city of"],
    "neighborhood_prompts": ["The home of Leo Castelon is in", "The home of Clara Dorinham is in"],
    "attribute_prompts": [],
    "generation_prompts": ["Mira Toladane's house"],
}
ZSRE: dict[str, Any] = {
    "subject": "Mira Toladane",
    "src": "Is Mira Toladane's town where Mira Toladane works?",
    "pred": "Cairo",
    "rephrase": "Where does Mira Toladane work?",
    "alt": " Oslo",
    "answers": ["Rome", "Roma"],
    "loc": "nq question: who painted the sky",
    "loc_ans": "nobody",
    "cond": "Cairo >> Oslo || Where?",
}


def write(path: Path, records: Any) -> Path:
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def test_counterfact(tmp_path: Path) -> None:
    (fact,) = read_facts(write(tmp_path / "cf.json", [COUNTERFACT]))
    assert fact.edit.text == "The home of Mira Toladane is in" and fact.edit.subject == "Mira Toladane"
    assert (fact.edit.target, fact.truth) == (" Oslo", " Rome")
    assert fact.paraphrases == ("Rain fell. Mira Toladane lives in the city of",)
    assert fact.neighbours == tuple((text, " Rome") for text in COUNTERFACT["neighborhood_prompts"])


def test_zsre_is_edited_at_the_last_occurrence_of_its_subject(tmp_path: Path) -> None:
    (fact,) = read_facts(write(tmp_path / "zsre.json", [ZSRE]))
    assert fact.edit.prompt == "Is Mira Toladane's town where {} works?"
    assert fact.edit.text == ZSRE["src"]
    assert (fact.edit.target, fact.truth) == (" Oslo", " Rome")
    assert fact.paraphrases == ("Where does Mira Toladane work?",)
    assert fact.neighbours == (("nq question: who painted the sky?", " nobody"),)


def test_the_first_ones_are_taken_and_the_others_not_even_looked_at(tmp_path: Path) -> None:
    path = write(tmp_path / "both.json", [COUNTERFACT, ZSRE, {"src": 3}])
    assert [fact.edit.target for fact in read_facts(path, 2)] == [" Oslo", " Oslo"]
    with pytest.raises(NsrlError, match=r"record 2 of .* has None for subject"):
        read_facts(path)
    with pytest.raises(NsrlError, match="has 3 records, not 4"):
        read_facts(path, 4)


def changed(record: dict[str, Any], *keys: str, to: Any) -> list[dict[str, Any]]:
    record = copy.deepcopy(record)
    inner = record
    for key in keys[:-1]:
        inner = inner[key]
    if to is None:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = to
    return [COUNTERFACT, record]


@pytest.mark.parametrize(
    "records, told",
    [
        ({}, "holds no list of records"),
        ([], "holds no list of records"),
        ([COUNTERFACT, 3], "record 1 .* has neither requested_rewrite nor src"),
        (changed(COUNTERFACT, "requested_rewrite", to="x"), "record 1 .* for requested_rewrite, which is a mapping"),
        (changed(COUNTERFACT, "requested_rewrite", "target_new", to="Oslo"), "for target_new, which is a mapping"),
        (changed(COUNTERFACT, "requested_rewrite", "target_true", "str", to=None), "has None for str"),
        (
            changed(COUNTERFACT, "requested_rewrite", "prompt", to="The home is in"),
            "must have one {} where the subject",
        ),
        (changed(COUNTERFACT, "requested_rewrite", "subject", to=" "), "for subject, which is a text"),
        (changed(COUNTERFACT, "paraphrase_prompts", to="one"), "for paraphrase_prompts, which is a list of texts"),
        (changed(COUNTERFACT, "neighborhood_prompts", to=[3]), "for neighborhood_prompts, which is a list of texts"),
        (changed(ZSRE, "subject", to="Nobody"), "does not have its subject Nobody in its src"),
        (changed(ZSRE, "answers", to=[]), "has no answers"),
        (changed(ZSRE, "alt", to=None), "has None for alt"),
        (changed(ZSRE, "loc_ans", to=5), "has 5 for loc_ans"),
    ],
)
def test_a_damaged_record_is_one_sentence(tmp_path: Path, records: Any, told: str) -> None:
    with pytest.raises(NsrlError, match=told) as error:
        read_facts(write(tmp_path / "facts.json", records))
    assert "\n" not in str(error.value) and "facts.json" in str(error.value)


@pytest.mark.parametrize(
    "content, told", [(b"[{", "not|Expecting"), (b"\xff\xfe", "UTF-8"), (b"[" * 200 + b"]" * 200, "nested")]
)
def test_what_is_no_json_is_one_sentence(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "facts.json").write_bytes(content)
    with pytest.raises(NsrlError, match=told):
        read_facts(tmp_path / "facts.json")
    with pytest.raises(NsrlError, match="cannot read the facts of"):
        read_facts(tmp_path / "missing.json")
