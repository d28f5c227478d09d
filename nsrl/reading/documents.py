"""JSON and YAML, as plain values: text, numbers, truth values, lists and mappings with text as keys."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from nsrl.errors import NsrlError
from nsrl.reading.limits import DEPTH, DIGITS, ELEMENTS, JSON, NODES, YAML, Unreadable, read_bytes, read_text, shown

#: Tags of YAML that JSON has too; dates, sets, binary data and objects of programming languages are none.
KINDS = ("null", "bool", "int", "float", "str", "seq", "map")


class Results(dict[str, Any]):
    """A mapping in a file of results, which says which file it is that lacks what is asked for."""

    __slots__ = ("path",)
    path: Path

    @classmethod
    def of(cls, path: Path, values: dict[str, Any]) -> Results:
        """The values, and the file that they are from."""
        results = cls(values)
        results.path = path
        return results

    def __missing__(self, key: str) -> Any:
        raise NsrlError(f"{self.path} has no {key!r}: it is damaged or of another command; run it again")


def read_results(path: Path, missing: str = "") -> Results:
    """The content of a JSON file that a run or a study left.

    Args:
        path: the file.
        missing: what to say where it is missing.

    Raises:
        NsrlError: it is missing, no JSON object, or beyond the limits; reading a key that it does not have, too.
    """
    try:
        content = parse_json(read_bytes(path, JSON), partial(Results.of, path))
    except OSError as error:
        raise NsrlError(missing or f"cannot read {path}: {error.strerror or error}") from error
    except Unreadable as error:
        raise NsrlError(f"{path} is not JSON ({error}); run it again") from error
    if not isinstance(content, Results):
        raise NsrlError(f"{path} holds no results; run it again")
    return content


def parse_json(
    text: bytes | str, mapping: Callable[[dict[str, Any]], Any] | None = None, elements: int = ELEMENTS
) -> Any:
    """The value of a JSON text; NaN and infinity, which Python writes, are read.

    Args:
        text: UTF-8.
        mapping: what to make of each JSON object.
        elements: lists, mappings and their entries that it may have.

    Raises:
        Unreadable: it is not JSON, names a key twice, or asks for more than the limits.
    """
    if len(text) > JSON:
        raise Unreadable(f"its text has more than {JSON} characters")
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        # One sign beyond Latin-1 makes a Python string two or four times as large.
        if not text.isascii() and 4 * len(text) > JSON:
            raise Unreadable(f"its text has more than {JSON // 4} characters, not all of them ASCII")
        # Every list, mapping and entry costs one of these signs, in the text or inside strings.
        if sum(text.count(sign) for sign in "[{,") > elements:
            raise Unreadable(f"its text has more than {elements} entries")
        value = json.loads(text, parse_int=_whole, object_pairs_hook=lambda pairs: _mapping(pairs, mapping))
    except RecursionError as error:
        raise Unreadable(f"lists and mappings are nested deeper than {DEPTH}") from error
    except UnicodeDecodeError as error:
        raise Unreadable("it is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise Unreadable(str(error)) from error
    check_depth(value)
    return value


def _whole(text: str) -> int:
    if len(text) > DIGITS + 1:
        raise Unreadable(f"a whole number has {len(text)} digits, the limit is {DIGITS}")
    return int(text)


def _mapping(pairs: list[tuple[str, Any]], mapping: Callable[[dict[str, Any]], Any] | None) -> Any:
    values = dict(pairs)
    if len(values) < len(pairs):  # the standard leaves open which one counts, so two readers could differ
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Unreadable(f"the key {shown(twice)} is there twice")
    return values if mapping is None else mapping(values)


def check_depth(value: Any) -> None:
    """Raise Unreadable where lists and mappings are nested deeper than `DEPTH`; itself without recursion."""
    level: list[Any] = [value]
    for _ in range(DEPTH):
        level = [part for container in level if isinstance(container, list | dict) for part in _parts(container)]
        if not level:
            return
    raise Unreadable(f"lists and mappings are nested deeper than {DEPTH}")


def _parts(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The value in a YAML file, None for an empty one; numbers are as people write them.

    Raises:
        OSError: it is missing or may not be read.
        Unreadable: as `parse_yaml`, or it is no UTF-8 text.
    """
    try:
        return parse_yaml(read_text(path, YAML), exponents=True)
    except UnicodeDecodeError as error:
        raise Unreadable("it is not a text file") from error


def parse_yaml(text: str, *, exponents: bool = False) -> Any:
    """The value of a YAML text: what JSON can say too, with anchors, aliases and merge keys.

    Args:
        text: it.
        exponents: whether numbers are as people write them: 1e-3 is one, and what is one to YAML 1.1 only, as 190:20:30
            (in base 60), 1_ and 010 (in base 8), is text. Without, as YAML 1.1, which PyYAML writes.

    Raises:
        Unreadable: it is not YAML, names a key twice, has tags that JSON has no values for, or asks for more than the
            limits.
    """
    if len(text) > YAML:
        raise Unreadable(f"it has more than {YAML} characters")
    try:
        loader = _PeoplesLoader(text) if exponents else _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be read"
        raise Unreadable(f"it is not YAML{where}: {shown(problem, 200)}") from error
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        if isinstance(error, Unreadable):
            raise
        # PyYAML takes a tag such as !!int at its word, and whatever then fails fails.
        raise Unreadable("a tag (!!) does not fit its value") from error


def is_number_of_yaml_alone(text: str) -> bool:
    """Whether a text is a number to YAML 1.1 and not to people: 190:20:30, 1_, 010."""

    def numbers(loader: Any) -> bool:
        resolvers = loader.yaml_implicit_resolvers.get(text[:1], ())
        return any(tag.endswith((":int", ":float")) and pattern.match(text) for tag, pattern in resolvers)

    return numbers(yaml.SafeLoader) and not numbers(_PeoplesLoader)


class _Loader(yaml.SafeLoader):
    """What JSON has too; dates are text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        sign: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for sign, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {  # noqa: RUF012
        tag: function
        for tag, function in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in KINDS
    }

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = self._nodes = 0
        self._sizes: dict[str, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As inherited; counts levels, and nodes as often as aliases repeat them."""
        anchor = self.peek_event().anchor
        if self.check_event(yaml.AliasEvent):
            # The size of an anchor is known behind it: an alias inside it would contain itself.
            self._count(self._sizes.get(anchor, NODES + 1))
            return super().compose_node(parent, index)
        before = self._nodes
        self._count(1)
        self._depth += 1
        if self._depth > DEPTH:
            raise Unreadable(f"lists and mappings are nested deeper than {DEPTH}")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if anchor is not None:
            self._sizes[anchor] = self._nodes - before
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """As inherited; keys are plain, and none is there twice but by merging."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise Unreadable(f"a list or mapping is used as a key at line {key.start_mark.line + 1}")
            if key.value in seen and not key.tag.endswith(":merge"):
                raise Unreadable(f"the key {shown(key.value)} is there twice, again at line {key.start_mark.line + 1}")
            seen.add(key.value)
        return node

    def construct_whole_number(self, node: Any) -> int:
        """A whole number of 64 bits."""
        value = self.construct_yaml_int(node) if len(node.value) <= 80 else 2**64
        if not -(2**63) <= value < 2**64:
            raise Unreadable(f"the whole number {shown(node.value, 30)} has more than 64 bits")
        return value

    def _count(self, nodes: int) -> None:
        self._nodes += nodes
        if self._nodes > NODES:
            raise Unreadable(f"it has more than {NODES} entries, counted as often as aliases (*) repeat them")


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole_number)


#: Digits, in groups that stand apart; `1_` and `_1` are none.
GROUPS = "[0-9]+(?:_[0-9]+)*"


class _PeoplesLoader(_Loader):
    """As above, with the numbers that people write: 190:20:30 is no number, nor are 1_ and 010, which are text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        sign: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":int"))]
        for sign, resolvers in _Loader.yaml_implicit_resolvers.items()
    }


_PeoplesLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile("^[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*|0x[0-9a-fA-F]+|0b[01]+)$"),
    list("-+0123456789"),
)
_PeoplesLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        rf"""^(?:[-+]?{GROUPS}\.(?:{GROUPS})?(?:[eE][-+]?[0-9]+)?|[-+]?{GROUPS}[eE][-+]?[0-9]+
                |[-+]?\.{GROUPS}(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)
