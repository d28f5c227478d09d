"""Checkpoints of a fine-tuning run: written atomically, never unpickled, refused where they do not fit.

A checkpoint is a zip of `state.json` (counters, random generators, statistics, history) and `tensors.pt`
(policy, optimizer, retention engine), always as of a rollout boundary. What is not in it is the state of the
simulators: on resuming, the environments start new episodes, and a rollout that was interrupted is collected
    again.
"""

from __future__ import annotations

import copy
import io
import json
import os
import platform
import warnings
import zipfile
from collections import deque
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from stable_baselines3 import __version__ as sb3_version
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.save_util import recursive_getattr

from nsrl.errors import NsrlError
from nsrl.files import written_atomically
from nsrl.reading.checksums import check_checksum, checksum
from nsrl.reading.documents import parse_json
from nsrl.reading.limits import JSON, OF_WEIGHTS, Unreadable, opened, shown
from nsrl.reading.tensors import read_tensors
from nsrl.reading.values import mapping, whole
from nsrl.reading.zips import opened_zip
from nsrl.rl.agents.spaces import describe_space
from nsrl.rl.training.callbacks import TaskEvaluation
from nsrl.rl.training.fitting import COUNTERS, EPISODES, check_fits, identity_of, running_statistics
from nsrl.rl.training.random_state import plain, read_generators, write_generators
from nsrl.versions import CHECKPOINT, VERSION

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

    @property
    def collecting(self) -> bool:
        """Whether a rollout is under way, so that `write` gives the state before it."""
        return self._collecting

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
    everything fits; and what fails nevertheless leaves the model, and all generators, as they were.

    Returns:
        `timesteps`, `total_timesteps`, `history` (for `TaskEvaluation`), `kl_mean` (None where nothing is
        protected) and `purge_step` (for `open_logger`).

    Raises:
        NsrlError: missing or damaged file; another algorithm, architecture, environment, budget or buffer.
    """
    path = Path(path)
    state, tensors = read_checkpoint(path)
    try:
        check_fits(state, tensors, model)
    except Unreadable as error:
        raise NsrlError(f"{path} is truncated or damaged ({error}); start the run anew") from error
    except NsrlError as error:
        raise NsrlError(f"{path} does not fit this run: {error}") from error
    retention = getattr(model, "retention", None)
    # Copies: a module's state is a view of its parameters.
    before = _boundary(model), copy.deepcopy(_tensors(model, read_generators(model)))
    try:
        _put_back(state, tensors, model)
        if retention is not None:
            kl, expected = retention.last.kl_mean, state["retention"]["kl_mean"]
            if not abs(kl - expected) <= KL_TOLERANCE * expected + 1e-7:  # NaN too
                raise NsrlError(
                    f"{path} says that the policy's KL is {expected:.6g}, but it is {kl:.6g}; start the run anew"
                )
    except BaseException as error:
        _put_back(*before, model)
        if isinstance(error, NsrlError) or not isinstance(error, Exception):
            raise
        raise NsrlError(f"{path} does not fit this run ({shown(str(error), 200)}); start the run anew") from error
    model._last_obs = None
    if model.env is not None:
        # seeds that wait for the next reset would start the run's first episodes over again
        model.env.unwrapped._reset_seeds()
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


def _put_back(state: dict[str, Any], tensors: dict[str, Any], model: OnPolicyAlgorithm) -> None:
    """Write what `_boundary` and `_tensors` have read."""
    for name, saved in tensors["modules"].items():
        recursive_getattr(model, name).load_state_dict(saved)
    for name in COUNTERS:
        if name in state["counters"]:
            setattr(model, name, state["counters"][name])
    for name in EPISODES:
        entries = state["episodes"][name]
        setattr(model, name, None if entries is None else deque(entries, maxlen=model._stats_window_size))
    for name, part in running_statistics(model).items():
        for key, value in state["statistics"][name].items():
            setattr(part, key, value if key == "count" else np.array(value))
    retention = getattr(model, "retention", None)
    if retention is not None:
        retention.load_state_dict(tensors["retention"])
    write_generators(model, {**state["generators"], **tensors["generators"]})


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
            for name, part in running_statistics(model).items()
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
        "format": CHECKPOINT.newest,
        "versions": {
            "nsrl": VERSION,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "stable_baselines3": sb3_version,
        },
        "run": identity_of(model),
        "spaces": [describe_space(model.observation_space), describe_space(model.action_space)],
        "generators": {name: part for name, part in generators.items() if name not in ("torch", "cuda")},
        "retention": None if retention is None else {"kl_mean": retention.constraint.divergence()},
        "history": history,
    }
    return plain(state), _tensors(model, generators)


def _tensors(model: OnPolicyAlgorithm, generators: dict[str, Any]) -> dict[str, Any]:
    """Policy, optimizer, retention engine, and those generators whose states are tensors."""
    retention = getattr(model, "retention", None)
    return {
        "modules": {name: recursive_getattr(model, name).state_dict() for name in model._get_torch_save_params()[0]},
        "retention": None if retention is None else retention.state_dict(),
        "generators": {name: generators[name] for name in ("torch", "cuda")},
    }


#: The key of a checkpoint's checksum in its state.
CHECKSUM = "checksum"

PARTS = ("format", "run", "spaces", "counters", "episodes", "generators", "statistics", "retention", "history")

TENSORS = ("modules", "retention", "generators")


def write_checkpoint(path: Path, state: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """Write a checkpoint; a file that is there survives until the new one is complete.

    Raises:
        NsrlError: when the file cannot be written.
    """
    with written_atomically(path, durable=True) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.writestr("state.json", json.dumps(signed(state, tensors)))
        stream = io.BytesIO()
        torch.save(tensors, stream)
        archive.writestr("tensors.pt", stream.getvalue())
    return path


def signed(state: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """The state with the checksum of all of it: a file that was written anew with other weights is no checkpoint."""
    content = {key: value for key, value in state.items() if key != CHECKSUM}
    return {**content, CHECKSUM: checksum([json.loads(json.dumps(content)), tensors])}


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state and the tensors of a checkpoint; no object in it is ever unpickled.

    Raises:
        NsrlError: missing, truncated or damaged file, or one of a newer nsrl; the sentence says which.
    """
    try:
        with opened(path) as file, opened_zip(file, OF_WEIGHTS) as members:
            text, stored = members.read("state.json", JSON), members.read("tensors.pt")
        state = mapping(parse_json(text), "its state", ["format"])
        versions = mapping(state.get("versions", {}), "its versions")
        CHECKPOINT.check(path, whole(state["format"], "its format", 1), versions.get("nsrl"))
        mapping(state, "its state", PARTS)
        tensors = mapping(read_tensors(stored), "its tensors", TENSORS, ())
        if CHECKSUM in state:  # the first ones have none
            expected = state.pop(CHECKSUM)
            check_checksum([state, tensors], expected)
        return state, tensors
    except FileNotFoundError as error:
        raise NsrlError(f"no checkpoint at {path}; there is nothing to resume, start the run without") from error
    except OSError as error:
        raise NsrlError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except Unreadable as error:
        raise NsrlError(f"{path} is truncated or damaged ({error}); start the run anew") from error
