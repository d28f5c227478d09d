"""The folder of one run: what lies in it, under which name, and who may write there."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from nsrl.errors import NsrlError
from nsrl.files import check_stamp, write_stamp, write_text
from nsrl.reading.documents import read_results
from nsrl.runs.settings import Config, load, to_yaml
from nsrl.versions import RUN

RUNS = Path("runs")


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run's folder; nothing is there until `prepare`.

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
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.metrics.is_file()

    def prepare(self) -> None:
        """Make the folder; call it when everything else has been validated.

        Raises:
            NsrlError: the folder has been taken meanwhile, or cannot be made.
        """
        check_free(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise NsrlError(
                f"cannot make the output folder {self.path}: {error.strerror or error}; choose another --out"
            ) from error

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
        return load(config, self.config)

    def read_metrics(self) -> dict[str, Any]:
        """The results of a finished run.

        Raises:
            NsrlError: there are none, they are damaged, or of a newer nsrl.
        """
        check_stamp(self.path, RUN)
        return read_results(self.metrics, f"{self.path} holds no finished run: it has no readable metrics.json")


def choose_folder(command: str, name: str, out: str | os.PathLike[str] | None) -> RunFolder:
    """The folder that a run will have: `out`, or runs/COMMAND-NAME-TIME; it is not made yet.

    Raises:
        NsrlError: `out` holds something already, or is a file.
    """
    if out is not None:
        folder = Path(out).expanduser()
        check_free(folder)
        return RunFolder(folder)
    stem = f"{command}-{slug(name)}-{datetime.now():%Y%m%d-%H%M%S}"
    candidates = (RUNS / (stem if n == 1 else f"{stem}-{n}") for n in range(1, 1000))
    return RunFolder(next(path for path in candidates if not path.exists()))


def check_free(folder: Path) -> None:
    """Raise NsrlError unless `folder` is missing or empty."""
    if folder.is_dir():
        if any(folder.iterdir()):
            hint = f", or continue that run with --resume {folder}" if (folder / "config.yaml").is_file() else ""
            raise NsrlError(f"the output folder {folder} is in use; choose another --out{hint}")
    elif folder.exists():
        raise NsrlError(f"the output folder {folder} is a file; choose another --out")


def slug(name: str) -> str:
    """A name fit for a folder: nsrl/CartPole-v0 becomes CartPole-v0."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name.rpartition("/")[2]).strip("-.") or "run"
