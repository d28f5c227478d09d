"""What a run leaves behind: weights and results of every finished task, TensorBoard events, the accuracy matrix."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import yaml
from torch import nn

from nsrl.continual.config import ContinualConfig
from nsrl.errors import NsrlError
from nsrl.files import (
    ELSEWHERE,
    check_stamp,
    unwritable,
    write_json,
    write_stamp,
    write_text,
    written_atomically,
)
from nsrl.reading.checksums import check_checksum, checksum
from nsrl.reading.limits import Unreadable, opened, shown
from nsrl.reading.tensors import read_tensors
from nsrl.reading.values import finite, items, mapping, whole
from nsrl.versions import RUN, TASK, VERSION

CONFIG, METRICS, MODEL, MATRIX = "config.yaml", "metrics.json", "model.pt", "accuracy_matrix.png"
CHECKSUM = "checksum"
CLOCKS = ("train_seconds", "train_cpu_seconds")


class Records:
    """The folder of one run; without a folder nothing is written.

    Args:
        folder: of the run.
        config: of the run; TensorBoard counts epochs over all tasks.
    """

    def __init__(self, folder: Path | None, config: ContinualConfig):
        self.folder = folder
        self.config = config
        self.epochs = config.training.epochs
        self._names: list[str] = []
        self._writer: Any = None

    def __enter__(self) -> Records:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()

    def read(self) -> list[dict[str, Any]]:
        """The entries of the tasks that are finished already.

        Raises:
            NsrlError: a damaged file, one that is missing before others, or one of a newer nsrl; the sentence says
                which.
        """
        if self.folder is not None:
            check_stamp(self.folder, RUN)
        entries: list[dict[str, Any]] = []
        if self.folder is None:
            return entries
        numbers = {int(path.stem[4:]) for path in self.folder.glob("task*.pt") if path.stem[4:].isdecimal()}
        missing = next((number for number in range(max(numbers, default=-1)) if number not in numbers), None)
        if missing is not None:
            raise NsrlError(
                f"{self._task_file(missing)} is missing, but the task after it is there: put it back, or remove all "
                f"from task{missing + 1}.pt on, and these tasks are learnt again"
            )
        return [self._load(number)["entry"] for number in sorted(numbers)]

    def state(self, index: int) -> dict[str, Any]:
        """The end of a finished task's training: "weights" of the model, "progress" of the strategy."""
        return self._load(index)["state"]

    def begin(self, names: Sequence[str], done: int) -> None:
        """Write config.yaml, open TensorBoard.

        Args:
            names: of the tasks.
            done: tasks that are finished already; what an interrupted task wrote is hidden.

        Raises:
            NsrlError: they cannot be written.
        """
        self._names = list(names)
        if self.folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            text = yaml.safe_dump(asdict(self.config), sort_keys=False)
            write_stamp(self.folder, RUN)
            write_text(self.folder / CONFIG, text)
            try:
                self._writer = SummaryWriter(str(self.folder / "tb"), purge_step=done * self.epochs + 1 if done else 0)
            except OSError as error:
                raise unwritable(f"logs into {self.folder / 'tb'}", error) from error

    def write_loss(self, epoch: int, loss: float) -> None:
        """The mean training loss of an epoch."""
        if self._writer is not None:
            self._writer.add_scalar("train/loss", loss, epoch)

    def write_task(self, index: int, history: Sequence[dict[str, Any]], state: dict[str, Any]) -> None:
        """A finished task: its scalars and figure, and the state that a resumed run goes on from."""
        if self.folder is None:
            return
        entry, step = history[index], (index + 1) * self.epochs
        learnt = entry["scores"][: index + 1]
        scalars = {
            **{
                f"accuracy/{name.replace(' ', '_')}": score
                for name, score in zip(self._names, entry["scores"], strict=True)
            },
            "continual/acc": sum(learnt) / len(learnt),
            "continual/train_seconds": sum(past["train_seconds"] for past in history),
            "continual/memory_bytes": entry["memory_bytes"],
            **{f"continual/{key}": value for key, value in entry["diagnostics"].items()},
        }
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)
        figure = draw_matrix([past["scores"] for past in history], self._names)
        self._writer.add_figure("continual/accuracy_matrix", figure, step)
        self._writer.flush()
        content = {"format": TASK.newest, "nsrl": VERSION, "entry": entry, "state": state}
        _save(self._task_file(index), {**content, CHECKSUM: checksum(content)})

    def finish(self, metrics: dict[str, Any], model: nn.Module) -> None:
        """Write model.pt, the matrix as a figure and, last, metrics.json; what only a resumed run needs is removed."""
        if self.folder is None:
            return
        _save(self.folder / MODEL, model.state_dict())
        figure = draw_matrix(metrics["matrix"], self._names)
        with written_atomically(self.folder / MATRIX, ELSEWHERE) as path:
            figure.savefig(path, dpi=140, format="png")
        write_json(self.folder / METRICS, metrics)
        for index in range(len(self._names)):
            self._task_file(index).unlink(missing_ok=True)

    def _task_file(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"task{index}.pt"

    def _load(self, index: int) -> dict[str, Any]:
        path = self._task_file(index)
        try:
            with opened(path) as file:
                content = mapping(read_tensors(file), "it")
            TASK.check(path, whole(content.get("format", 1), "its format", 1), content.get("nsrl"))
            mapping(content, "it", ["entry", "state"], ["format", "nsrl", CHECKSUM])
            if CHECKSUM in content:  # the first ones have none
                expected = content.pop(CHECKSUM)
                check_checksum(content, expected)
            _check_entry(content["entry"])
            mapping(content["state"], "state", ["weights", "progress"], ())
            mapping(content["state"]["progress"], "progress")
        except (OSError, Unreadable) as error:
            raise NsrlError(f"{path} is damaged ({error}); remove it, and this task is learnt again") from error
        return content


def _save(path: Path, content: Any) -> None:
    # Not into the file: torch.save tells of a full disk by an error that does not say so.
    stream = io.BytesIO()
    torch.save(content, stream)
    with written_atomically(path, ELSEWHERE) as temporary:
        temporary.write_bytes(stream.getbuffer())


def _check_entry(entry: Any) -> None:
    """Raise Unreadable unless this is what a finished task's results look like."""
    mapping(entry, "entry", ["task", "scores", "losses", "diagnostics", "memory_bytes", *CLOCKS])
    for key in ("scores", "losses"):
        for value in items(entry[key], key):
            if type(value) not in (int, float):
                raise Unreadable(f"{key} hold {shown(value)}, no number")
    for key, value in mapping(entry["diagnostics"], "diagnostics").items():
        if type(value) is not float:
            raise Unreadable(f"{shown(key)} is {shown(value)}, not a number")
    # the first ones do not have the worst
    for key, value in mapping(entry.get("worst", {}), "worst").items():
        if type(value) is not float:
            raise Unreadable(f"{shown(key)} is {shown(value)}, not a number")
    for key in CLOCKS:
        finite(entry[key], key, 0.0)
    whole(entry["memory_bytes"], "memory_bytes")


def draw_matrix(matrix: Sequence[Sequence[float]], names: Sequence[str]) -> Any:
    """The accuracy matrix as a figure: a row for every task learnt so far, a column for every task.

    Args:
        matrix: R[trained, evaluated].
        names: of the tasks.
    """
    from matplotlib.figure import Figure

    count = len(names)
    side = 2.2 + 0.42 * count
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(list(matrix), vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
    if count <= 12:
        for row, scores in enumerate(matrix):
            for column, score in enumerate(scores):
                axes.text(
                    column,
                    row,
                    f"{100 * score:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if score < 0.6 else "black",
                )
    axes.set_xticks(range(count), names, rotation=45, ha="right", fontsize=7)
    axes.set_yticks(range(len(matrix)), names[: len(matrix)], fontsize=7)
    axes.set_xlabel("evaluated on")
    axes.set_ylabel("after learning")
    figure.colorbar(image, ax=axes, label="score")
    return figure
