"""CounterFact and ZsRE, from the files that their authors published and a user has.

CounterFact (Meng et al. 2022, arXiv 2202.05262): a list of records with requested_rewrite, paraphrase_prompts and
neighborhood_prompts, whose answer is the one before the edit. ZsRE (Levy et al. 2017, in the form of Mitchell et al.,
arXiv 2110.11309): a list of records with subject, src, rephrase, alt, answers, loc and loc_ans.

Nothing is left out silently: a record that makes no edit is a sentence that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsrl.editing.edits import Edit
from nsrl.editing.knowledge.facts import Fact
from nsrl.errors import NsrlError
from nsrl.files import given_path
from nsrl.reading.documents import parse_json
from nsrl.reading.limits import JSON, Unreadable, about, read_bytes, shown

#: Lists, mappings and entries of a file, commas in its texts among them; CounterFact's has some two million.
ELEMENTS = 4_000_000
FORMS = "CounterFact (requested_rewrite, ...) or ZsRE (subject, src, alt, answers, ...)"


def read_facts(path: str | Path, count: int | None = None) -> list[Fact]:
    """Facts of a file, in its order.

    Args:
        path: of a JSON file in CounterFact's form or ZsRE's, told apart by their keys.
        count: how many of the first ones; None takes all.

    Raises:
        NsrlError: there is no such file, it is no JSON, of another form or shorter, or a record makes no edit.
    """
    try:
        records = parse_json(read_bytes(given_path(path), JSON), elements=ELEMENTS)
    except OSError as error:
        raise NsrlError(f"cannot read the facts of {path}: {error.strerror or error}") from error
    except Unreadable as error:
        raise NsrlError(about(path, error) + f"; give a JSON file in the form of {FORMS}") from error
    if not isinstance(records, list) or not records:
        raise NsrlError(f"{path} holds no list of records; give a file in the form of {FORMS}")
    if count is not None and count > len(records):
        raise NsrlError(f"{path} has {len(records)} records, not {count}; ask for fewer")
    found = []
    for number, record in enumerate(records[:count]):
        try:
            found.append(_fact(record))
        except _Unfit as error:
            raise NsrlError(f"record {number} of {path} {error}") from error
    return found


class _Unfit(Exception):
    """Why a record makes no edit: what follows its number."""


def _fact(record: Any) -> Fact:
    if isinstance(record, dict) and "requested_rewrite" in record:
        return _counterfact(record)
    if isinstance(record, dict) and "src" in record:
        return _zsre(record)
    raise _Unfit(f"has neither requested_rewrite nor src; the forms are {FORMS}")


def _counterfact(record: Mapping[str, Any]) -> Fact:
    rewrite = record["requested_rewrite"]
    if not isinstance(rewrite, dict):
        raise _Unfit(f"has {shown(rewrite)} for requested_rewrite, which is a mapping")
    subject, prompt = _text(rewrite, "subject"), _text(rewrite, "prompt")
    new, old = (_text(_mapping(rewrite, key), "str") for key in ("target_new", "target_true"))
    return Fact(
        _edit(prompt, subject, new),
        _answer(old),
        tuple(_texts(record, "paraphrase_prompts")),
        tuple((text, _answer(old)) for text in _texts(record, "neighborhood_prompts")),
    )


def _zsre(record: Mapping[str, Any]) -> Fact:
    subject, question = _text(record, "subject"), _text(record, "src")
    before, found, behind = question.rpartition(subject)
    if not found:
        raise _Unfit(f"does not have its subject {shown(subject)} in its src {shown(question)}")
    answers = _texts(record, "answers")
    if not answers:
        raise _Unfit("has no answers")
    return Fact(
        # The last occurrence: its last token is where the edit is written.
        _edit(f"{before}{{}}{behind}", subject, _text(record, "alt")),
        _answer(answers[0]),
        (_text(record, "rephrase"),),
        ((_text(record, "loc").rstrip("?") + "?", _answer(_text(record, "loc_ans"))),),
    )


def _edit(prompt: str, subject: str, target: str) -> Edit:
    try:
        return Edit(prompt, subject, _answer(target))
    except NsrlError as error:
        raise _Unfit(f"makes no edit: {error}") from error


def _answer(text: str) -> str:
    """With the space in front that continues a prompt; the files have none, or a stray one."""
    return " " + text.strip()


def _mapping(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = record.get(key)
    if not isinstance(value, dict):
        raise _Unfit(f"has {shown(value)} for {key}, which is a mapping with str")
    return value


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise _Unfit(f"has {shown(value)} for {key}, which is a text")
    return value


def _texts(record: Mapping[str, Any], key: str) -> list[str]:
    value = record.get(key)
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise _Unfit(f"has {shown(value)} for {key}, which is a list of texts")
    return value
