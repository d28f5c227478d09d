"""Inputs with the samples first: a tensor, or a nested container of tensors (dictionary observations)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from nsrl.errors import NsrlError


def count_samples(inputs: Any) -> int:
    """Number of samples of the inputs.

    Raises:
        NsrlError: no samples, leaves that are no tensors, or leaves with different numbers of samples.
    """
    leaves = pytree.tree_leaves(inputs)
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            what = "a number" if isinstance(leaf, Tensor) else type(leaf).__name__
            raise NsrlError(f"the inputs must be tensors with the samples first, not {what}; use torch.as_tensor")
    counts = sorted({leaf.shape[0] for leaf in leaves})
    if len(counts) > 1:
        raise NsrlError(f"the parts of the inputs have different numbers of samples: {', '.join(map(str, counts))}")
    if not counts or counts[0] == 0:
        raise NsrlError("the inputs have no samples; a kernel needs at least one")
    return counts[0]


def take_samples(inputs: Any, start: int, stop: int) -> Any:
    """The samples from start to stop, in the same container."""
    return pytree.tree_map(lambda leaf: leaf[start:stop], inputs)


def refuse_mismatch(x1: Any, x2: Any) -> None:
    """Raise unless the two sets of inputs differ in their number of samples only.

    Raises:
        NsrlError: also for inputs without samples.
    """
    count_samples(x1), count_samples(x2)
    (ours, our_tree), (theirs, their_tree) = pytree.tree_flatten(x1), pytree.tree_flatten(x2)
    if our_tree != their_tree:
        raise NsrlError("x1 and x2 are different containers; both must be what the model is called with")
    for mine, yours in zip(ours, theirs, strict=True):
        if mine.shape[1:] != yours.shape[1:] or mine.dtype != yours.dtype:
            raise NsrlError(
                f"x1 has samples of shape {tuple(mine.shape[1:])} ({mine.dtype}), x2 of {tuple(yours.shape[1:])} "
                f"({yours.dtype}); both must be what the model is called with"
            )
