"""TensorBoard for fine-tuning: curves that join after a resume, and old and new return on one chart."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import KVWriter, Logger, TensorBoardOutputFormat, make_output_format
from torch.utils.tensorboard import SummaryWriter

from nsrl.errors import NsrlError
from nsrl.files import unwritable

FORMATS = ("stdout", "log", "json", "csv", "tensorboard")

#: Charts by category; the entries are regular expressions of tags, as the custom-scalars plugin reads them.
LAYOUT: dict[str, dict[str, list[Any]]] = {
    "tasks": {
        "return: old tasks and new task": ["Multiline", [r"^retain/.+/return_mean$", r"^eval/mean_reward$"]],
    },
    "retention": {
        "KL on the buffer: mean, held out, budget": [
            "Multiline",
            [r"^retain/kl_mean$", r"^retain/kl_heldout$", r"^retain/kl_budget$"],
        ],
        "agreement": ["Multiline", [r"^retain/agreement$"]],
    },
    "null space": {
        "effective dimension and rank": ["Multiline", [r"^nullspace/effective_dim$", r"^nullspace/rank$"]],
        "share of the update kept": ["Multiline", [r"^nullspace/update_kept$"]],
    },
}


class RetentionTensorBoard(TensorBoardOutputFormat):
    """SB3's TensorBoard output, with the chart layout, that can go on where a checkpoint was taken.

    Args:
        folder: where the event file goes.
        purge_step: points at or after this step that earlier event files in the folder hold are hidden; for a
            run resumed from a checkpoint at step T give T + 1, since the points at T were written before it.
    """

    def __init__(self, folder: str | os.PathLike[str], purge_step: int | None = None):
        if purge_step is None and not any(Path(folder).glob("events.out.tfevents.*")):
            # TensorBoard takes the first session mark in a folder for its beginning and purges only at later ones,
            # so that without this the mark of a resumed run would purge nothing
            purge_step = 0
        # not super().__init__, which would open a writer without purge_step
        self.writer = SummaryWriter(log_dir=os.fspath(folder), purge_step=purge_step)
        self._is_closed = False
        self.writer.add_custom_scalars(LAYOUT)
        self.writer.flush()


def open_logger(
    folder: str | os.PathLike[str],
    formats: Sequence[str] = ("tensorboard",),
    purge_step: int | None = None,
) -> Logger:
    """A logger for `model.set_logger`.

    Args:
        folder: where files go; made if missing.
        formats: of "stdout", "log", "json", "csv", "tensorboard".
        purge_step: for a resumed run, as in `RetentionTensorBoard`; its text files get a name of their own
            ("progress_from_STEP.csv"), since SB3 would overwrite those of the interrupted run.

    Raises:
        NsrlError: unknown format, or a folder that cannot be written.
    """
    suffix = "" if purge_step is None else f"_from_{purge_step}"
    outputs: list[KVWriter] = []
    for name in formats:
        if name not in FORMATS:
            raise NsrlError(f"unknown log format {name!r}; known: {', '.join(FORMATS)}")
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            if name == "tensorboard":
                outputs.append(RetentionTensorBoard(folder, purge_step))
            else:
                outputs.append(make_output_format(name, os.fspath(folder), suffix))
        except OSError as error:
            raise unwritable(f"logs into {folder}", error) from error
    return Logger(os.fspath(folder), outputs)


def lay_out(logger: Logger) -> None:
    """Add the chart layout to TensorBoard outputs of SB3's own making, as `tensorboard_log=` opens them."""
    for output in logger.output_formats:
        if isinstance(output, TensorBoardOutputFormat) and not isinstance(output, RetentionTensorBoard):
            output.writer.add_custom_scalars(LAYOUT)


def is_pending(logger: Logger, tag: str) -> bool:
    """Whether a value has been recorded under `tag` that TensorBoard has not got yet."""
    return tag in logger.name_to_value and "tensorboard" not in logger.name_to_excluded.get(tag, ())


def write_points(logger: Logger, step: int) -> None:
    """Give TensorBoard all that is pending, at `step`; the other outputs get it with the next dump, as ever.

    SB3 dumps before it trains, so that what `train()` records would be stamped one rollout late, and that of
    the last update never be written.
    """
    if not any(is_pending(logger, tag) for tag in logger.name_to_value):
        return
    for output in logger.output_formats:
        if isinstance(output, TensorBoardOutputFormat):
            output.write(dict(logger.name_to_value), dict(logger.name_to_excluded), step)
    for tag in logger.name_to_value:
        if is_pending(logger, tag):
            logger.name_to_excluded[tag] = (*logger.name_to_excluded.get(tag, ()), "tensorboard")
