"""The folder of one run: what lies in it, under which name, and who may write there."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from nsrl.errors import NsrlError
from nsrl.files import (
    ELSEWHERE,
    NO_ROOM,
    STAMP,
    TEMPORARY,
    NoRoom,
    check_stamp,
    given_path,
    remove_temporaries,
    unwritable,
    write_stamp,
    write_text,
)
from nsrl.reading.documents import read_results
from nsrl.reading.limits import shown
from nsrl.rl.budget.config import RetentionConfig
from nsrl.runs.lock import LOCK, alone_in, locked
from nsrl.runs.settings import Config, load, read_yaml, to_yaml
from nsrl.versions import RUN

RUNS = Path("runs")
#: Characters of a name in a folder's; file systems take 255 bytes with all that is added.
LONGEST = 120


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run's folder; nothing is there until `made`.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The fully resolved configuration."""
        return self.path / "config.yaml"

    @property
    def agent(self) -> Path:
        """The resulting agent, a stock SB3 zip (statistics, if any, in vecnormalize.pkl beside it)."""
        return self.path / "agent.zip"

    @property
    def pretrained(self) -> Path:
        """The agent that fine-tuning started from, so that the folder says it all."""
        return self.path / "pretrained" / "agent.zip"

    @property
    def buffer(self) -> Path:
        """The retention buffer."""
        return self.path / "retention.npz"

    @property
    def metrics(self) -> Path:
        """The results; it is written last, so that a run is finished when it is there."""
        return self.path / "metrics.json"

    @property
    def history(self) -> Path:
        """What was measured during training, one JSON object a line."""
        return self.path / "history.jsonl"

    @property
    def report(self) -> Path:
        """The report, Markdown."""
        return self.path / "report.md"

    @property
    def figure(self) -> Path:
        """The learning curves."""
        return self.path / "curves.png"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard events."""
        return self.path / "tb"

    @property
    def checkpoint(self) -> Path:
        """What an interrupted run continues from."""
        return self.path / "checkpoint.zip"

    @property
    def best(self) -> Path:
        """Weights of the best policy so far; gone when the run is finished."""
        return self.path / "best.pt"

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.metrics.is_file()

    @contextmanager
    def made(self, worth_keeping: Path | None = None) -> Iterator[None]:
        """Make the folder, and be alone in it; enter it when everything else has been validated.

        Where the block fails before `worth_keeping` is there (a full disk), the folder is as it was.

        Args:
            worth_keeping: a file of the folder; None is `config`, from which on a run can be resumed.

        Raises:
            NsrlError: the folder has been taken meanwhile, or cannot be made.
        """
        check_free(self.path)
        kept = self.config if worth_keeping is None else worth_keeping
        with self._room_asked_for(), alone_in(self.path):
            check_free(self.path)
            self._clear()
            try:
                yield
            except BaseException:
                if not kept.is_file():
                    self._clear()
                raise

    @contextmanager
    def continued(self) -> Iterator[None]:
        """Be alone in the folder of a run that is there already.

        Raises:
            NsrlError: another process is at it, or nothing can be written there.
        """
        with self._room_asked_for(), locked(self.path):
            remove_temporaries(self.path)
            yield

    @contextmanager
    def _room_asked_for(self) -> Iterator[None]:
        """Say in one sentence that the disk is full, and how to go on."""
        try:
            with _full_disk_left_to_us():
                yield
        except NoRoom as error:
            reason = str(error).removesuffix(ELSEWHERE)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            reason = str(unwritable(error.filename or f"into {self.path}", error))
        else:
            return
        if self.config.is_file() and not self.finished:
            raise NsrlError(f"{reason}; what was written before is kept: make room and go on with --resume {self.path}")
        raise NsrlError(f"{reason}{ELSEWHERE}")

    def _clear(self) -> None:
        """Remove what a run that never began has left: what is written before its configuration."""
        remove_temporaries(self.path)
        shutil.rmtree(self.pretrained.parent, ignore_errors=True)
        for path in (self.buffer, self.path / STAMP, self.config, self.metrics):
            with suppress(OSError):
                path.unlink()

    def write_config(self, config: Any) -> None:
        """Write the format and the configuration, the latter last: a folder that has one can be resumed.

        Raises:
            NsrlError: they cannot be written.
        """
        write_stamp(self.path, RUN)
        write_text(self.config, to_yaml(config))

    def read_config(self, config: type[Config]) -> Config:
        """The configuration of the run that lives here.

        Raises:
            NsrlError: no run here, one of a newer nsrl (the sentence says which), or a damaged configuration.
        """
        check_stamp(self.path, RUN)
        if not self.config.is_file():
            raise NsrlError(f"{self.path} is no run folder: it has no config.yaml; give the one that was printed")
        found: Any = load(config, self.config)
        retention = getattr(found, "retention", None)
        if isinstance(retention, RetentionConfig) and "opening" not in (read_yaml(self.config).get("retention") or {}):
            # a run writes every key that it knows: this one began when policies were not opened, and goes on so
            return replace(found, retention=replace(retention, opening="off"))
        return found

    def read_metrics(self) -> dict[str, Any]:
        """The results of a finished run.

        Raises:
            NsrlError: there are none, they are damaged, or of a newer nsrl.
        """
        check_stamp(self.path, RUN)
        return read_results(self.metrics, f"{self.path} holds no finished run: it has no readable metrics.json")


@contextmanager
def _full_disk_left_to_us() -> Iterator[None]:
    """That the disk is full is not also told by the thread that writes TensorBoard's events.

    It hands its error to whoever writes the next event, besides having its own traceback printed.
    """
    previous = threading.excepthook

    def tell(arguments: threading.ExceptHookArgs) -> None:
        if not isinstance(arguments.exc_value, OSError) or arguments.exc_value.errno not in NO_ROOM:
            previous(arguments)

    threading.excepthook = tell
    try:
        yield
    finally:
        threading.excepthook = previous


def choose_folder(command: str, name: str, out: str | os.PathLike[str] | None) -> RunFolder:
    """The folder that a run will have: `out`, or runs/COMMAND-NAME-TIME; it is not made yet.

    Raises:
        NsrlError: `out` holds something already, or is a file.
    """
    if out is not None:
        folder = given_path(out)
        check_free(folder)
        return RunFolder(folder)
    stem = f"{command}-{slug(name)}-{datetime.now():%Y%m%d-%H%M%S}"
    candidates = (RUNS / (stem if n == 1 else f"{stem}-{n}") for n in range(1, 1000))
    return RunFolder(next(path for path in candidates if not path.exists()))


def check_free(folder: Path) -> None:
    """Raise NsrlError unless `folder` is missing or empty."""
    try:
        if folder.is_dir():
            if not is_unused(folder):
                hint = f", or continue that run with --resume {folder}" if (folder / "config.yaml").is_file() else ""
                raise NsrlError(f"the output folder {folder} is in use; choose another --out{hint}")
        elif folder.exists():
            raise NsrlError(f"the output folder {folder} is a file; choose another --out")
    except OSError as error:
        raise NsrlError(
            f"cannot look into the output folder {shown(str(folder), 200)}: {error.strerror or error}; "
            "choose another --out"
        ) from error


def is_unused(folder: Path) -> bool:
    """Whether a folder is empty, or holds only what a run that was killed before it began has left beside its lock."""
    names = {path.name for path in folder.iterdir() if not TEMPORARY.fullmatch(path.name)}
    return not names or (LOCK in names and names <= {LOCK, STAMP, "pretrained", "retention.npz"})


def slug(name: str) -> str:
    """A name fit for a folder: nsrl/CartPole-v0 becomes CartPole-v0."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name.rpartition("/")[2])[:LONGEST].strip("-.") or "run"
