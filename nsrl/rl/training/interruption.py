"""Ctrl-C, SIGTERM and a closed terminal as a clean stop: training ends at the next step and leaves a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from stable_baselines3.common.callbacks import BaseCallback

from nsrl.rl.parallel.shared_envs import SharedEnvs

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interruption(BaseCallback):
    """Stops `learn` once a signal has come.

    Attributes:
        signal: number of the signal, None while there was none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.signal: int | None = None
        self._shared: SharedEnvs | None = None

    def share(self, envs: SharedEnvs | None) -> None:
        """Stop together with the other processes of a run, at the same step: a signal reaches them one by one."""
        self._shared = envs
        if envs is not None:
            envs.stopping = lambda: self.signal is not None

    def requested(self) -> bool:
        """Whether a signal has come; in one of several processes of a run, to any of them before the last step."""
        return self.signal is not None if self._shared is None else self._shared.stopped

    @property
    def exit_status(self) -> int:
        """What a shell expects of an interrupted program, 128 + signal; 0 when there was none."""
        if self.signal is None:
            return 128 + signal.SIGTERM if self.requested() else 0  # it came to another process
        return 128 + self.signal

    def _on_step(self) -> bool:
        return not self.requested()


@contextmanager
def graceful_interrupts() -> Iterator[Interruption]:
    """Within the block, the first SIGINT, SIGTERM or SIGHUP asks for a clean stop and the second aborts at once.

        with graceful_interrupts() as interruption:
            model.learn(total, callback=[evaluation, Checkpoint(path), interruption])
        sys.exit(interruption.exit_status)

    The second one raises KeyboardInterrupt (SIGINT) or SystemExit (the others); the last checkpoint on disk
    stays whole. Where handlers cannot be set (not the main thread) signals keep their meaning, and SIGHUP where it
    is ignored, as under nohup.

    Yields:
        A callback that belongs in the list given to `learn`.
    """
    interruption = Interruption()

    def handle(number: int, _: FrameType | None) -> None:
        if interruption.signal is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        interruption.signal = number
        # not print: its buffer may be in use by the very code that the signal interrupts
        name = signal.Signals(number).name
        with suppress(OSError):  # the terminal may be what has gone
            os.write(2, f"\n{name}: stopping at the next environment step; once more aborts at once\n".encode())

    previous = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
