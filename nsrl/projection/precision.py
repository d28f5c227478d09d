"""Exact float32, locally: no TF32, no bfloat16 multiplication, no autocast, and everything as it was afterwards.

TF32 keeps 10 bits of mantissa. A Gram matrix formed with it is off by 1e-3, and the null space of a Jacobian of
condition 1e5 is lost in silence. The switches are global to the process and belong to the user, so they are borrowed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch

#: Switches of torch 2.9 and later, parents first: one that is set to "none" has the value of its parent.
_PARENTS = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))
_LEAVES = tuple((backend, op) for backend in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn"))


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 as float32 inside the `with` block, or inside the function that is decorated.

    Switches off TF32 (cuBLAS, cuDNN), the reduced precisions of oneDNN, and autocast on CPU and CUDA. The settings of
    before come back however the block is left. Blocks nest. The precision switches are global to the process: other
    threads see them, too, while the block runs.
    """
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        matmul, cudnn = _legacy()
        saved = _borrow()
        try:
            # torch 2.9 and later refuse to read the old switches while they disagree with the new ones, so both are
            # set. Where they disagreed before, the new ones alone count and the old ones are left alone.
            _set_legacy(None if matmul is None else "highest", None if cudnn is None else False)
            _set({switch: "ieee" for switch in _LEAVES if switch in saved})
            yield
        finally:
            _set_legacy(matmul, cudnn)
            _set(saved)


def _borrow() -> dict[tuple[str, str], str]:
    """The new switches' own values; they are "none" afterwards. Empty in a torch that has none."""
    # Not torch.backends.*.fp32_precision: reading gives what a switch inherits, and in torch 2.13 writing that of
    # mkldnn writes the generic one.
    saved = {}
    for switch in _PARENTS + _LEAVES if hasattr(torch._C, "_get_fp32_precision_getter") else ():
        saved[switch] = torch._C._get_fp32_precision_getter(*switch)  # its parents are "none" by now
        torch._C._set_fp32_precision_setter(*switch, "none")
    return saved


def _set(values: dict[tuple[str, str], str]) -> None:
    for switch, value in values.items():
        torch._C._set_fp32_precision_setter(*switch, value)


def _legacy() -> tuple[str | None, bool | None]:
    """Precision of matrix products, and whether cuDNN may use TF32; None where torch refuses to tell."""
    matmul, cudnn = None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9 deprecates the very question
        with suppress(RuntimeError):
            matmul = torch.get_float32_matmul_precision()
        with suppress(RuntimeError):
            cudnn = bool(torch.backends.cudnn.allow_tf32)
    return matmul, cudnn


def _set_legacy(matmul: str | None, cudnn: bool | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if cudnn is not None:
            torch._C._set_cudnn_allow_tf32(cudnn)
