"""`nsrl finetune` in one of several processes, as torchrun starts it."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from pathlib import Path

from nsrl.cli.main import main
from nsrl.runs import training


def work(number: int, folder: str, port: int, words: list[str], interrupted: int | None) -> None:
    """Run a command; where asked to, a signal comes to one of the processes in its second roll-out."""
    told = {"RANK": number, "WORLD_SIZE": 2, "LOCAL_RANK": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in told.items()})
    if number == interrupted:
        checkpoint = training.Checkpoint

        class Signalled(checkpoint):  # type: ignore[misc,valid-type]
            def _on_step(self) -> bool:
                if self.n_calls == 80:
                    os.kill(os.getpid(), signal.SIGTERM)
                return super()._on_step()

        training.Checkpoint = Signalled  # type: ignore[misc]
    said, warned = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(warned):
        try:
            status = main(words)
        except SystemExit as stop:
            status = stop.code
    (Path(folder) / f"{number}.txt").write_text(f"{status}\n{said.getvalue()}{warned.getvalue()}")
