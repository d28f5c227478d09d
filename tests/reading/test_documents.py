"""JSON and YAML against the standard readers, at the limits, and what is shown of a file."""

import json
import os

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nsrl.errors import NsrlError
from nsrl.reading.documents import parse_json, parse_yaml, read_results
from nsrl.reading.limits import DEPTH, DIGITS, MIB, NODES, Unreadable, about, opened, read_bytes, shown

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(max_examples=200)
@given(VALUES)
def test_json_is_read_as_the_standard_library_reads_it(value):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        assert parse_json(text) == json.loads(text) == value


@settings(max_examples=200)
@given(VALUES)
def test_yaml_is_read_as_pyyaml_reads_it(value):
    text = yaml.safe_dump(value)
    assert parse_yaml(text) == yaml.safe_load(text)


def test_anchors_and_merge_keys_are_read_as_pyyaml_reads_them():
    text = "base: &b {x: 1, y: [1, 2]}\nother: {<<: *b, x: 3}\nlist: [*b, *b]\nboth: {<<: [*b, {z: 4}]}\n"
    assert parse_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("-2E5", -2e5),
        (".5", 0.5),
        ("1_000.5", 1000.5),
        ("1.", 1.0),
        (".inf", float("inf")),
        ("2020-01-01", "2020-01-01"),
        ("0x10", 16),
        ("1_000", 1000),
        ("yes", True),
        ("~", None),
        ("", None),
        ("e3", "e3"),
        ("1e", "1e"),
        ("._", "._"),
        ("'1'", "1"),
        ("190:20:30", "190:20:30"),
        ("-1:30", "-1:30"),
        ("1:30.5", "1:30.5"),
        ("1_", "1_"),
        ("_1", "_1"),
        ("1__0", "1__0"),
        ("010", "010"),
        ("-07", "-07"),
        ("0", 0),
        ("-0", 0),
        ("1_.5", "1_.5"),
        ("1_0e2", 1000.0),
        ("0x", "0x"),
        ("0x1_0", "0x1_0"),
        ("0b11", 3),
        ("+3", 3),
        ("-.5", -0.5),
        ("1.5_", "1.5_"),
    ],
)
def test_numbers_as_people_write_them(text, value):
    assert parse_yaml(text, exponents=True) == value


def test_exponents_without_a_point_are_text_to_yaml_itself():
    assert parse_yaml("a: 1e3") == yaml.safe_load("a: 1e3") == {"a": "1e3"}


def nested(depth, opening="[", closing="]"):
    return opening * depth + closing * depth


def test_limits_are_met_exactly():
    for parse in (parse_json, parse_yaml):
        parse(nested(DEPTH - 1))
        with pytest.raises(Unreadable, match="nested deeper"):
            parse(nested(DEPTH + 1))
    assert parse_json("9" * DIGITS) == 10**DIGITS - 1
    with pytest.raises(Unreadable, match="digits"):
        parse_json("9" * (DIGITS + 2))
    assert len(parse_yaml("[" + "1," * (NODES - 2) + "1]")) == NODES - 1
    with pytest.raises(Unreadable, match="entries"):
        parse_yaml("[" + "1," * (NODES - 1) + "1]")
    anchored = "- &a [" + "1," * 99 + "1]\n"
    assert len(parse_yaml(anchored + "- *a\n" * (NODES // 101 - 2))) == NODES // 101 - 1
    with pytest.raises(Unreadable, match="aliases"):
        parse_yaml(anchored + "- *a\n" * (NODES // 101 + 1))


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '{"x": {"a": 1, "b": 2, "a": 3}}'])
def test_a_key_that_is_there_twice_is_named(text):
    with pytest.raises(Unreadable, match="the key a is there twice"):
        parse_json(text)
    with pytest.raises(Unreadable, match="the key a is there twice"):
        parse_yaml(text)


def test_results_name_the_file_that_lacks_a_key(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"before": {"kl": 1}, "rows": [{"a": 2}]}')
    results = read_results(path)
    assert results == {"before": {"kl": 1}, "rows": [{"a": 2}]} and results.get("no") is None
    for ask in (lambda: results["after"], lambda: results["before"]["x"], lambda: results["rows"][0]["b"]):
        with pytest.raises(NsrlError, match=r"metrics\.json has no"):
            ask()
    with pytest.raises(NsrlError, match=r"cannot read .*missing\.json"):
        read_results(tmp_path / "missing.json")


def test_what_is_shown_is_short_and_obeys_no_terminal():
    assert shown("a\x1b[2J\nb\u202e") == "a?[2J?b?"
    for value in ("x" * 10**6, ["x" * 10**6] * 10**5, {n: n for n in range(10**5)}, 10**5000, b"x" * 10**6, object()):
        assert len(shown(value)) <= 60 and shown(value).isprintable()
    assert shown(3.5) == "3.5" and shown([1, None]) == "[1, None]" and shown(None) == "None"
    assert about("f", Unreadable("it is large")) == "f is large" and about("f", Unreadable("no")) == "f: no"


def test_only_ordinary_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "holes").open("wb") as file:
        file.write(b"x")
        file.truncate(100 * MIB)
    for name, reason in (("pipe", "ordinary"), (".", "ordinary"), ("holes", "holes")):
        with pytest.raises(Unreadable, match=reason), opened(tmp_path / name):
            pass
    (tmp_path / "file").write_bytes(b"abc")
    assert read_bytes(tmp_path / "file", 3) == b"abc"
    with pytest.raises(Unreadable, match="more than 2 bytes"):
        read_bytes(tmp_path / "file", 2)
