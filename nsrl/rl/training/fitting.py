"""Whether a checkpoint is one of this run: all of it is compared with a model before any of it is put back."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.save_util import recursive_getattr
from torch import Tensor

from nsrl.errors import NsrlError
from nsrl.reading.limits import Unreadable, shown
from nsrl.reading.values import finite, items, mapping, numbers, whole
from nsrl.rl.agents.normalization import FrozenMeanStd
from nsrl.rl.agents.spaces import check_described
from nsrl.rl.budget.config import RetentionConfig
from nsrl.rl.training.random_state import check_generators, plain

COUNTERS = (
    "num_timesteps",
    "_total_timesteps",
    "_num_timesteps_at_start",
    "_n_updates",
    "_episode_num",
    "_current_progress_remaining",
    "_learning_seconds",
)

#: Those of the counters that are no whole numbers.
CLOCKS = ("_current_progress_remaining", "_learning_seconds")

#: What a row of the history has.
ROW = ("timesteps", "old_returns", "new_return", "kl_mean", "kl_heldout", "agreement", "seconds")

#: Of retention, by name.
SETTINGS = frozenset(item.name for item in fields(RetentionConfig))

EPISODES = ("ep_info_buffer", "ep_success_buffer")


def check_fits(state: dict[str, Any], tensors: dict[str, Any], model: OnPolicyAlgorithm) -> None:
    """Raise Unreadable for what no run writes, NsrlError for what another run wrote."""
    observations, actions = items(state["spaces"], "spaces", 2)
    check_described(model, observations, actions, "its run")
    identity = plain(identity_of(model))
    for key in mapping(state["run"], "run") | identity:
        saved, here = state["run"].get(key), identity.get(key)
        if saved == here or (key not in state["run"] and key in SETTINGS):  # an older nsrl did not have this setting
            continue
        if key == "retention buffer":
            raise NsrlError("it was made with another retention buffer; resume with the run's own")
        raise NsrlError(
            f"{shown(key)} was {shown(saved)} in its run and is {here} now; resume with the settings of the run"
        )
    _check_modules(mapping(tensors["modules"], "modules"), model)
    _check_counters(state)
    _check_statistics(mapping(state["statistics"], "statistics"), running_statistics(model))
    parts = [mapping(part["generators"], "generators") for part in (state, tensors)]
    check_generators(model, {**parts[0], **parts[1]})
    retention = getattr(model, "retention", None)
    if retention is not None:
        finite(mapping(state["retention"], "retention", ["kl_mean"])["kl_mean"], "kl_mean")
        retention.check_state(tensors["retention"])


def _check_modules(saved: dict[str, Any], model: OnPolicyAlgorithm) -> None:
    # The names are the model's: a file that names attributes could reach any object.
    mapping(saved, "modules", model._get_torch_save_params()[0], ())
    for name, content in saved.items():
        module = recursive_getattr(model, name)
        if isinstance(module, torch.nn.Module):
            _check_architecture(mapping(content, name), module.state_dict())
        else:
            _check_optimizer(mapping(content, name, ["state", "param_groups"], ()), module)


def _check_architecture(saved: dict[str, Any], here: dict[str, Tensor]) -> None:
    for name in saved | here:
        weights = [part.get(name) for part in (saved, here)]
        shapes = [tuple(part.shape) if isinstance(part, Tensor) else None for part in weights]
        if shapes[0] != shapes[1]:
            raise NsrlError(
                f"{shown(name)} has shape {shapes[0]} in its run and {shapes[1]} in this policy; resume with the "
                "architecture of the run"
            )
        if shapes[0] is None or saved[name].dtype != here[name].dtype or not bool(torch.isfinite(saved[name]).all()):
            raise Unreadable(f"{name} is not finite or of another type")


def _check_optimizer(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Groups of the same settings, and state of the shapes of the parameters: the next step would take it as it is."""
    groups = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for theirs, ours in zip(items(saved["param_groups"], "param_groups", len(groups)), groups, strict=True):
        for key, value in mapping(theirs, "a parameter group", ours, ()).items():
            if key == "lr":
                finite(value, "the learning rate", 0.0)
            elif type(value) is not type(ours[key]) or value != ours[key]:
                raise NsrlError(
                    f"{shown(key)} of the optimizer was {shown(value)} in its run and is {shown(ours[key])} now; "
                    "resume with the settings of the run"
                )
    if type(saved["state"]) is not dict:
        raise Unreadable("the optimizer's state is no mapping")
    for index, entries in saved["state"].items():
        shape = parameters[whole(index, "a parameter's number", 0, len(parameters) - 1)].shape
        for name, value in mapping(entries, "a parameter's state").items():
            if not isinstance(value, Tensor):
                finite(value, f"{shown(name)} of a parameter")
            elif value.shape not in (shape, ()) or not bool(torch.isfinite(value).all()):
                raise Unreadable(f"{shown(name)} of a parameter is not finite or does not have its shape")
    _check_moments(saved["state"], optimizer, parameters)


def _check_moments(
    state: dict[int, dict[str, Any]], optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]
) -> None:
    """What Adam keeps of each parameter, in whichever of its forms: the next step would take the root of it."""
    if not isinstance(optimizer, torch.optim.Adam):
        return
    names = {"step": (), "exp_avg": None, "exp_avg_sq": None}
    if optimizer.defaults["amsgrad"]:
        names["max_exp_avg_sq"] = None
    for index, entries in state.items():
        for name, value in mapping(entries, "a parameter's state", names, ()).items():
            shape = parameters[index].shape if names[name] is None else ()
            if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
                raise Unreadable(f"{name} of a parameter is not of its shape")
            if name != "exp_avg" and bool((value < 0).any()):
                raise Unreadable(f"{name} of a parameter is negative")


def _check_counters(state: dict[str, Any]) -> None:
    for name, value in mapping(state["counters"], "counters", ["num_timesteps", "_total_timesteps"], COUNTERS).items():
        if name in CLOCKS:
            finite(value, name)
        else:
            whole(value, name)
    episodes = mapping(state["episodes"], "episodes", EPISODES)
    if len({episodes[name] is None for name in EPISODES}) > 1:  # SB3 makes both as the first training begins
        raise Unreadable("one of the records of episodes is missing")
    for name in EPISODES:
        for entry in items([] if episodes[name] is None else episodes[name], name):
            if name == "ep_info_buffer":
                finite(mapping(entry, name, ["r", "l"])["r"], "a return")
                finite(entry["l"], "a length")
            elif type(entry) is not bool:  # as most environments report a success
                finite(entry, name)
    before = 0
    for row in items(state["history"], "history"):
        before = whole(mapping(row, "a row of the history", ROW)["timesteps"], "timesteps of the history", before)
        finite(row["seconds"], "seconds of the history")
        for key, value in row.items():
            for entry in mapping(value, key).values() if key == "old_returns" else [value]:
                if entry is not None and type(entry) not in (bool, int, float):
                    raise Unreadable(f"{shown(key)} of the history is {shown(entry)}, not a number")


def _check_statistics(saved: dict[str, Any], running: dict[str, RunningMeanStd]) -> None:
    if saved.keys() != running.keys():
        raise NsrlError(
            f"it holds the statistics {shown(sorted(saved))}, the environment has {sorted(running)}; "
            "wrap the environment as in the run"
        )
    for name, part in running.items():
        values = mapping(saved[name], name, ["mean", "var", "count"], ())
        finite(values["count"], "count", 0.0)
        arrays = {key: numbers(values[key], key, np.shape(getattr(part, key))) for key in ("mean", "var")}
        same = all(np.array_equal(arrays[key], getattr(part, key)) for key in arrays)
        if isinstance(part, FrozenMeanStd) and not same:
            raise NsrlError("its frozen observation statistics are others; resume with the agent of the run")
        if (arrays["var"] < 0).any():
            raise Unreadable(f"a variance of the statistics {name} is negative")


def identity_of(model: OnPolicyAlgorithm) -> dict[str, Any]:
    """What must be the same for a run to go on, each with the words for it."""
    retention = getattr(model, "retention", None)
    identity: dict[str, Any] = {"algorithm": type(model).__name__, "number of environments": model.n_envs}
    identity["retention"] = None if retention is None else type(retention).__name__
    if retention is not None:
        # not the seed: where its generators stand is in the checkpoint
        identity |= {key: value for key, value in asdict(retention.config).items() if key != "seed"}
        identity["penalty"] = getattr(retention, "coefficient", None)
        identity["retention buffer"] = retention.given
    return identity


def running_statistics(model: OnPolicyAlgorithm) -> dict[str, RunningMeanStd]:
    """Reward and observation statistics of the VecNormalize around the environment, by name.

    Its discounted returns are left out: they begin anew with the episodes.
    """
    normalize = model.get_vec_normalize_env()
    if normalize is None:
        return {}
    parts: Any = normalize.obs_rms if normalize.norm_obs else {}
    if not isinstance(parts, dict):
        parts = {"": parts}
    return {"rewards": normalize.ret_rms} | {f"observations {key}".strip(): part for key, part in parts.items()}
