"""From YAML files and command lines to the frozen dataclasses of `nsrl.runs.config`, and back to YAML."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from nsrl.errors import NsrlError, nearest
from nsrl.files import given_path
from nsrl.reading import documents
from nsrl.reading.limits import Unreadable, about, shown
from nsrl.runs.packaged import find_config

Config = TypeVar("Config")
#: Fields of shared dataclasses that a run sets itself: the buffer's draws follow the run's own seed.
OWNED = frozenset({"retention.seed", "finetuning.retention.seed"})
#: Keys that take the word "off", which YAML reads as false.
SWITCHES = frozenset({"opening"})
#: The key of jsonargparse for classes, and the name under which it knows `load_value`.
CLASS, MODE = "class_path", "bounded yaml"
#: A whole number, and how many digits of it are read.
DIGITS = re.compile(r"\s*[-+]?[0-9][0-9_]*\s*")
LONGEST = 40
NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    Any: "anything",
}


def key_types(config: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a configuration with its type, nested ones dotted; a group comes before its keys."""
    hints = get_type_hints(config)
    for item in fields(config):
        key, kind = f"{prefix}{item.name}", hints[item.name]
        if key in OWNED:
            continue
        yield key, kind
        if is_dataclass(kind):
            yield from key_types(kind, f"{key}.")  # type: ignore[arg-type]


def suggest(key: str, known: Sequence[str], dashes: str = "") -> str:
    """Half a sentence that names the nearest known key, by its whole name or by its last part."""
    last = key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == last]
    near = same[0] if same else nearest(key, known)
    if near is None:
        by_last = {name.rpartition(".")[2]: name for name in reversed(known)}
        near = by_last.get(nearest(last, by_last) or "")
    return f"; did you mean {dashes}{near}?" if near else "; see --help for the keys"


def check_keys(values: Any, config: type, source: str) -> None:
    """Raise NsrlError unless every key of a YAML mapping is a key of `config`.

    Args:
        values: what the file holds.
        config: the dataclass.
        source: the file, for the sentence.
    """
    types = dict(key_types(config))

    def check(mapping: Any, prefix: str) -> None:
        if not isinstance(mapping, Mapping):
            where = f"{prefix[:-1]} in {source}" if prefix else source
            raise NsrlError(f"{where} must hold keys and values (as in `seed: 0`), not {shown(mapping, 40)}")
        for name, value in mapping.items():
            key = f"{prefix}{name}"
            if key not in types:
                raise NsrlError(f"unknown key {shown(key, 100)} in {source}{suggest(key[:100], list(types))}")
            if is_dataclass(types[key]):
                check(value, f"{key}.")
            elif names_class(value):
                raise NsrlError(f"{key} in {source} has the key {CLASS!r}, which would import code; leave it out")
            else:
                check_numbers(key, value, types[key])
            entry = entry_type(types[key])
            if entry is not None and isinstance(value, list):
                for number, part in enumerate(value, start=1):
                    check_keys(part, entry, f"entry {number} of {key} in {source}")

    check(values, "")


def check_numbers(key: str, value: Any, kind: Any) -> None:
    """Raise NsrlError where a number is asked for and a text is one that jsonargparse alone would read as such.

    Raises:
        NsrlError: it is a number to YAML 1.1 only, or has very many digits.
    """
    if isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            check_numbers(key, part, kind)
    elif isinstance(value, str) and re.search(r"\b(int|float)\b", str(kind)):
        whole = "whole number" if re.search(r"\bint\b", str(kind)) else "number"
        if documents.is_number_of_yaml_alone(value):
            raise NsrlError(f"{key} must be a {whole} in decimal digits, not {shown(value, 40)!r}")
        if len(value) > LONGEST and DIGITS.fullmatch(value):
            raise NsrlError(f"{key} must be a {whole} of at most {LONGEST} digits, not {shown(value, 40)!r}")


def names_class(value: Any) -> bool:
    """Whether a value has, at any depth, a key at which jsonargparse imports whatever module the value names."""
    if isinstance(value, Mapping):
        return CLASS in value or any(map(names_class, value.values()))
    return isinstance(value, list) and any(map(names_class, value))


def load_value(text: str) -> Any:
    """What jsonargparse reads of a file, of a word of the command line, or of a text inside either.

    Raises:
        Unreadable: it is not YAML, or goes beyond the limits of `nsrl.reading`.
    """
    value = switched(documents.parse_yaml(text, exponents=True))
    if names_class(value):
        raise Unreadable(f"it has the key {CLASS!r}, which would import code")
    # As jsonargparse's own: "a:" and "{a,b}" are text, not mappings of nothing.
    if isinstance(value, dict) and value and not any(part is not None for part in value.values()):
        words = text.strip(" {}").replace(" ", "").split(",")
        if text.strip() == f"{next(iter(value))}:" or set(words) == set(value):
            return text
    return value


def switched(value: Any) -> Any:
    """A value in which `off` is a word again wherever it is one of `SWITCHES` that YAML has read as false."""
    if isinstance(value, list):
        return [switched(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {key: "off" if part is False and key in SWITCHES else switched(part) for key, part in value.items()}


def entry_type(kind: Any) -> type | None:
    """The dataclass that the entries of a list hold; None for lists of anything else, and for what is no list."""
    entry = get_args(kind)[0] if get_origin(kind) is list else None
    return entry if is_dataclass(entry) else None  # type: ignore[return-value]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping, and what is none is left to `check_keys`.

    Raises:
        NsrlError: missing, unreadable, not YAML, or beyond the limits of `nsrl.reading`.
    """
    try:
        values = switched(documents.read_yaml(given_path(path)))
    except Unreadable as error:
        raise NsrlError(f"{about(path, error)}; mend it or give another configuration") from error
    except OSError as error:
        raise NsrlError(f"cannot read the configuration {path}: {error.strerror or error}") from error
    return {} if values is None else values


def load(config: type[Config], path: str | Path) -> Config:
    """A configuration from a YAML file alone.

    Raises:
        NsrlError: unknown key, wrong type or value out of range; the sentence names file and key.
    """
    from jsonargparse import ArgumentError

    values = read_yaml(path)
    check_keys(values, config, str(path))
    try:
        return build(config, build_parser(config).parse_object(values).as_dict())
    except (ArgumentError, TypeError) as error:
        raise NsrlError(f"{path}: {explain(str(error), config)}") from error


def parse(
    config: type[Config], arguments: Sequence[str], parser: Any, extra: Sequence[str] = (), kind: str = ""
) -> tuple[Config, dict[str, Any]]:
    """A configuration from a command line: --config FILE or NAME and overrides, the later one winning.

    Args:
        config: the dataclass to fill.
        arguments: the words after the command.
        parser: what `build_parser` made, perhaps with options added.
        extra: names of the added options.
        kind: of the packaged configurations that --config may name, as for `packaged_names`.

    Returns:
        The configuration, and the values of the extra options.

    Raises:
        NsrlError: unknown key (the nearest is suggested), wrong type or value out of range.
    """
    from jsonargparse import ArgumentError

    options = {"config", "help", "print_config", *extra}
    known = [key for key, _ in key_types(config)]
    groups: dict[str, Any] = {key: kind for key, kind in key_types(config) if is_dataclass(kind)}
    words = list(arguments)
    for position, word in enumerate(words):
        if not word.startswith("--"):
            continue
        name, equals, value = word[2:].partition("=")
        if name not in options and name not in known and not is_flag(name, options):
            raise NsrlError(f"unknown option --{name}{suggest(name, [*known, *sorted(options)], '--')}")
        path = value if equals else next(iter(words[position + 1 :]), "")
        if name in known and name not in groups:
            check_numbers(name, path, dict(key_types(config))[name])
        if name == "config":
            path = str(find_config(path, kind))
            check_keys(read_yaml(path), config, path)
            words[position if equals else position + 1] = f"--config={path}" if equals else path
        elif name in groups and os.path.exists(path):
            check_keys(read_yaml(path), groups[name], path)
    try:
        values = parser.parse_args(words).as_dict()
    except NsrlError:
        raise
    except (ArgumentError, ValueError, OverflowError) as error:  # the latter from inside jsonargparse
        raise NsrlError(explain(str(error), config)) from error
    if values.get("trust") and not any(word.partition("=")[0] == "--trust" for word in words):
        raise NsrlError(
            "the configuration sets trust, which lets the agent's files run any code; if you trust whoever made them, "
            "say so on the command line: --trust true"
        )
    return build(config, values), {name: values.get(name) for name in extra}


def is_flag(name: str, options: set[str]) -> bool:
    """Whether a word like --no_progress switches off an option."""
    return name.startswith("no_") and name[3:] in options


def build_parser(config: type, **texts: Any) -> Any:
    """A jsonargparse parser for a configuration; `texts` are argparse's (prog, usage, description, epilog)."""
    from argparse import SUPPRESS, RawDescriptionHelpFormatter

    from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, set_loader

    class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Keeps the line breaks of description and examples."""

    set_loader(MODE, load_value, (Unreadable,))
    parser = ArgumentParser(exit_on_error=False, formatter_class=Formatter, parser_mode=MODE, **texts)
    parser.add_argument(
        "--config",
        action=ActionConfigFile,
        help="YAML file with any of the keys below, or the name of one that comes with nsrl",
    )
    parser.add_class_arguments(config, as_group=True)
    # A group's own option only takes another file; owned fields are no settings of a run.
    hidden = OWNED | {key for key, kind in key_types(config) if is_dataclass(kind)}
    for action in parser._actions:
        if action.dest in hidden:
            action.help = SUPPRESS
    return parser


def build(config: type[Config], values: Mapping[str, Any], prefix: str = "") -> Config:
    """A configuration from nested plain values of the right types; missing keys keep their defaults.

    Raises:
        NsrlError: a value out of range, or null where there has to be one (which jsonargparse lets pass).
    """
    hints = get_type_hints(config)
    arguments = {}
    for item in fields(config):  # type: ignore[arg-type]
        if item.name in values:
            key, kind, value = f"{prefix}{item.name}", hints[item.name], values[item.name]
            if value is None and kind is not Any and type(None) not in get_args(kind):
                raise NsrlError(f"{key} must be {describe_type(kind)}, not null")
            arguments[item.name] = _built(kind, value, f"{key}.")
    return config(**arguments)


def _built(kind: Any, value: Any, prefix: str) -> Any:
    entry = entry_type(kind)
    if entry is not None:
        return [build(entry, part, prefix) for part in value]
    return build(kind, value, prefix) if is_dataclass(kind) else value  # type: ignore[arg-type]


def to_yaml(config: Any) -> str:
    """The fully resolved configuration, every key spelt out, in the order of the dataclass."""
    return yaml.safe_dump(plain(config), sort_keys=False)


def plain(config: Any, prefix: str = "") -> dict[str, Any]:
    """A configuration as nested plain values, without the fields that a run sets itself."""
    values: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if f"{prefix}{item.name}" not in OWNED:
            values[item.name] = _plain(value, f"{prefix}{item.name}.")
    return values


def _plain(value: Any, prefix: str) -> Any:
    if isinstance(value, list):
        return [_plain(part, prefix) for part in value]
    return plain(value, prefix) if is_dataclass(value) and not isinstance(value, type) else value


def flat(config: Any) -> dict[str, Any]:
    """A configuration as plain values under dotted keys."""
    return {
        key: reduce(getattr, key.split("."), config) for key, kind in key_types(type(config)) if not is_dataclass(kind)
    }


def explain(message: str, config: type) -> str:
    """One sentence for what jsonargparse says over several lines."""
    types = dict(key_types(config))
    found = re.search(r'[Pp]arser key "([^"]+)"', message)
    value = re.search(r"(?:Got value|Given value): *(.*)", message)
    if found and found[1] in types and not is_dataclass(types[found[1]]):
        given = f", not {shown(value[1].strip(), 200)}" if value else ""
        return f"{found[1]} must be {describe_type(types[found[1]])}{given}"
    return shown(" ".join(message.split()), 400)


def describe_type(kind: Any) -> str:
    """What a key takes, in words."""
    if kind in NAMES:
        return NAMES[kind]
    if is_dataclass(kind):
        return f"keys and values ({', '.join(item.name for item in fields(kind))})"
    if get_origin(kind) is list:
        return f"a list, each entry {describe_type(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return f"keys and values, each value {describe_type(get_args(kind)[1])}"
    parts = [
        describe_type(part) if isinstance(part, type) or get_origin(part) else repr(part) for part in get_args(kind)
    ]
    return f"one of {', '.join(parts)}" if len(parts) > 2 else " or ".join(parts)
