"""One training run inside its folder: callbacks, checkpoints, a history on disk, and a clean end when interrupted."""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from nsrl.errors import NsrlError
from nsrl.files import NO_ROOM, append_line, read_lines, write_lines
from nsrl.rl.parallel.agreement import shared_by
from nsrl.rl.parallel.ranks import ProcessLost
from nsrl.rl.playing.evaluation import Returns
from nsrl.rl.training.callbacks import TaskEvaluation
from nsrl.rl.training.checkpoint import Checkpoint, remaining, restore
from nsrl.rl.training.interruption import graceful_interrupts
from nsrl.rl.training.progress import FineTuningProgress
from nsrl.rl.training.refresh import BufferRefresh
from nsrl.rl.training.selection import Selection
from nsrl.rl.training.tensorboard import open_logger
from nsrl.runs.config import FinetuneConfig, PretrainConfig
from nsrl.runs.folder import RunFolder

#: First seed of the evaluations before and after, which share no episode with those during training.
FINAL_SEED = 20_000


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        folder: where it lies.
        metrics: the content of its metrics.json.
    """

    folder: RunFolder
    metrics: dict[str, Any]


class Interrupted(Exception):
    """A run was stopped by a signal and can be continued.

    Attributes:
        folder: the run's folder.
        exit_status: what a shell expects, 128 + signal.
    """

    def __init__(self, folder: Path, exit_status: int):
        super().__init__(f"interrupted; go on with --resume {folder}")
        self.folder = folder
        self.exit_status = exit_status


class RunHistory(BaseCallback):
    """Appends what is measured to history.jsonl: the KL after every update, the returns at every evaluation.

    Put it behind `TaskEvaluation` in the list of callbacks.

    Args:
        evaluation: whose rows are taken.
        path: the file.
    """

    def __init__(self, evaluation: TaskEvaluation, path: Path):
        super().__init__()
        self.evaluation = evaluation
        self.path = path
        self._last = -1

    def _on_training_start(self) -> None:
        kept = [row for row in read_lines(self.path) if row["timesteps"] <= self.model.num_timesteps]
        write_lines(self.path, kept)
        self._last = kept[-1]["timesteps"] if kept else -1
        self._append()  # the policy as it came; an opening takes timesteps before the first roll-out

    def _on_rollout_start(self) -> None:
        self._append()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        if not self.evaluation.skip_end():
            self._append()

    def _append(self) -> None:
        if self.model.num_timesteps == self._last:
            return
        row: dict[str, Any] = {"timesteps": int(self.model.num_timesteps)}
        retention = getattr(self.model, "retention", None)
        if retention is not None:
            row |= {key: getattr(retention.last, key) for key in ("kl_mean", "kl_heldout", "agreement")}
            row |= {f"kl/{task}": kl for task, kl in retention.last.kl_by_task.items()}
        evaluated = self.evaluation.history[-1] if self.evaluation.history else None
        if evaluated is not None and evaluated["timesteps"] == row["timesteps"]:
            row |= _returns(evaluated)
        append_line(self.path, row)
        self._last = row["timesteps"]


def _returns(evaluated: dict[str, Any]) -> dict[str, float | None]:
    """Returns of the old and the new task; those of a sequence, where no task is the new one, by their names."""
    old = evaluated["old_returns"]
    if evaluated["new_return"] is None:
        return {f"return/{task}": value for task, value in old.items()}
    return {"return/old": next(iter(old.values()), None), "return/new": evaluated["new_return"]}


def use_one_thread() -> None:
    """The fastest setting for small policies, and it leaves the other cores to other runs."""
    torch.set_num_threads(1)


def train(
    model: OnPolicyAlgorithm,
    folder: RunFolder,
    evaluation: TaskEvaluation,
    config: PretrainConfig | FinetuneConfig,
    *,
    resume: bool,
    progress: FineTuningProgress | None,
    selection: Selection | None = None,
    refresh: BufferRefresh | None = None,
) -> float:
    """Train to the configuration's `total_timesteps`, from the checkpoint when resuming.

    A model whose `num_timesteps` is not zero goes on counting, in the same TensorBoard curves: a later task of a
    sequence.

    Returns:
        Wall time of training without evaluations, over all sessions of the run, in seconds.

    Raises:
        Interrupted: a signal came; the checkpoint has been written.
        Exception: whatever an environment or a callback raises, when the checkpoint has been written.
        NsrlError: the checkpoint is damaged or does not fit, or is missing though training had gone on.
    """
    purge_step = model.num_timesteps + 1 if model.num_timesteps else None
    if resume and not folder.checkpoint.exists():
        check_nothing_lost(folder, model.num_timesteps)
    elif resume:
        restored = restore(folder.checkpoint, model)
        evaluation.history[:] = restored["history"]
        purge_step = restored["purge_step"]
    left = remaining(model, config.total_timesteps)
    if left > 0:
        model.set_logger(open_logger(folder.tensorboard, ("tensorboard",), purge_step))
        history = RunHistory(evaluation, folder.history)
        checkpoint = Checkpoint(folder.checkpoint, config.checkpoint_every, evaluation)
        with graceful_interrupts() as interruption:
            interruption.share(shared_by(model))
            evaluation.skip_end = interruption.requested
            shown = [] if progress is None else [progress]
            chosen = [] if selection is None else [selection]
            first = [] if refresh is None else [refresh]  # what is measured and saved is behind it
            try:
                model.learn(
                    left,
                    callback=[*first, evaluation, *chosen, history, checkpoint, *shown, interruption],
                    reset_num_timesteps=purge_step is None,
                )
            except (KeyboardInterrupt, SystemExit) as error:  # a second signal
                raise Interrupted(folder.path, interruption.exit_status or 130) from error
            except ProcessLost:
                _save_what_is_learnt(checkpoint, folder)
                raise
            except NsrlError:
                raise
            except Exception as error:  # of the environment, or of a callback: whoever wrote it needs its traceback
                if getattr(error, "errno", None) not in NO_ROOM:
                    _save_what_is_learnt(checkpoint, folder)
                raise
            finally:
                if progress is not None:
                    progress.close()
                model.logger.close()
        if interruption.requested():
            raise Interrupted(folder.path, interruption.exit_status)
    return float(evaluation.history[-1]["seconds"]) if evaluation.history else 0.0


def _save_what_is_learnt(checkpoint: Checkpoint, folder: RunFolder) -> None:
    """Write the state before a rollout that has failed, if it is one; in the middle of an update there is none."""
    with suppress(NsrlError):
        if checkpoint.collecting:
            checkpoint.write()
        if folder.checkpoint.is_file():
            warnings.warn(
                f"the run is saved as it was before the error; once that is mended, go on with --resume {folder.path}",
                stacklevel=2,
            )


def check_nothing_lost(folder: RunFolder, start: int) -> None:
    """Raise NsrlError where there is no checkpoint and the history knows of training.

    Args:
        folder: of the run.
        start: timestep at which its training began.
    """
    last = max((row["timesteps"] for row in read_lines(folder.history)), default=start)
    if last > start and not folder.path.is_dir():  # of a sequence whose later tasks were removed
        warnings.warn(f"{folder.path} is missing: what was learnt there is learnt again", stacklevel=3)
    elif last > start:
        raise NsrlError(
            f"{folder.checkpoint} is missing, but {folder.history.name} goes on to step {last}: put the checkpoint "
            "back, or start a new run"
        )


def tell_beginning(folder: RunFolder) -> None:
    """Say so where a resumed run begins anew, for want of a checkpoint.

    Raises:
        NsrlError: its training had gone on.
    """
    if not folder.checkpoint.exists():
        check_nothing_lost(folder, 0)
        warnings.warn(f"{folder.path} has no checkpoint yet: its training begins at step 0", stacklevel=3)


def check_resumable(folder: RunFolder) -> None:
    """Raise NsrlError for a run that is finished."""
    if folder.finished:
        raise NsrlError(f"the run in {folder.path} is finished; its results are in {folder.report}")


def check_trusted(folder: RunFolder, config: Any, trust: bool) -> None:
    """Raise NsrlError where a run unpickles its agent and only the run's own folder says that it may."""
    if config.trust and not trust:
        raise NsrlError(
            f"the run in {folder.path} unpickles its agent, which can run any code in the folder; if you trust whoever "
            "made it, resume with trust=True (--trust true)"
        )


def describe_returns(found: Returns) -> dict[str, Any]:
    """Returns as plain JSON."""
    return {"mean": found.mean, "std": found.std, "minimum": found.minimum, "episodes": len(found.returns)}


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = perf_counter()

    def read(self) -> float:
        """Seconds since the start."""
        return perf_counter() - self._start
