"""Work shared out over threads by hand, for products too small for BLAS to do so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")


def share_out(work: Callable[[Item], Any], items: Sequence[Item]) -> None:
    """Call `work` on every item, on as many threads as torch uses, each of them with one torch thread.

    torch releases the interpreter's lock inside its operators. Parts of a result that different items write to must
    not overlap. An exception of any item is raised here.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(items) < 2:
        for item in items:
            work(item)
        return
    grad = torch.is_grad_enabled()

    def begin() -> None:
        # Both are settings of a thread; the first also becomes the default of new threads until it is put back below.
        torch.set_num_threads(1)
        torch.set_grad_enabled(grad)

    try:
        with ThreadPoolExecutor(min(threads, len(items)), initializer=begin) as pool:
            list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)
