"""A plugin that makes torch's matrix products on the CPU add up their terms from the last to the first.

Every result is as exact as before and differs in the last bits, which is what another processor does, whichever one the
tests run on. Equal products stay equal to the bit. Used by `tests/cpus.py`: pytest -p tests.reversed_sums
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

#: Kept, since an override lasts as long as its library.
LIBRARY = torch.library.Library("aten", "IMPL")
ATEN = torch.ops.aten


def turned(first: Tensor, second: Tensor, sums: int) -> tuple[Tensor, Tensor]:
    """Both factors with the dimension that is summed over (the last of the first, `sums` of the second) reversed."""
    if not first.is_floating_point():
        return first, second
    return first.flip(-1), second.flip(sums)


def empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype)


def mm(a: Tensor, b: Tensor) -> Tensor:
    return ATEN.mm.out(*turned(a, b, 0), out=empty(a, a.shape[0], b.shape[1]))


def addmm(added: Tensor, a: Tensor, b: Tensor, **scales: Any) -> Tensor:
    return ATEN.addmm.out(added, *turned(a, b, 0), **scales, out=empty(a, a.shape[0], b.shape[1]))


def bmm(a: Tensor, b: Tensor) -> Tensor:
    return ATEN.bmm.out(*turned(a, b, 1), out=empty(a, *a.shape[:2], b.shape[2]))


def baddbmm(added: Tensor, a: Tensor, b: Tensor, **scales: Any) -> Tensor:
    return ATEN.baddbmm.out(added, *turned(a, b, 1), **scales, out=empty(a, *a.shape[:2], b.shape[2]))


def addmv(added: Tensor, a: Tensor, b: Tensor, **scales: Any) -> Tensor:
    return ATEN.addmv.out(added, *turned(a, b, 0), **scales, out=empty(a, a.shape[0]))


def dot(a: Tensor, b: Tensor) -> Tensor:
    return mm(a[None], b[:, None])[0, 0] if a.is_floating_point() else (a * b).sum()


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch tells that kernels of its own are replaced
    for product in (mm, addmm, bmm, baddbmm, addmv, dot):
        LIBRARY.impl(product.__name__, product, "CPU")
