"""What a run would need, refused in a sentence before anything is allocated: the system may say no only by killing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nsrl.errors import NsrlError

#: Bytes that an environment takes at least: its objects, spaces and generators.
ENVIRONMENT = 4096


def check_memory(what: str, needed: float) -> None:
    """Raise NsrlError where there is not that much memory.

    Args:
        what: asks for it, as the beginning of a sentence.
        needed: bytes, at least.
    """
    free = free_bytes()
    if needed > free:
        raise NsrlError(
            f"{what} would take {needed / 2**30:,.0f} GiB of memory or more, and {free / 2**30:,.0f} GiB are free; ask "
            "for less"
        )


def check_rollout(space: Any, n_envs: int, n_steps: int | None) -> None:
    """Raise NsrlError where a rollout of so many environments and steps does not fit into memory.

    Args:
        space: of the observations.
        n_envs: environments.
        n_steps: steps of each; None where they are the agent's own.
    """
    each = observation_bytes(space)
    check_memory(f"n_envs {n_envs}", n_envs * (ENVIRONMENT + each))
    # Besides the observation six numbers of four bytes: action, reward, value, log-probability, advantage, return.
    if n_steps is not None:
        check_memory(f"n_steps {n_steps} in {n_envs} environments", n_steps * n_envs * (each + 24))


def observation_bytes(space: Any) -> int:
    """Bytes of one observation of a gymnasium space."""
    if hasattr(space, "spaces"):
        parts = space.spaces.values() if isinstance(space.spaces, dict) else space.spaces
        return sum(map(observation_bytes, parts))
    shape = space.shape or ()
    size = space.dtype.itemsize if space.dtype is not None else 8
    for length in shape:
        size *= length
    return int(size)


def free_bytes() -> float:
    """Memory that can be taken without swapping, bytes; infinity where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError, IndexError):
        return float("inf")
