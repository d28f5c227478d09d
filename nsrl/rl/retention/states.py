"""What a retention buffer holds, what must hold of it, and how it lies in a file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nsrl.errors import NsrlError, check_path
from nsrl.files import write_npz
from nsrl.reading.limits import shown
from nsrl.rl.agents.normalization import ObservationNormalizer
from nsrl.rl.policies.actor_critic import Observation
from nsrl.rl.policies.distributions import DISTRIBUTIONS
from nsrl.rl.policies.observations import Observations, map_arrays, policy_inputs
from nsrl.versions import BUFFER

#: Buffers that one may be merged from, and characters of a name in its provenance; a merged one's joins theirs.
MOST_SOURCES, LONGEST_NAME = 10_000, 10_000


@dataclass(frozen=True, eq=False, repr=False)
class RetainedStates:
    """N states of the old task with the reference policy's outputs on them; all arrays are read-only.

    Attributes:
        observations: raw (unnormalised) observations, (N, ...), or a dict of such arrays.
        outputs: reference logits or means on the normalised observations, (N, O) float32.
        family: "categorical", "multi_categorical", "bernoulli" or "gaussian" (`distributions.DISTRIBUTIONS`).
        log_std: reference log standard deviations, (O,) float32, or one row a source, (S, O); Gaussian only, else None.
        nvec: number of choices of each action, summing to O; multi-categorical only, else None.
        heldout: states kept out of training, on which generalisation is measured, (N,) bool; default none.
        weights: weight of each state in every mean KL, (N,) float32, in any unit; default ones.
        source: which of the S buffers that were merged a state comes from, (N,) int64; default zeros.
        normalizer: frozen observation statistics of the reference agent, or None.
        provenance: plain JSON: the agent's fingerprint, env, task, seed, selection, spaces, versions, return.

    Raises:
        NsrlError: for an array of wrong type or shape, NaN or infinity, or no states.
    """

    observations: Observations
    outputs: np.ndarray
    family: str
    log_std: np.ndarray | None = None
    nvec: tuple[int, ...] | None = None
    heldout: np.ndarray = None  # type: ignore[assignment]
    weights: np.ndarray = None  # type: ignore[assignment]
    source: np.ndarray = None  # type: ignore[assignment]
    normalizer: ObservationNormalizer | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.outputs) if isinstance(self.outputs, np.ndarray) and self.outputs.ndim else 0
        for name, default in (
            ("heldout", np.zeros(n, dtype=bool)),
            ("weights", np.ones(n, dtype=np.float32)),
            ("source", np.zeros(n, dtype=np.int64)),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        check_content(self)
        for name in ("observations", "outputs", "log_std", "heldout", "weights", "source"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, map_arrays(read_only, getattr(self, name)))

    def __len__(self) -> int:
        return len(self.outputs)

    def __repr__(self) -> str:
        origin = self.provenance
        return (
            f"{type(self).__name__}({len(self)} states of {origin.get('task', 'an unnamed task')}, "
            f"select={origin.get('select')!r}, {self.family} with {self.outputs.shape[1]} outputs, "
            f"{len(self.heldout_indices)} held out, {'normalised' if self.normalizer else 'raw'} inputs, "
            f"return_mean={origin.get('return_mean')})"
        )

    @property
    def origins(self) -> tuple[dict[str, Any], ...]:
        """Provenance of each source: the buffers that were merged, or this one."""
        return tuple(self.provenance.get("sources") or [self.provenance])

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task of each source; the same name twice where two sources are of one task."""
        return tuple(str(origin.get("task", "old")) for origin in self.origins)

    @property
    def spreads(self) -> np.ndarray | None:
        """Reference log standard deviations, (O,), or one row a state, (N, O), where the sources differ in them."""
        return self.log_std if self.log_std is None or self.log_std.ndim == 1 else self.log_std[self.source]

    @property
    def heldout_indices(self) -> np.ndarray:
        """Indices of the H held-out states, (H,) int64."""
        return np.flatnonzero(self.heldout)

    def inputs(self, indices: Sequence[int] | np.ndarray | None = None, device: Any = "cpu") -> Observation:
        """Normalised observations as tensors for `policy.extract_features`, of all states or of some.

        Floating point is float32; images stay uint8 in the policy's channel order; Dict spaces give a dict.
        """
        chosen = self.observations
        if indices is not None:
            chosen = map_arrays(lambda array: array[np.asarray(indices)], chosen)
        return policy_inputs(chosen, self.normalizer, device)

    def digest(self) -> str:
        """SHA-256 of states, outputs, family, split, weights and statistics; the provenance is left out."""
        state = hashlib.sha256()
        arrays = arrays_of(self)
        header = {name: [str(array.dtype), array.shape] for name, array in arrays.items()}
        state.update(json.dumps([self.family, header], sort_keys=True).encode())
        for name in sorted(arrays):
            state.update(np.ascontiguousarray(arrays[name]).tobytes())
        return state.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write an npz that holds no pickle; a file that is there survives until the new one is whole.

        Raises:
            NsrlError: when the file cannot be written.
        """
        check_path("path", path)
        header = {"family": self.family, "provenance": self.provenance}
        return write_npz(path, arrays_of(self), header, BUFFER.newest if self.source.any() else 1)


#: A class of records, for functions that give back the kind that they were given.
Buffer = TypeVar("Buffer", bound=RetainedStates)


def arrays_of(buffer: RetainedStates) -> dict[str, np.ndarray]:
    """The buffer's content under the names that it has in a file; the provenance is left out."""
    arrays = {"outputs": buffer.outputs, "heldout": buffer.heldout, "weights": buffer.weights}
    if isinstance(buffer.observations, dict):
        arrays |= {f"observations/{key}": array for key, array in buffer.observations.items()}
    else:
        arrays["observations"] = buffer.observations
    if buffer.source.any():
        arrays["source"] = buffer.source
    if buffer.log_std is not None:
        arrays["log_std"] = buffer.log_std
    if buffer.nvec is not None:
        arrays["nvec"] = np.asarray(buffer.nvec, dtype=np.int64)
    if buffer.normalizer is not None:
        arrays |= {f"normalizer/{key}": array for key, array in buffer.normalizer.to_arrays().items()}
    return arrays


def fields_from(arrays: dict[str, np.ndarray], header: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of a `RetentionBuffer` from the content of a file.

    Raises:
        NsrlError: naming the key that is missing or damaged.
    """
    for key in ("outputs", "heldout", "weights"):
        if key not in arrays:
            raise NsrlError(f"key {key!r} is missing; collect the buffer again")
    for key in ("family", "provenance"):
        if key not in header:
            raise NsrlError(f"key 'header' has no {key!r}; collect the buffer again")
    if not isinstance(header["provenance"], dict):
        raise NsrlError("key 'header' has a provenance that is no JSON object; collect the buffer again")
    parts: dict[str, dict[str, np.ndarray]] = {"observations": {}, "normalizer": {}}
    for key, array in arrays.items():
        room, slash, name = key.partition("/")
        if slash and room in parts:
            parts[room][name] = array
    observations = arrays.get("observations", parts["observations"] or None)
    if observations is None:
        raise NsrlError("key 'observations' is missing; collect the buffer again")
    normalizer = None
    if parts["normalizer"]:
        try:
            normalizer = ObservationNormalizer.from_arrays(parts["normalizer"])
        except (ValueError, KeyError, TypeError) as error:
            raise NsrlError(f"the keys 'normalizer/...' are damaged ({error}); collect the buffer again") from error
    nvec = arrays.get("nvec")
    if nvec is not None:
        check_array("nvec", nvec, np.int64, (None,))
    return {
        "observations": observations,
        "outputs": arrays["outputs"],
        "family": header["family"],
        "log_std": arrays.get("log_std"),
        "nvec": None if nvec is None else tuple(nvec.tolist()),
        "heldout": arrays["heldout"],
        "weights": arrays["weights"],
        "source": arrays.get("source"),
        "normalizer": normalizer,
        "provenance": header["provenance"],
    }


def check_content(buffer: RetainedStates) -> None:
    """Raise NsrlError, naming the field, unless types, shapes and values of a buffer make sense together."""
    check_array("outputs", buffer.outputs, np.float32, (None, None))
    n, n_outputs = buffer.outputs.shape
    if n == 0 or n_outputs == 0:
        raise NsrlError(f"the buffer is empty (outputs has shape {buffer.outputs.shape}); collect at least one state")
    named = buffer.observations if isinstance(buffer.observations, dict) else {"": buffer.observations}
    if not named:
        raise NsrlError("observations is an empty dict; it must hold an array for each key of the Dict space")
    for key, array in named.items():
        if "\0" in key:
            raise NsrlError(f"observations has the key {key!r}, whose NUL the names in a file cannot hold; rename it")
        check_array(f"observations[{key!r}]" if key else "observations", array, None, (n, ...))
    if buffer.family not in tuple(DISTRIBUTIONS):
        raise NsrlError(f"family is {buffer.family!r}, but must be one of {', '.join(DISTRIBUTIONS)}")
    check_array("source", buffer.source, np.int64, (n,))
    origins = buffer.provenance.get("sources", [])
    if not isinstance(origins, list) or not all(isinstance(origin, dict) for origin in origins):
        raise NsrlError("the sources in the provenance must be a list of the merged buffers' provenances")
    if len(origins) > MOST_SOURCES:
        raise NsrlError(f"the provenance lists {len(origins)} sources, the limit is {MOST_SOURCES}; merge fewer")
    for origin in (buffer.provenance, *origins):  # the names go into tags, tables and sentences
        for key in ("task", "fingerprint"):
            text = origin.get(key)
            if text is not None and not (isinstance(text, str) and len(text) <= LONGEST_NAME):
                raise NsrlError(
                    f"the {key} in the provenance is {shown(text)}, but must be text of up to {LONGEST_NAME} characters"
                )
    if buffer.source.min() < 0 or buffer.source.max() >= len(buffer.origins):
        raise NsrlError(
            f"source has entries from {buffer.source.min()} to {buffer.source.max()}, but the provenance lists "
            f"{len(buffer.origins)} sources"
        )
    for name, family in (("log_std", "gaussian"), ("nvec", "multi_categorical")):
        if (getattr(buffer, name) is not None) != (buffer.family == family):
            raise NsrlError(
                f"{name} must be given for {family} policies and for no others; this one is {buffer.family}"
            )
    if buffer.log_std is not None:
        per_source = getattr(buffer.log_std, "ndim", 1) == 2
        shape = (len(buffer.origins), n_outputs) if per_source else (n_outputs,)
        check_array("log_std", buffer.log_std, np.float32, shape)
    if buffer.nvec is not None and (min(buffer.nvec, default=0) < 1 or sum(buffer.nvec) != n_outputs):
        raise NsrlError(f"nvec is {buffer.nvec}, but must be positive and sum to the {n_outputs} columns of outputs")
    check_array("heldout", buffer.heldout, np.bool_, (n,))
    check_array("weights", buffer.weights, np.float32, (n,))
    if buffer.heldout.all():
        raise NsrlError("heldout holds out every state; leave at least one to train on")
    if (buffer.weights < 0.0).any() or not buffer.weights[~buffer.heldout].any():
        raise NsrlError("weights must not be negative, nor all zero on the states that are not held out")
    try:
        policy_inputs(map_arrays(lambda array: array[:1], buffer.observations), buffer.normalizer)
        json.dumps(buffer.provenance)
    except (ValueError, KeyError, TypeError) as error:
        raise NsrlError(f"normalizer or provenance does not fit the buffer: {error}") from error


def check_array(name: str, array: Any, dtype: Any, shape: tuple[Any, ...]) -> None:
    """Refuse all but a finite array of this dtype (None: any number) and shape (None: any, ...: more).

    Raises:
        NsrlError: naming the field, and what it is instead.
    """
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise NsrlError(f"{name} is {getattr(array, 'dtype', type(array).__name__)}, but must be an array of numbers")
    if dtype is not None and array.dtype != dtype:
        raise NsrlError(f"{name} has dtype {array.dtype}, but must be {np.dtype(dtype)}")
    expected = shape[:-1] + array.shape[len(shape) - 1 :] if shape[-1] is ... else shape
    if len(expected) != array.ndim or any(e is not None and e != a for e, a in zip(expected, array.shape, strict=True)):
        raise NsrlError(f"{name} has shape {array.shape}, but must be {str(shape).replace('Ellipsis', '...')}")
    with np.errstate(over="ignore"):
        finite = array.dtype.kind != "f" or bool(np.isfinite(array.astype(np.float32, copy=False)).all())
    if not finite:
        raise NsrlError(f"{name} holds NaN or infinity (in float32); check environment and agent, collect again")


def read_only(array: np.ndarray) -> np.ndarray:
    """The array, (...,), or a copy of it, that cannot be written to."""
    if array.flags.writeable or array.base is not None:
        array = array.copy()
        array.flags.writeable = False
    return array
