"""One line that says how far a benchmark is."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nsrl.bench.suites.jobs import Status


class StatusLine:
    """Progress of jobs on stderr: redrawn in place on a terminal, a line for every finished job elsewhere.

    Args:
        name: what is running.
    """

    def __init__(self, name: str):
        self.name = name
        self._done = -1
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> StatusLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminal:
            print(file=sys.stderr)

    def show(self, status: Status) -> None:
        """Draw a status."""
        left = "" if status.remaining is None else f", about {_time(status.remaining)} left"
        text = f"{self.name}: {len(status.done)} of {status.total} runs done{left}"
        if self._terminal:
            running = "; ".join(f"{name} {share:.0%}" for name, share, _ in status.running)
            print(f"\r\033[K{text}  [{running}]"[:160], end="", file=sys.stderr, flush=True)
        elif len(status.done) != self._done:
            self._done = len(status.done)
            print(text, file=sys.stderr, flush=True)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
