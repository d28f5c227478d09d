"""Gymnasium spaces from the text that SB3 stores beside the pickled ones; see `nsrl.rl.agents.descriptions`."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

# OpenAI Gym's spaces, from which agents of SB3 before 2.0 were saved, describe themselves as gymnasium's do.
SPACE_TYPE = re.compile(r"<class '(?:gym|gymnasium)\.spaces\.\w+\.(\w+)'>")
# A key without bound would be looked for to the end of the text from each of its quotes.
DICT_ENTRY = re.compile(
    r"""(?P<key>'(?:[^'\\]|\\.){0,100}'|"(?:[^"\\]|\\.){0,100}")\s*[:,]\s*(?P<space>\w+\((?:[^()]|\([^()]*\))*\))""",
    re.DOTALL,
)
BOX = re.compile(r"Box\((?P<low>[^,]+), (?P<high>[^,]+), \((?P<shape>[\d, ]*)\), (?P<dtype>\w+)\)", re.DOTALL)
COUNTED = re.compile(
    r"(?P<kind>Discrete|MultiDiscrete|MultiBinary)\((?P<count>[^a-z]*?)(?:, start=(?P<start>[^a-z]+?))?"
    r"(?:, dtype=(?P<dtype>\w+))?\)",
    re.DOTALL,
)
DTYPES = {str(np.dtype(code)): np.dtype(code) for code in "bBhHiIlLefd?"}
#: Entries of a space, characters of its text, spaces of a Dict: a damaged or hostile file must not be able to ask for
#: all memory. numpy prints at most 1000 entries.
LARGEST = 7 * 10**6
LONGEST = 5 * 10**5
MOST_SPACES = 1000


def described_space(item: Any, env_space: spaces.Space | None = None) -> spaces.Space | None:
    """Rebuild an observation or action space from its description in `data`.

    numpy prints eight digits, and elides the middle of arrays of more than 1000 entries. Bounds are therefore
    those of `env_space` where it prints the same; failing that, as printed, and one number for all entries
    where all that are shown are equal.

    Args:
        item: the JSON value under "observation_space" or "action_space".
        env_space: the space of the environment at hand.
    """
    match = SPACE_TYPE.fullmatch(str(item.get(":type:"))) if isinstance(item, Mapping) else None
    if match is None:
        return None
    try:
        if match[1] == "Dict":
            return _dict(str(item["spaces"]), env_space)
        if match[1] == "Box":
            low, high = (str(item.get(f"{side}_repr") or item[side]) for side in ("low", "high"))
            return _box(low, high, _shape(item), str(item["dtype"]), env_space)
        if match[1] == "MultiBinary":
            return _binary(str(item["n"]))
        count = str(item["n" if match[1] == "Discrete" else "nvec"])
        return _counted(match[1], count, item.get("start"), item.get("dtype"), _shape(item))
    except (KeyError, TypeError, ValueError, AssertionError, OverflowError, MemoryError, SyntaxError):
        return None


def _dict(text: str, env_space: spaces.Space | None) -> spaces.Dict | None:
    if len(text) > LONGEST:
        return None
    # Old versions print OrderedDict([('key', Space), ...]), new ones {'key': Space, ...}.
    matches = list(DICT_ENTRY.finditer(text))
    ends = [0, *(match.end() for match in matches)]
    between = "".join(text[end:start] for end, start in zip(ends, [*(m.start() for m in matches), None], strict=True))
    if len(matches) > MOST_SPACES or re.search(r"\w", re.sub("OrderedDict|Dict", "", between)):
        return None
    known = env_space.spaces if isinstance(env_space, spaces.Dict) else {}
    entries = []
    for match in matches:
        key = ast.literal_eval(match["key"])
        space = _printed_space(match["space"], known.get(key))
        if space is None:
            return None
        entries.append((key, space))
    # A list of pairs keeps the order; it decides how CombinedExtractor concatenates the features.
    return spaces.Dict(entries)


def _printed_space(text: str, env_space: spaces.Space | None) -> spaces.Space | None:
    if match := BOX.fullmatch(text):
        shape = tuple(int(size[:20]) for size in re.findall(r"\d+", match["shape"]))
        if not _reasonable(shape):
            return None
        return _box(match["low"], match["high"], shape, match["dtype"], env_space)
    if match := COUNTED.fullmatch(text):
        if match["kind"] == "MultiBinary":
            return _binary(match["count"])
        return _counted(match["kind"], match["count"], match["start"], match["dtype"])
    return None


def _binary(count: str) -> spaces.MultiBinary | None:
    sizes = [int(entry) for entry in _entries(count)]
    if not _reasonable(sizes):
        return None
    return spaces.MultiBinary(sizes if re.search(r"[\[(]", count) else sizes[0])


def _counted(
    kind: str, count: str, start: Any, dtype: Any, shape: tuple[int, ...] | None = None
) -> spaces.Space | None:
    whole = DTYPES[str(dtype or "int64")]
    if kind == "Discrete":
        # gymnasium before 1.2 knows no other dtype.
        other: dict[str, Any] = {} if whole == np.int64 else {"dtype": whole.type}
        return spaces.Discrete(int(count), start=int(start or 0), **other)
    if kind != "MultiDiscrete" or "..." in count:
        return None
    if shape is None:
        # Only rows without inner brackets say their own shape.
        if count.count("[") != 1:
            return None
        shape = (len(_entries(count)),)
    nvec, starts = _array(count, shape, whole), _array(str(start or 0), shape, whole)
    if nvec is None or starts is None:
        return None
    return spaces.MultiDiscrete(nvec, dtype=whole.type, start=starts)


def _box(low: str, high: str, shape: tuple[int, ...], dtype: str, env_space: spaces.Space | None) -> spaces.Box | None:
    number = DTYPES[dtype]
    if isinstance(env_space, spaces.Box) and env_space.shape == shape and env_space.dtype == number:
        if _shows(env_space.low, low) and _shows(env_space.high, high):
            return env_space
    lows, highs = _array(low, shape, number), _array(high, shape, number)
    if lows is None or highs is None:
        return None
    return spaces.Box(lows, highs, shape=shape, dtype=number.type)


def _shape(item: Mapping[str, Any]) -> tuple[int, ...]:
    sizes = item.get("_shape", item.get("shape")) or ()
    if not isinstance(sizes, list | tuple) or not _reasonable(sizes):
        raise ValueError("no shape")
    return tuple(int(size) for size in sizes)


def _reasonable(sizes: Sequence[Any]) -> bool:
    # The number of dimensions first: the product of many large numbers takes long.
    return len(sizes) <= 32 and min(map(int, sizes), default=0) >= 0 and math.prod(map(int, sizes)) <= LARGEST


def _entries(text: str) -> list[str]:
    if len(text) > LONGEST:
        raise ValueError("too long")
    return re.findall(r"[^\s\[\],()]+", text)


def _array(text: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | None:
    """Array from its printed form; None where it leaves out entries that may differ from those shown."""
    if not _reasonable(shape):
        return None
    entries = _entries(text)
    shown = [entry for entry in entries if entry != "..."]
    values = [_number(entry, dtype.kind) for entry in shown]
    if len(values) == math.prod(shape) and len(shown) == len(entries):
        return np.array(values, dtype=dtype).reshape(shape)
    if len(set(values)) == 1 and (len(values) == 1 or len(shown) < len(entries)):
        return np.full(shape, values[0], dtype=dtype)
    return None


def _number(entry: str, kind: str) -> float | int | bool:
    if kind == "b":
        return {"True": True, "False": False, "1": True, "0": False}[entry]
    return float(entry) if kind == "f" else int(entry)


def _shows(values: np.ndarray, text: str) -> bool:
    entries = _entries(text)
    if len(entries) == 1:
        return bool(np.all(values == float(entries[0])))
    with np.printoptions(threshold=1000, edgeitems=3, precision=8, suppress=False):
        return _entries(str(values)) == entries
