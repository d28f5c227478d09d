"""What a device has and what of it a computation takes: memory, bandwidth, its queue."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from time import perf_counter

import torch

STATUS = Path("/proc/self/status")
MEGABYTE = 2**20


class PeakMemory:
    """Peak memory since its making, above what was held then: of the process, or of the CUDA device.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str):
        self._device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = float(torch.cuda.memory_allocated())
            return
        try:
            # Sets VmHWM to what is resident now (Linux, proc(5)); where that is not allowed the peak of the imports
            # counts as held, and a computation below it as free.
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass
        self._before = _process_peak()

    def megabytes(self) -> float:
        """The peak so far."""
        now = float(torch.cuda.max_memory_allocated()) if self._device == "cuda" else _process_peak()
        return (now - self._before) / MEGABYTE


def free_bytes(device: str) -> float:
    """Memory that can be taken without swapping; infinity where the system does not say."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable", float("inf"))


def copy_bandwidth(device: str, megabytes: int = 512, repeats: int = 5) -> float:
    """Bytes a second that copying reads and writes, the best of some repeats."""
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(repeats + 1):
        synchronize(device)
        start = perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, perf_counter() - start)
    return 2 * source.numel() * source.element_size() / best


def synchronize(device: str) -> None:
    """Wait until a device has done what was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


def _process_peak() -> float:
    if STATUS.is_file():
        # Not ru_maxrss: on Linux a child starts with its parent's.
        return _kilobytes(STATUS, "VmHWM", 0.0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


def _kilobytes(path: Path, key: str, default: float) -> float:
    """A `key: N kB` line of a proc file, in bytes."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return default
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), default)
