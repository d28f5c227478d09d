"""Workers that end with the process that started them, however that one ends: by `kill -9`, with its terminal.

A pipe whose writing end the starter alone holds: the system closes it with the starter, which a worker sees.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait

#: Seconds for a worker to write its checkpoint once its starter has gone; then it ends at once.
GRACE = 60.0


@contextmanager
def lifeline() -> Iterator[int]:
    """The end of a pipe that is a worker's standard input while the block runs; the worker calls `end_with_starter`."""
    held, handed = os.pipe()
    try:
        yield held
    finally:
        os.close(handed)
        os.close(held)


def end_with_starter() -> None:
    """In a process whose standard input is a lifeline: be terminated when it ends."""

    def gone() -> None:
        while os.read(0, 4096):
            pass

    _end_after(gone)


def end_with_parent() -> None:
    """In a process of a multiprocessing pool: be terminated when the parent ends, which a pool's queues do not show."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel
        _end_after(lambda: wait([sentinel]))


def begin_worker() -> None:
    """What every process of a pool begins with: one thread of torch's, and an end with its parent."""
    import torch

    end_with_parent()
    # not the function of nsrl.runs.training, which brings Stable-Baselines3 into every process
    torch.set_num_threads(1)


def _end_after(gone: Callable[[], object]) -> None:
    def watch() -> None:
        gone()
        # As Ctrl-C: a run writes its checkpoint. What does not listen any more is ended without.
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
