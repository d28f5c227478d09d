"""What must hold of a retention buffer's content, whether it was collected, loaded or built by hand."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from nsrl.errors import NsrlError
from nsrl.rl.policies import FAMILIES
from nsrl.rl.rollout import map_arrays, policy_inputs

if TYPE_CHECKING:
    from nsrl.rl.buffer import RetentionBuffer


def check_content(buffer: RetentionBuffer) -> None:
    """Raise NsrlError, naming the field, unless types, shapes and values of a buffer make sense together."""
    check_array("outputs", buffer.outputs, np.float32, (None, None))
    n, n_outputs = buffer.outputs.shape
    if n == 0 or n_outputs == 0:
        raise NsrlError(f"the buffer is empty (outputs has shape {buffer.outputs.shape}); collect at least one state")
    named = buffer.observations if isinstance(buffer.observations, dict) else {"": buffer.observations}
    if not named:
        raise NsrlError("observations is an empty dict; it must hold an array for each key of the Dict space")
    for key, array in named.items():
        check_array(f"observations[{key!r}]" if key else "observations", array, None, (n, ...))
    if buffer.family not in FAMILIES.values():
        raise NsrlError(f"family is {buffer.family!r}, but must be one of {', '.join(FAMILIES.values())}")
    for name, family in (("log_std", "gaussian"), ("nvec", "multi_categorical")):
        if (getattr(buffer, name) is not None) != (buffer.family == family):
            raise NsrlError(
                f"{name} must be given for {family} policies and for no others; this one is {buffer.family}"
            )
    if buffer.log_std is not None:
        check_array("log_std", buffer.log_std, np.float32, (n_outputs,))
    if buffer.nvec is not None and (min(buffer.nvec, default=0) < 1 or sum(buffer.nvec) != n_outputs):
        raise NsrlError(f"nvec is {buffer.nvec}, but must be positive and sum to the {n_outputs} columns of outputs")
    check_array("heldout", buffer.heldout, np.bool_, (n,))
    check_array("weights", buffer.weights, np.float32, (n,))
    if buffer.heldout.all():
        raise NsrlError("heldout holds out every state; leave at least one to train on")
    if (buffer.weights < 0.0).any() or not buffer.weights.any():
        raise NsrlError("weights must not be negative, nor all zero")
    try:
        policy_inputs(map_arrays(lambda array: array[:1], buffer.observations), buffer.normalizer)
        json.dumps(buffer.provenance)
    except (ValueError, KeyError, TypeError) as error:
        raise NsrlError(f"normalizer or provenance does not fit the buffer: {error}") from error


def check_array(name: str, array: Any, dtype: Any, shape: tuple[Any, ...]) -> None:
    """Refuse all but a finite array of this dtype (None: any number) and shape (None: any, ...: more)."""
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
