"""The guard as a callback of transformers' Trainer, and so of trl's SFTTrainer, GRPOTrainer and the others.

    trainer = SFTTrainer(model, ..., callbacks=[GuardCallback(preserve=loader, kl_budget=0.02)])
    trainer.train()

The trainer runs as it is. The callback makes the guard once the optimizer is there, has the budget enforced ahead of
every checkpoint, every evaluation and the end, lays the guard's state beside each checkpoint, and takes it up again
where training is resumed: the reference stays that of the first run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nsrl.editing.guard import ModuleGuard, protect_module
from nsrl.errors import NsrlError
from nsrl.files import written_atomically
from nsrl.reading.limits import Unreadable, opened
from nsrl.reading.tensors import read_tensors

if TYPE_CHECKING:
    from transformers import TrainerCallback
else:
    try:
        from transformers import TrainerCallback
    except ImportError:  # the face of the room can be asked without it
        TrainerCallback = object

#: Of the guard's state in a checkpoint.
NAME = "nsrl_guard.pt"


class GuardCallback(TrainerCallback):
    """Keeps a model inside a KL budget while a Trainer trains it.

    Args:
        preserve, kl_budget, options: as for `protect_module`.
        resume_from: folder of the checkpoint that training is resumed from; default the one of the trainer's step in
            its output folder.

    Attributes:
        guard: once training has begun.

    Raises:
        NsrlError: transformers is not installed.
    """

    def __init__(
        self, preserve: Any, kl_budget: float = 0.02, *, resume_from: str | Path | None = None, **options: Any
    ):
        if TrainerCallback is object:
            raise NsrlError("a callback of a Trainer needs the package transformers; install nsrl[llm]")
        self.preserve, self.kl_budget, self.options = preserve, kl_budget, options
        self.resume_from = None if resume_from is None else Path(resume_from)
        self.guard: ModuleGuard | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the guard; with the state of before where training is resumed."""
        resumed = self._resumed(args, state) if state.global_step else None
        self.guard = protect_module(
            kwargs["model"], kwargs["optimizer"], self.preserve, self.kl_budget, resume=resumed, **self.options
        )
        if getattr(args, "world_size", 1) > 1:  # the trainer shows the model without its wrapper
            self.guard.replicas.group = torch.distributed.group.WORLD

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Enforce where a checkpoint or an evaluation follows."""
        self._enforce_ahead_of(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Enforce where a checkpoint or an evaluation follows."""
        self._enforce_ahead_of(control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lay the guard's state beside the checkpoint."""
        if self.guard is not None and state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if folder.is_dir():
                with written_atomically(folder / NAME) as temporary:
                    torch.save(self.guard.state_dict(), temporary)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Add the latest measurement to what is logged."""
        if self.guard is None or logs is None:
            return
        report = self.guard.report()
        found = {
            "retain/kl_mean": report.kl_mean,
            "retain/agreement": report.agreement,
            "nullspace/multiplier": report.multiplier,
            "nullspace/overhead_fraction": report.overhead_fraction,
        }
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Enforce for the last time."""
        if self.guard is not None:
            self.guard.finish()

    def _enforce_ahead_of(self, control: Any) -> None:
        if self.guard is not None and (control.should_save or control.should_evaluate):
            self.guard.enforce()

    def _resumed(self, args: Any, state: Any) -> dict[str, Any]:
        folder = self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}"
        path = folder / NAME
        if not path.is_file():
            raise NsrlError(
                f"training is resumed at step {state.global_step}, but {path} is not there, without which the "
                "reference would be what was resumed from; resume a checkpoint that was made with this "
                "callback, or give its folder as resume_from"
            )
        try:
            with opened(path) as content:
                return read_tensors(content)
        except (OSError, Unreadable) as error:
            raise NsrlError(f"{path} cannot be read: {error}; resume an earlier checkpoint") from error
