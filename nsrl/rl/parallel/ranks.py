"""The processes of one run, as torchrun starts them, and what they send each other."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist

from nsrl.errors import NsrlError

#: What torchrun sets in every process; where one is missing, there is only this process.
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class ProcessLost(NsrlError):
    """Another process of the run has ended, or does not answer."""


def started_together(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes this one was started together with, itself among them.

    Args:
        environment: the variables that torchrun sets.

    Raises:
        NsrlError: they are not numbers.
    """
    if any(name not in environment for name in VARIABLES):
        return 1
    try:
        return int(environment["WORLD_SIZE"])
    except ValueError as error:
        raise NsrlError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']!r}, but must be a number of processes, as torchrun sets it"
        ) from error


class Ranks:
    """The processes of a run. What is sent has to be sent by all of them, in the same order.

    Args:
        group: of `torch.distributed`, whose backend is gloo: what is sent lies in the processor's memory.

    Attributes:
        number: of this process, from 0 on.
        count: of all.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self._group = group
        self.number, self.count = dist.get_rank(group), dist.get_world_size(group)

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """What every process has of the same size.

        Args:
            rows: bytes, shape (n,) uint8.

        Returns:
            Of all in their order, shape (count, n) uint8.

        Raises:
            ProcessLost: one of them has ended.
        """
        own = torch.from_numpy(np.array(rows))  # a copy: torch takes none that cannot be written to
        found = torch.empty((self.count, len(own)), dtype=torch.uint8)
        try:
            dist.all_gather(list(found), own, self._group)
        except RuntimeError as error:  # of gloo, which names an address and no rank
            raise ProcessLost(
                f"another of the {self.count} processes of this run has ended or does not answer; look for what it said"
            ) from error
        return found.numpy()

    def gather_bytes(self, message: bytes) -> list[bytes]:
        """Messages of any lengths, in the order of the processes.

        Raises:
            ProcessLost: as `gather`.
        """
        lengths = self.gather(np.frombuffer(len(message).to_bytes(8, "little"), np.uint8)).copy().view(np.int64)
        longest = np.zeros(int(lengths.max()), np.uint8)
        longest[: len(message)] = np.frombuffer(message, np.uint8)
        found = self.gather(longest)
        return [row[:length].tobytes() for row, length in zip(found, lengths[:, 0], strict=True)]


@contextmanager
def together() -> Iterator[Ranks]:
    """The processes that torchrun has started, joined while the block runs.

    Raises:
        NsrlError: they do not find each other.
    """
    joined_here = not dist.is_initialized()
    if joined_here:
        try:
            dist.init_process_group("gloo")
        except (RuntimeError, ValueError) as error:
            told = next(iter(str(error).strip().splitlines()), repr(error))
            raise NsrlError(
                f"the processes of this run do not find each other ({told}); start them by torchrun"
            ) from error
    try:
        yield Ranks(None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo"))
    finally:
        if joined_here:
            dist.destroy_process_group()
