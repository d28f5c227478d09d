"""Edits that go on from a file: the same bits as without the interruption, and what a wrong file is told."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from nsrl.editing import METHODS, Edit, Editor, ValueSearch
from nsrl.errors import NsrlError
from tests.editing.builders import EDITS, TEXTS, model, needs_transformers, tokenizer

needs_transformers()
SEARCH = ValueSearch(steps=3, prefixes=1)
MORE = [
    *EDITS,
    Edit("{} works as a", "Leo Castelon", " nurse"),
    Edit("{} likes to play", "Mira Barabyx", " tennis"),
]


def editor(method: str, layers: list[int] | None = None) -> Editor:
    flags = {"kept": (0.0, 1.0)} if METHODS[method].projects else {}
    if not METHODS[method].ridge and not METHODS[method].relative_ridge:
        flags["ridge"] = 1e-3
    made = Editor(model(), tokenizer(), method, layers or [1, 2], SEARCH, **flags)
    made.preserve(TEXTS[:20])
    return made


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def batches(found: Editor) -> list:
    return [replace(batch, searching=0.0, seconds=0.0) for batch in found.report().batches]


@settings(max_examples=12)
@given(st.sampled_from(sorted(METHODS)), st.lists(st.integers(1, 2), min_size=2, max_size=3), st.data())
def test_a_run_that_goes_on_ends_as_if_it_had_not_been_interrupted(tmp_path_factory, method, sizes, data) -> None:
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    parts = [MORE[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    whole = editor(method)
    for part in parts:
        whole.apply(part)
    stop = data.draw(st.integers(1, len(parts) - 1))
    first = editor(method)
    for part in parts[:stop]:
        first.apply(part)
    path = first.save(tmp_path_factory.mktemp("edits") / "edits.safetensors")
    second = editor(method)
    second.load(path)
    assert same(second.model, first.model) and second.edits == first.edits
    for part in parts[stop:]:
        second.apply(part)
    assert same(second.model, whole.model) and batches(second) == batches(whole)
    assert second.report().kept_share == whole.report().kept_share
    second.undo()
    assert same(second.model, model())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = editor("nsrl")
    made.apply(MORE[:2])
    return made.save(tmp_path_factory.mktemp("edits") / "edits.safetensors")


def test_edits_made_with_something_else_are_refused(saved) -> None:
    changed = editor("nsrl")
    with torch.no_grad():
        changed.model.lm_head.weight[0, 0] += 1.0
    with pytest.raises(NsrlError, match="made with another model"):
        changed.load(saved)
    with pytest.raises(NsrlError, match="made with another method"):
        editor("memit").load(saved)
    with pytest.raises(NsrlError, match="written into other layers"):
        editor("nsrl", [1]).load(saved)
    other = editor("nsrl")
    other.preserve(TEXTS[20:25])
    with pytest.raises(NsrlError, match="made with other preserved texts"):
        other.load(saved)
    with pytest.raises(NsrlError, match="does not know what is to stay"):
        Editor(model(), tokenizer(), "nsrl", [1, 2], SEARCH).load(saved)
    begun = editor("nsrl")
    begun.load(saved)
    with pytest.raises(NsrlError, match="before others are applied"):
        begun.load(saved)
    with pytest.raises(NsrlError, match="there are no edits to be saved"):
        editor("nsrl").save(saved)


def test_a_refused_file_leaves_the_model_alone(saved, tmp_path) -> None:
    with safe_open(saved, "pt") as file:
        header, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}
    bad = copy.deepcopy(tensors)
    next(iter(bad.values())).view(-1)[0] += 1.0
    save_file(bad, tmp_path / "bent.safetensors", header)
    save_file(tensors, tmp_path / "newer.safetensors", {**header, "format": "9"})
    save_file(tensors, tmp_path / "other.safetensors", {})
    (tmp_path / "cut.safetensors").write_bytes(saved.read_bytes()[:100])
    made = editor("nsrl")
    for name, what in (
        ("bent", "checksum"),
        ("newer", "format 9"),
        ("other", "holds no edits"),
        ("cut", "holds no edits"),
        ("missing", "no such file"),
    ):
        with pytest.raises(NsrlError, match=what):
            made.load(tmp_path / f"{name}.safetensors")
    assert same(made.model, model()) and not made.edits
