"""A retention buffer as named arrays and a JSON header: what its npz holds and its digest covers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nsrl.errors import NsrlError
from nsrl.rl.agents.normalization import ObservationNormalizer
from nsrl.rl.retention.validation import check_array

if TYPE_CHECKING:
    from nsrl.rl.retention.buffer import RetentionBuffer

#: 2 added the source of each state; a buffer of one source is still written as 1, which older versions read.
FORMAT = 2


def arrays_of(buffer: RetentionBuffer) -> dict[str, np.ndarray]:
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
