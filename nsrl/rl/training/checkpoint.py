"""Checkpoints of a fine-tuning run: written atomically, never unpickled, refused where they do not fit.

A checkpoint is a zip of `state.json` (counters, random generators, statistics, history) and `tensors.pt`
(policy, optimizer, retention engine), always as of a rollout boundary. What is not in it is the state of the
simulators: on resuming, the environments start new episodes, and a rollout that was interrupted is collected
    again.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import warnings
import zipfile
from collections import deque
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from stable_baselines3 import __version__ as sb3_version
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.save_util import recursive_getattr
from torch import Tensor

from nsrl.errors import NsrlError
from nsrl.files import unwritable
from nsrl.reading.documents import parse_json
from nsrl.reading.limits import JSON, OF_WEIGHTS, Unreadable, opened, shown
from nsrl.reading.tensors import read_tensors
from nsrl.reading.values import finite, items, mapping, numbers, whole
from nsrl.reading.zips import opened_zip
from nsrl.rl.agents.normalization import FrozenMeanStd
from nsrl.rl.agents.spaces import check_described, describe_space
from nsrl.rl.training.callbacks import TaskEvaluation
from nsrl.rl.training.random_state import check_generators, plain, read_generators, write_generators

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

EPISODES = ("ep_info_buffer", "ep_success_buffer")

#: Relative difference of the measured KL, before and after, that another machine's arithmetic may explain.
KL_TOLERANCE = 1e-3


class Checkpoint(BaseCallback):
    """Writes a checkpoint at the start, at rollout boundaries every so many timesteps, and at the end.

    A run that is stopped in the middle of a rollout (Ctrl-C under `graceful_interrupts`) leaves the boundary
    before it.

    Args:
        path: the file; the previous one stays readable until the new one is complete.
        every: timesteps between checkpoints.
        evaluation: whose history goes along.
    """

    def __init__(self, path: str | os.PathLike[str], every: int = 10_000, evaluation: TaskEvaluation | None = None):
        super().__init__()
        if every < 1:
            raise NsrlError(f"every must be a number of timesteps >= 1, not {every}")
        self.path = Path(path)
        self.every = every
        self.evaluation = evaluation
        self._written: int | None = None
        self._collecting = False

    def write(self) -> Path:
        """Write the state of the last rollout boundary now; to be called between environment steps."""
        history = [] if self.evaluation is None else self.evaluation.history
        path = write_checkpoint(self.path, *_content(self.model, self._boundary, history))  # type: ignore[arg-type]
        self._written = self._boundary["counters"]["num_timesteps"]
        return path

    def _init_callback(self) -> None:
        # before any `_on_training_start`, where an evaluation plays and then takes its time off the model's
        self._started = perf_counter()

    def _on_rollout_start(self) -> None:
        self._collecting = True
        self._boundary = self._read_boundary()
        if self._written is None:
            self.write()
        elif self.model.num_timesteps >= (self._written // self.every + 1) * self.every:
            try:
                self.write()
            except NsrlError as error:  # a full disk is no reason to lose what has been learnt
                warnings.warn(f"{error}; the run goes on without this checkpoint", stacklevel=2)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._collecting = False

    def _on_training_end(self) -> None:
        if not self._collecting:
            self._boundary = self._read_boundary()
        self.write()

    def _read_boundary(self) -> dict[str, Any]:
        return _boundary(self.model, perf_counter() - self._started)  # type: ignore[arg-type]


def save(path: str | os.PathLike[str], model: OnPolicyAlgorithm, history: list[dict[str, Any]] | None = None) -> Path:
    """Write a checkpoint of a model that is not learning right now.

    Raises:
        NsrlError: when the file cannot be written.
    """
    return write_checkpoint(Path(path), *_content(model, _boundary(model), history or []))


def restore(path: str | os.PathLike[str], model: OnPolicyAlgorithm) -> dict[str, Any]:
    """Put a checkpoint back into a freshly built model of the same class, settings, buffer and environments.

    Continue with `model.learn(remaining(model, total), reset_num_timesteps=False)`: learning rate and clip
    range go on as if nothing had happened. The environments begin new episodes. Nothing is touched unless
    everything fits.

    Returns:
        `timesteps`, `total_timesteps`, `history` (for `TaskEvaluation`), `kl_mean` (None where nothing is
        protected) and `purge_step` (for `open_logger`).

    Raises:
        NsrlError: missing or damaged file; another algorithm, architecture, environment, budget or buffer.
    """
    path = Path(path)
    state, tensors = read_checkpoint(path)
    try:
        _check(state, tensors, model)
    except Unreadable as error:
        raise NsrlError(f"{path} is truncated or damaged ({error}); start the run anew") from error
    except NsrlError as error:
        raise NsrlError(f"{path} does not fit this run: {error}") from error
    for name, saved in tensors["modules"].items():
        recursive_getattr(model, name).load_state_dict(saved)
    for name in COUNTERS:
        if name in state["counters"]:
            setattr(model, name, state["counters"][name])
    for name in EPISODES:
        entries = state["episodes"][name]
        setattr(model, name, None if entries is None else deque(entries, maxlen=model._stats_window_size))
    for name, part in _running(model).items():
        for key, value in state["statistics"][name].items():
            setattr(part, key, value if key == "count" else np.array(value))
    retention = getattr(model, "retention", None)
    if retention is not None:
        retention.load_state_dict(tensors["retention"])
        kl, expected = retention.last.kl_mean, state["retention"]["kl_mean"]
        if not abs(kl - expected) <= KL_TOLERANCE * expected + 1e-7:  # NaN too
            raise NsrlError(
                f"{path} says that the policy's KL is {expected:.6g}, but it is {kl:.6g}; start the run anew"
            )
    model._last_obs = None
    if model.env is not None:
        # seeds that wait for the next reset would start the run's first episodes over again
        model.env.unwrapped._reset_seeds()
    write_generators(model, {**state["generators"], **tensors["generators"]})
    timesteps = state["counters"]["num_timesteps"]
    return {
        "timesteps": timesteps,
        "total_timesteps": state["counters"]["_total_timesteps"],
        "history": state["history"],
        "kl_mean": None if retention is None else retention.last.kl_mean,
        "purge_step": timesteps + 1,
    }


def remaining(model: OnPolicyAlgorithm, total: int) -> int:
    """Timesteps left of `total`: what `learn(..., reset_num_timesteps=False)` is to be given."""
    return max(total - model.num_timesteps, 0)


# -- content -------------------------------------------------------------------------------------------


def _boundary(model: OnPolicyAlgorithm, learning: float = 0.0) -> dict[str, Any]:
    """What a rollout changes: read before it, so that an interrupted one can be as if it had not begun."""
    counters = {name: getattr(model, name) for name in COUNTERS if hasattr(model, name)}
    if "_learning_seconds" in counters:
        counters["_learning_seconds"] += learning
    return {
        "counters": counters,
        "episodes": {name: None if getattr(model, name) is None else list(getattr(model, name)) for name in EPISODES},
        "generators": read_generators(model),
        "statistics": {
            name: plain({key: getattr(part, key) for key in ("mean", "var", "count")})
            for name, part in _running(model).items()
        },
    }


def _content(
    model: OnPolicyAlgorithm, boundary: dict[str, Any], history: list[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON and the tensors of a checkpoint."""
    retention = getattr(model, "retention", None)
    generators = boundary["generators"]
    state = {
        **boundary,
        "format": FORMAT,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "stable_baselines3": sb3_version,
        },
        "run": _identity(model),
        "spaces": [describe_space(model.observation_space), describe_space(model.action_space)],
        "generators": {name: part for name, part in generators.items() if name not in ("torch", "cuda")},
        "retention": None if retention is None else {"kl_mean": retention.constraint.divergence()},
        "history": history,
    }
    tensors = {
        "modules": {name: recursive_getattr(model, name).state_dict() for name in model._get_torch_save_params()[0]},
        "retention": None if retention is None else retention.state_dict(),
        "generators": {name: generators[name] for name in ("torch", "cuda")},
    }
    return plain(state), tensors


def _identity(model: OnPolicyAlgorithm) -> dict[str, Any]:
    """What must be the same for a run to go on, each with the words for it."""
    retention = getattr(model, "retention", None)
    identity: dict[str, Any] = {"algorithm": type(model).__name__, "number of environments": model.n_envs}
    identity["retention"] = None if retention is None else type(retention).__name__
    if retention is not None:
        # not the seed: where its generators stand is in the checkpoint
        identity |= {key: value for key, value in asdict(retention.config).items() if key != "seed"}
        identity["penalty"] = getattr(retention, "coefficient", None)
        identity["retention buffer"] = retention.constraint.buffer.digest()
    return identity


def _running(model: OnPolicyAlgorithm) -> dict[str, RunningMeanStd]:
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


# -- fitting -------------------------------------------------------------------------------------------


def _check(state: dict[str, Any], tensors: dict[str, Any], model: OnPolicyAlgorithm) -> None:
    """Raise Unreadable for what no run writes, NsrlError for what another run wrote."""
    observations, actions = items(state["spaces"], "spaces", 2)
    check_described(model, observations, actions, "its run")
    identity = plain(_identity(model))
    for key in mapping(state["run"], "run") | identity:
        saved, here = state["run"].get(key), identity.get(key)
        if saved == here:
            continue
        if key == "retention buffer":
            raise NsrlError("it was made with another retention buffer; resume with the run's own")
        raise NsrlError(
            f"{shown(key)} was {shown(saved)} in its run and is {here} now; resume with the settings of the run"
        )
    _check_modules(mapping(tensors["modules"], "modules"), model)
    _check_counters(state)
    _check_statistics(mapping(state["statistics"], "statistics"), _running(model))
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
        if saved[name].dtype != here[name].dtype or not bool(torch.isfinite(saved[name]).all()):
            raise Unreadable(f"{name} is not finite or of another type")


def _check_optimizer(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Groups of the same settings, and state of the shapes of the parameters: the next step would take it as it is."""
    groups = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for theirs, ours in zip(items(saved["param_groups"], "param_groups", len(groups)), groups, strict=True):
        for key, value in mapping(theirs, "a parameter group", ["params", "lr"], ours).items():
            plain_kinds = (bool, int, float, type(None), tuple)
            if (value != ours[key]) if key == "params" else not isinstance(value, plain_kinds):
                raise Unreadable(f"{key} of a parameter group is {shown(value)}")
    if type(saved["state"]) is not dict:
        raise Unreadable("the optimizer's state is no mapping")
    for index, entries in saved["state"].items():
        shape = parameters[whole(index, "a parameter's number", 0, len(parameters) - 1)].shape
        for name, value in mapping(entries, "a parameter's state").items():
            fits = value.shape in (shape, ()) if isinstance(value, Tensor) else type(value) in (bool, int, float)
            if not fits:
                raise Unreadable(f"{shown(name)} of a parameter does not have its shape")


def _check_counters(state: dict[str, Any]) -> None:
    for name, value in mapping(state["counters"], "counters", ["num_timesteps", "_total_timesteps"], COUNTERS).items():
        if name in CLOCKS:
            finite(value, name)
        else:
            whole(value, name)
    for name in EPISODES:
        for entry in items(mapping(state["episodes"], "episodes", EPISODES)[name] or [], name):
            if name == "ep_info_buffer":
                finite(mapping(entry, name, ["r", "l"])["r"], "a return")
                finite(entry["l"], "a length")
            elif type(entry) not in (bool, int, float):
                raise Unreadable(f"{name} holds {shown(entry)}")
    for row in items(state["history"], "history"):
        for key, value in mapping(row, "a row of the history").items():
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


FORMAT = 1

PARTS = ("format", "run", "spaces", "counters", "episodes", "generators", "statistics", "retention", "history")

TENSORS = ("modules", "retention", "generators")


def write_checkpoint(path: Path, state: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """Write a checkpoint; a file that is there survives until the new one is complete.

    Raises:
        NsrlError: when the file cannot be written.
    """
    # one name for all attempts, so that what a killed process leaves behind is overwritten by the next one
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("state.json", json.dumps(state))
                stream = io.BytesIO()
                torch.save(tensors, stream)
                archive.writestr("tensors.pt", stream.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # the new name survives a power cut only once the folder is synced
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise unwritable(f"the checkpoint {path}", error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state and the tensors of a checkpoint; no object in it is ever unpickled.

    Raises:
        NsrlError: missing, truncated or damaged file, or another format.
    """
    try:
        with opened(path) as file, opened_zip(file, OF_WEIGHTS) as members:
            text, stored = members.read("state.json", JSON), members.read("tensors.pt")
        state = mapping(parse_json(text), "its state", PARTS)
        version = whole(state["format"], "its format")
        if version == FORMAT:
            return state, mapping(read_tensors(stored), "its tensors", TENSORS, ())
    except FileNotFoundError as error:
        raise NsrlError(f"no checkpoint at {path}; there is nothing to resume, start the run without") from error
    except OSError as error:
        raise NsrlError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except Unreadable as error:
        raise NsrlError(f"{path} is truncated or damaged ({error}); start the run anew") from error
    raise NsrlError(f"{path} has checkpoint format {version} and this nsrl reads {FORMAT}; use the nsrl that wrote it")
