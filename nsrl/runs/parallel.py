"""Fine-tuning as one run in several processes, as torchrun starts them: the first one writes, the others are silent.

    torchrun --nproc-per-node 2 --no-python nsrl finetune --config cartpole_swapped

All make the whole run (`nsrl.rl.parallel`); the others do so in a folder of their own that goes when they end.
"""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

from nsrl.errors import NsrlError
from nsrl.files import STAMP, given_path
from nsrl.rl.parallel.ranks import Ranks, together
from nsrl.runs.config import FinetuneConfig
from nsrl.runs.finetuning import finetune, resume_finetuning
from nsrl.runs.folder import RunFolder
from nsrl.runs.training import Interrupted, Outcome


def finetune_together(config: FinetuneConfig, *, progress: bool = False) -> Outcome | None:
    """As `finetune`, in every process that torchrun has started; `ppo.n_envs` environments in each.

    Args:
        config: everything about the run, the same in all; `total_timesteps` counts the steps of all.
        progress: as there, in the first process.

    Returns:
        The outcome in the first process, None in the others.

    Raises:
        NsrlError: as there; the processes do not find each other, do not compute the same, or one has ended.
        Interrupted: as there, in the first process; the others exit.
    """
    with together() as ranks:
        if ranks.number == 0:
            return finetune(config, progress=progress)
        with _silent(ranks) as folder:
            finetune(config, folder)
    return None


def resume_together(path: str | Path, *, trust: bool = False, progress: bool = False) -> Outcome | None:
    """As `resume_finetuning`, in every process that torchrun has started; only the first has to see the folder.

    Args:
        path: the folder.
        trust: as there.
        progress: as there, in the first process.

    Returns:
        The outcome in the first process, None in the others.

    Raises:
        NsrlError: as there, or as `finetune_together`.
        Interrupted: as there, in the first process; the others exit.
    """
    with together() as ranks:
        folder = RunFolder(given_path(path))
        content = ranks.gather_bytes(_packed(folder) if ranks.number == 0 else b"")[0]
        if ranks.number == 0:
            return resume_finetuning(folder.path, trust=trust, progress=progress)
        if not content:  # the first process says why
            raise SystemExit(2)
        with _silent(ranks) as copy:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                archive.extractall(copy)
            resume_finetuning(copy, trust=trust)
    return None


def _packed(folder: RunFolder) -> bytes:
    """What a run is resumed from, as a zip; nothing where there is no run."""
    wanted = [
        folder.path / STAMP,
        folder.config,
        folder.pretrained,
        folder.pretrained.with_name("vecnormalize.npz"),
        folder.buffer,
        folder.checkpoint,
        folder.history,
        folder.best,
    ]
    if not folder.config.is_file() or folder.finished:
        return b""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for file in wanted:
            if file.is_file():
                archive.write(file, file.relative_to(folder.path))
    return stream.getvalue()


@contextmanager
def _silent(ranks: Ranks) -> Iterator[Path]:
    """A folder that goes again; within the block nothing is said but what goes wrong, with the process's number.

    Raises:
        NsrlError: what the block raises.
        SystemExit: it was interrupted.
    """
    with (
        TemporaryDirectory(prefix="nsrl-") as folder,
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            yield Path(folder) / "run"
        except NsrlError as error:
            raise type(error)(f"process {ranks.number}: {error}") from error
        except Interrupted as stop:
            raise SystemExit(stop.exit_status) from stop
