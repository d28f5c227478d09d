"""What must hold of a retention buffer's content, whether it was collected, loaded or built by hand."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from stable_baselines3.common.policies import ActorCriticPolicy

from nsrl.errors import NsrlError
from nsrl.reading.limits import shown
from nsrl.rl.agents.agent import fingerprint
from nsrl.rl.playing.rollout import evaluation_mode, map_arrays, policy_inputs
from nsrl.rl.policies.actor_critic import FAMILIES
from nsrl.rl.retention.constraint import RetentionConstraint

if TYPE_CHECKING:
    from nsrl.rl.retention.buffer import RetentionBuffer

#: Mean KL, in nats, that outputs of the same weights may have from those stored: other hardware, other batches.
SAME_POLICY = 1e-4
#: The same for other weights: float32 rounding, far below the KL of two untrained policies.
SAME_FUNCTION = 1e-8
#: Buffers that one may be merged from, and characters of a name in its provenance; a merged one's joins theirs.
MOST_SOURCES, LONGEST_NAME = 10_000, 10_000


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
        if "\0" in key:
            raise NsrlError(f"observations has the key {key!r}, whose NUL the names in a file cannot hold; rename it")
        check_array(f"observations[{key!r}]" if key else "observations", array, None, (n, ...))
    if buffer.family not in FAMILIES.values():
        raise NsrlError(f"family is {buffer.family!r}, but must be one of {', '.join(FAMILIES.values())}")
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


def check_policy(buffer: RetentionBuffer, policy: ActorCriticPolicy) -> None:
    """Raise NsrlError, naming the measured KL, unless the reference outputs of one source are this policy's.

    A policy of other weights is the same one where it computes the same function, as after surgery.
    """
    with evaluation_mode(policy):
        kl = RetentionConstraint(policy, buffer).state_divergences().cpu().numpy()
    ours = fingerprint(policy)
    measured = []
    for index, origin in enumerate(buffer.origins):
        theirs, states = origin.get("fingerprint"), buffer.source == index
        mean = float(kl[states].mean()) if states.any() else math.inf
        if mean <= (SAME_POLICY if theirs in (None, ours) else SAME_FUNCTION):
            return
        measured.append((mean, theirs))
    nearest, theirs = min(measured, key=lambda pair: pair[0])
    named = "" if theirs in (None, ours) else f" (fingerprint {str(theirs)[:12]}, this one has {ours[:12]})"
    raise NsrlError(
        f"the buffer holds the outputs of another agent{named}: on its states this one is at a mean KL of "
        f"{nearest:.3g} from them; make the buffer again with this agent, or pass trust_agent=True (trust_buffer to "
        "from_pretrained, protect and in configurations) to hold this agent to the other's behaviour"
    )


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
