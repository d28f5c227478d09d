"""The text that Stable-Baselines3 stores beside pickled values, turned back into values without unpickling.

`data_to_json` in SB3's `common/save_util.py` writes every value that JSON cannot hold twice: as a pickle
under ":serialized:" and, for people to read, as the `str` of its attributes. Only the second is looked at
here and in `nsrl.rl.agents.described_spaces`. Where the text does not say enough the answer is None, or lists what
is missing; the caller knows the file and words the error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

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
            nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU,
            nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softsign,
            nn.Tanh,
        ),
        "features_extractor_class": (FlattenExtractor, NatureCNN, CombinedExtractor),
        "optimizer_class": (optim.Adam, optim.AdamW, optim.RMSprop, optim.SGD, RMSpropTFLike),
    }.items()
}  # fmt: skip
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
