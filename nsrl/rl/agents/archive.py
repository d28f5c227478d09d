"""A Stable-Baselines3 zip, read without unpickling: JSON metadata, the text beside pickles, and tensors."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import NatureCNN
from torch import Tensor

from nsrl.errors import NsrlError, check_path
from nsrl.reading.documents import parse_json
from nsrl.reading.limits import JSON, OF_WEIGHTS, Unreadable, opened, shown
from nsrl.reading.pickles import ForeignName
from nsrl.reading.tensors import read_tensors
from nsrl.reading.zips import opened_zip
from nsrl.rl.agents.descriptions import (
    described_policy_class,
    described_policy_kwargs,
    described_schedule,
    described_space,
)
from nsrl.rl.agents.spaces import policy_spaces

TRUST = "trust=True (--trust) would unpickle it, which can run any code in the file"

OF_A_POLICY = (
    "holds a policy or a state alone, as policy.save and torch.save write them; save the whole model, model.save(path)"
)

VERSION = "_stable_baselines3_version"

#: Tensors of a policy; a stock one has some twenty, and each becomes a module.
MOST_TENSORS = 1000

#: What the numbers of an algorithm may come to: beyond, a run would never end or not fit into any memory.
LARGEST = {
    "n_steps": 10**6,
    "batch_size": 10**8,
    "n_epochs": 10**5,
    "n_critic_updates": 10**5,
    "cg_max_steps": 10**5,
    "line_search_max_iter": 10**5,
    "sub_sampling_factor": 10**7,
}

FRACTIONS = (
    "learning_rate",
    "gamma",
    "gae_lambda",
    "clip_range",
    "clip_range_vf",
    "ent_coef",
    "vf_coef",
    "max_grad_norm",
    "target_kl",
    "cg_damping",
    "line_search_shrinking_factor",
)

SCHEDULES = ("learning_rate", "clip_range", "clip_range_vf")

#: Where the rollout buffers are that the algorithms choose by themselves.
STOCK_BUFFERS = ("stable_baselines3.common.buffers", "sb3_contrib.common.maskable.buffers")

SB3_POLICIES = "stable_baselines3.common.policies"

POLICY_CLASSES = {
    (SB3_POLICIES, "ActorCriticPolicy"),
    (SB3_POLICIES, "ActorCriticCnnPolicy"),
    (SB3_POLICIES, "MultiInputActorCriticPolicy"),
    ("sb3_contrib.common.maskable.policies", "MaskableActorCriticPolicy"),
    ("sb3_contrib.common.maskable.policies", "MaskableActorCriticCnnPolicy"),
    ("sb3_contrib.common.maskable.policies", "MaskableMultiInputActorCriticPolicy"),
    ("sb3_contrib.common.recurrent.policies", "RecurrentActorCriticPolicy"),
    ("sb3_contrib.common.recurrent.policies", "RecurrentActorCriticCnnPolicy"),
    ("sb3_contrib.common.recurrent.policies", "RecurrentMultiInputActorCriticPolicy"),
}


@dataclass(frozen=True)
class Archive:
    """Everything in an agent's zip that can be had without running code from it."""

    path: Path
    algorithm: str
    """"PPO", "A2C", "TRPO", "MaskablePPO" or "RecurrentPPO", told by which hyper-parameters are stored."""
    policy_class: str
    """Name of the stock policy class, as in "ActorCriticPolicy"."""
    observation_space: spaces.Space
    action_space: spaces.Space
    policy_kwargs: dict[str, Any]
    """Keyword arguments of the policy class; `net_arch` is the one that the weights have."""
    hyperparameters: dict[str, Any]
    """All plain values under their SB3 names, and the schedules that their text describes."""
    state_dict: dict[str, Tensor]
    sb3_version: str | None
    vec_normalized: bool
    """Whether the agent was last trained inside a VecNormalize, whose statistics are not in the zip."""
    untrusted: tuple[str, ...]
    """Keys whose values exist only pickled and were left at their defaults."""


def read_archive(path: str | Path, env: Any = None) -> Archive:
    """Read an on-policy agent's zip as data.

    Args:
        path: the zip.
        env: an environment whose spaces supply the bounds that the stored text rounds or elides.

    Raises:
        NsrlError: no readable SB3 agent there; an off-policy agent; or a policy that only unpickling
            could rebuild.
    """
    path = Path(path)
    data, weights, version = read_members(path)
    state_dict = read_weights(path, weights)
    algorithm = stored_algorithm(path, data)
    module, policy_class = described_policy_class(data.get("policy_class"))
    if (module, policy_class) not in POLICY_CLASSES:
        raise NsrlError(f"{path} uses the custom policy class {shown(f'{module}.{policy_class}', 120)}; {TRUST}")
    env_spaces = policy_spaces(env) if env is not None else (None, None)
    rebuilt: dict[str, Any] = {}
    for key, env_space in zip(("observation_space", "action_space"), env_spaces, strict=True):
        rebuilt[key] = described_space(data.get(key), env_space)
        if rebuilt[key] is None:
            raise NsrlError(
                f"the {key} of {path} cannot be read from its text; give an env with that space, or {TRUST}"
            )
    policy_kwargs, odd = described_policy_kwargs(data.get("policy_kwargs"))
    if odd:
        key, value = next(iter(odd.items()))
        raise NsrlError(
            f"policy_kwargs[{shown(key)!r}] of {path} is {shown(value)!r}, which is not plain data; {TRUST}"
        )
    policy_kwargs |= _architecture(path, policy_kwargs, policy_class, state_dict)
    hyperparameters, untrusted = _hyperparameters(data)
    _check_settings(path, hyperparameters)
    return Archive(
        path=path,
        algorithm=algorithm,
        policy_class=policy_class,
        policy_kwargs=policy_kwargs,
        hyperparameters=hyperparameters,
        state_dict=state_dict,
        sb3_version=version,
        vec_normalized=data.get("_last_original_obs") is not None,
        untrusted=untrusted,
        **rebuilt,
    )


def read_members(path: Path) -> tuple[dict[str, Any], bytes, str | None]:
    """The zip's JSON metadata, its policy weights as `torch.save` wrote them, and the SB3 version that wrote it.

    Raises:
        NsrlError: missing, damaged, or not saved by Stable-Baselines3.
    """
    if path.is_dir() or not path.exists():
        raise NsrlError(f"no agent at {path}; expected the path of a zip saved by Stable-Baselines3")
    try:
        with opened(path) as file, opened_zip(file, OF_WEIGHTS) as members:
            missing = {"data", "policy.pth"} - members.sizes.keys()
            if missing and _begins_late(path):
                raise NsrlError(f"{path} is not a zip file or is damaged: what is left of it ends behind another zip")
            if missing and any(name.endswith("/data.pkl") for name in members.sizes):
                raise NsrlError(f"{path} {OF_A_POLICY}")
            if missing:
                raise NsrlError(
                    f"{path} is a zip without {' and '.join(sorted(missing))}; expected one saved by Stable-Baselines3"
                )
            # Whole members, so that their checksums are verified before anything interprets them.
            text, weights = members.read("data", JSON), members.read("policy.pth")
            version = members.read(VERSION, 100).decode("ascii", "replace").strip() if VERSION in members else None
    except (Unreadable, OSError) as error:
        raise NsrlError(f"{path} is not a zip file or is damaged ({error}); copy or save the agent again") from error
    try:
        data = parse_json(text)
    except Unreadable as error:
        raise NsrlError(f"the metadata of {path} is not JSON ({error}); save the agent again") from error
    if not isinstance(data, dict):
        raise NsrlError(f"the metadata of {path} is not a JSON object; expected a zip saved by Stable-Baselines3")
    return data, weights, version


def check_model_file(path: Any) -> None:
    """Raise NsrlError where stock `load` cannot know what a path is meant to be: a folder, or a policy's own file.

    Args:
        path: of the zip, with or without its suffix; or an open file.
    """
    if isinstance(path, io.IOBase):
        return
    check_path("path", path)
    found = next((file for file in (Path(path), Path(f"{path}.zip")) if file.is_file()), Path(path))
    if found.is_dir():
        raise NsrlError(f"{shown(str(path), 200)} is a folder; name the zip in it, or use nsrl.rl.agents.load")
    if found.is_file() and is_zipfile(found):
        with ZipFile(found) as members:
            names = members.namelist()
        if "data" not in names:
            alone = any(name.endswith("/data.pkl") for name in names)
            raise NsrlError(f"{shown(str(path), 200)} {OF_A_POLICY if alone else 'is no model that SB3 has saved'}")


def _begins_late(path: Path) -> bool:
    """Whether a zip's first entry is not where the file begins: a zip that was cut behind one that lay in it."""
    with ZipFile(path) as members:
        return min((entry.header_offset for entry in members.infolist()), default=0) > 0


def stored_algorithm(path: Path, data: Mapping[str, Any]) -> str:
    """Name of the on-policy algorithm whose hyper-parameters are stored.

    Raises:
        NsrlError: an off-policy algorithm, or none known.
    """
    module, policy_class = described_policy_class(data.get("policy_class"))
    if "learning_starts" in data or "buffer_size" in data or "delta_std" in data:
        raise NsrlError(
            f"{path} is no on-policy agent ({shown(policy_class)}); only on-policy actor-critic agents can be "
            "fine-tuned"
        )
    if ".recurrent." in module:
        return "RecurrentPPO"
    if ".maskable." in module:
        return "MaskablePPO"
    for algorithm, key in (("TRPO", "cg_max_steps"), ("PPO", "n_epochs"), ("A2C", "gae_lambda")):
        if key in data:
            return algorithm
    raise NsrlError(f"{path} holds none of the algorithms PPO, A2C and TRPO; only on-policy agents can be fine-tuned")


def read_weights(path: Path, weights: bytes) -> dict[str, Tensor]:
    """The tensors of `policy.pth`, by name.

    Raises:
        NsrlError: it is damaged, holds something else, or is not finite.
    """
    try:
        state = read_tensors(weights)
        if type(state) is not dict or len(state) > MOST_TENSORS:
            raise Unreadable(f"they are no mapping of at most {MOST_TENSORS} tensors")
        strange = [name for name, weight in state.items() if type(name) is not str or type(weight) is not Tensor]
        if strange:
            raise Unreadable(f"{shown(strange[0])} is no tensor with a name")
    except ForeignName as error:
        raise NsrlError(f"the weights of {path} hold something other than tensors ({error}); {TRUST}") from error
    except Unreadable as error:
        raise NsrlError(f"the weights of {path} cannot be read ({error}); save the agent again") from error
    check_finite(path, state)
    return state


def check_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    """Raise NsrlError where weights are NaN or infinite."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in state.values()):
        raise NsrlError(f"the weights of {path} contain NaN or infinity; the agent diverged, use an earlier checkpoint")


def _architecture(
    path: Path, kwargs: Mapping[str, Any], policy_class: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Any]:
    """`net_arch` as the weights have it, where the stored one says otherwise."""
    if any(name.startswith("mlp_extractor.shared_net") for name in state_dict):
        raise NsrlError(
            f"{path} shares layers of actor and critic, which SB3 dropped in 1.8; train it with a newer SB3"
        )
    widths = {"pi": _widths(state_dict, "policy_net"), "vf": _widths(state_dict, "value_net")}
    stored = kwargs.get("net_arch")
    if stored is None:
        stored = [] if "Cnn" in policy_class or kwargs.get("features_extractor_class") is NatureCNN else [64, 64]
    # Before 1.8 it could be [{"pi": ..., "vf": ...}], which newer versions only take with a warning.
    if isinstance(stored, list) and stored and isinstance(stored[0], dict):
        return {"net_arch": widths}
    if isinstance(stored, list):
        stored = {"pi": stored, "vf": stored}
    return {} if {net: stored.get(net, []) for net in widths} == widths else {"net_arch": widths}


def _widths(state_dict: Mapping[str, Tensor], net: str) -> list[int]:
    layers = []
    for name, tensor in state_dict.items():
        match = re.fullmatch(rf"mlp_extractor\.{net}\.(\d+)\.weight", name)
        if match and tensor.ndim == 2:
            layers.append((int(match[1]), tensor.shape[0]))
    return [width for _, width in sorted(layers)]


def _hyperparameters(data: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    plain: dict[str, Any] = {
        key: value for key, value in data.items() if isinstance(value, int | float | None) and not key.startswith("_")
    }
    untrusted = []
    for key in SCHEDULES:
        if isinstance(data.get(key), dict):
            schedule = described_schedule(data[key])
            if schedule is None:
                untrusted.append(key)
            else:
                plain[key] = schedule
    rollout_buffer = data.get("rollout_buffer_class")
    if isinstance(rollout_buffer, dict) and rollout_buffer.get("__module__") not in STOCK_BUFFERS:
        untrusted.append("rollout_buffer_class")
    return plain, tuple(untrusted)


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    for name, largest in LARGEST.items():
        value = settings.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= largest):
            raise NsrlError(
                f"the policy that {path} describes cannot be built: {name} is {shown(value)}, but must be a whole "
                f"number from 1 to {largest}"
            )
    for name in FRACTIONS:
        value = settings.get(name)
        if isinstance(value, int | float) and (math.isnan(value) or (abs(value) > 1e30 and not math.isinf(value))):
            raise NsrlError(f"the policy that {path} describes cannot be built: {name} is {shown(value)}")
