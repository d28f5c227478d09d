"""The text that Stable-Baselines3 stores beside pickled values, turned back into values without unpickling.

`data_to_json` in SB3's `common/save_util.py` writes every value that JSON cannot hold twice: as a pickle
under ":serialized:" and, for people to read, as the `str` of its attributes. Only the second is looked at
here and in `nsrl.rl.agents.descriptions`. Where the text does not say enough the answer is None, or lists what
is missing; the caller knows the file and words the error.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.utils import LinearSchedule
from torch import nn, optim

NUMBER = r"[-+0-9.eE]+"

CONSTANT_SCHEDULE = re.compile(rf"ConstantSchedule\(val=({NUMBER})\)")

#: Characters of a schedule's text; each layer around it is taken off by a copy.
LONGEST = 1000

LINEAR_SCHEDULE = re.compile(rf"LinearSchedule\(start=({NUMBER}), end=({NUMBER}), end_fraction=({NUMBER})\)")

# The classes that a policy argument may name, by their text.
NAMED_CLASSES: dict[str, dict[str, type]] = {
    argument: {str(cls): cls for cls in classes}
    for argument, classes in {
        "activation_fn": (
            nn.CELU,
            nn.ELU,
            nn.GELU,
            nn.Hardsigmoid,
            nn.Hardswish,
            nn.Hardtanh,
            nn.Identity,
            nn.LeakyReLU,
            nn.LogSigmoid,
            nn.Mish,
            nn.ReLU,
            nn.ReLU6,
            nn.SELU,
            nn.SiLU,
            nn.Sigmoid,
            nn.Softplus,
            nn.Softsign,
            nn.Tanh,
        ),
        "features_extractor_class": (FlattenExtractor, NatureCNN, CombinedExtractor),
        "optimizer_class": (optim.Adam, optim.AdamW, optim.RMSprop, optim.SGD, RMSpropTFLike),
    }.items()
}

# The policy arguments that are plain JSON, and the types they may have.
PLAIN_ARGUMENTS: dict[str, tuple[type, ...]] = {
    "net_arch": (list, dict, type(None)),
    "log_std_init": (int, float),
    "features_extractor_kwargs": (dict, type(None)),
    "optimizer_kwargs": (dict, type(None)),
    **dict.fromkeys(("ortho_init", "share_features_extractor", "normalize_images"), (bool,)),
    **dict.fromkeys(("use_sde", "full_std", "use_expln", "squash_output"), (bool,)),
}


def described_policy_kwargs(item: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the policy class, and apart those that are neither plain data nor an allowed class.

    A `net_arch` that cannot be read is left out of both: the weights' shapes tell it.
    """
    known: dict[str, Any] = {}
    odd: dict[str, Any] = {}
    for key, value in item.items() if isinstance(item, Mapping) else ():
        # The device is the reader's choice; the others are SB3's envelope.
        if key in (":type:", ":serialized:", "device"):
            continue
        if key in NAMED_CLASSES and isinstance(value, str) and value in NAMED_CLASSES[key]:
            known[key] = NAMED_CLASSES[key][value]
        elif key in PLAIN_ARGUMENTS and isinstance(value, PLAIN_ARGUMENTS[key]):
            known[key] = value
        elif key != "net_arch":
            odd[key] = value
    return known, odd


def described_schedule(item: Any) -> float | LinearSchedule | None:
    """Value of a learning rate or clip range: a number, a constant schedule or a linear one.

    A user's own function has no text, and SB3 before 2.6 wrapped even constants in a lambda: None.
    """
    if isinstance(item, int | float) and not isinstance(item, bool):
        return float(item)
    if not isinstance(item, Mapping):
        return None
    kind = str(item.get(":type:"))
    text = str(item.get("value_schedule", ""))
    if kind.endswith(".ConstantSchedule'>"):
        text = f"ConstantSchedule(val={item.get('val')})"
    elif kind.endswith(".LinearSchedule'>"):
        ends = f"start={item.get('start')}, end={item.get('end')}"
        text = f"LinearSchedule({ends}, end_fraction={item.get('end_fraction')})"
    if len(text) > LONGEST:
        return None
    # Wrapping a FloatSchedule in another changes nothing.
    while text.startswith("FloatSchedule(") and text.endswith(")"):
        text = text.removeprefix("FloatSchedule(")[:-1]
    try:
        if match := CONSTANT_SCHEDULE.fullmatch(text) or LINEAR_SCHEDULE.fullmatch(text):
            numbers = [float(number) for number in match.groups()]
            if not all(map(math.isfinite, numbers)):
                return None
            return numbers[0] if len(numbers) == 1 else LinearSchedule(*numbers)
    except ValueError:
        pass
    return None


def described_policy_class(item: Any) -> tuple[str, str]:
    """Module and name of a policy class, as in ("stable_baselines3.common.policies", "ActorCriticPolicy").

    The name is read off the method `__init__`, because SB3 stores a class's attributes but not its name.
    """
    if not isinstance(item, Mapping):
        return "", str(item)
    match = re.match(r"<function (\w+)\.__init__ at", str(item.get("__init__")))
    return str(item.get("__module__")), match[1] if match else "(unnamed)"


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

LONGEST_SPACE = 5 * 10**5

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
    if len(text) > LONGEST_SPACE:
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
    if len(text) > LONGEST_SPACE:
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
