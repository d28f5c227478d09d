"""Which of the policies of a run it hands on: the best one on the new task that has kept the old ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from nsrl.errors import NsrlError
from nsrl.files import written_atomically
from nsrl.reading.limits import Unreadable, about, opened
from nsrl.reading.tensors import read_tensors
from nsrl.reading.values import mapping
from nsrl.rl.training.callbacks import TaskEvaluation


def best_row(history: Sequence[Mapping[str, Any]], floor: float) -> int:
    """Number of the evaluation whose policy is to be handed on.

    Among those that lost no more than `floor` of any old task's first return, the one of the largest new return; of
    equals the last. The last of all where none has, or where there is no new task.

    Args:
        history: rows of `TaskEvaluation`, at least one.
        floor: share of the absolute value of the first return.
    """
    first = history[0]["old_returns"]

    def kept(row: Mapping[str, Any]) -> bool:
        return all(value >= first[task] - floor * abs(first[task]) for task, value in row["old_returns"].items())

    chosen = [number for number, row in enumerate(history) if row["new_return"] is not None and kept(row)]
    return max(chosen, key=lambda number: (history[number]["new_return"], number), default=len(history) - 1)


class Selection(BaseCallback):
    """Keeps the weights of the best evaluated policy in a file, and gives them back at the end.

    Policies wander: late in a run most of the gradient is noise, and the last policy is one draw of many. The choice is
    made by the returns of `TaskEvaluation`, whose episodes are not those that a run is judged by. Put it behind that in
    the list of callbacks.

    Args:
        evaluation: whose rows decide.
        path: of the weights, which a resumed run finds there.
        floor: largest share of an old return that may be lost.
    """

    def __init__(self, evaluation: TaskEvaluation, path: Path, floor: float = 0.01):
        super().__init__()
        self.evaluation = evaluation
        self.path = path
        self.floor = floor
        self._seen = 0

    def _on_training_start(self) -> None:
        self._seen = 0
        self._consider()

    def _on_rollout_start(self) -> None:
        self._consider()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        if not self.evaluation.skip_end():
            self._consider()

    def _consider(self) -> None:
        rows = self.evaluation.history
        if not rows or rows[-1]["timesteps"] != self.model.num_timesteps or len(rows) == self._seen:
            return
        self._seen = len(rows)
        if best_row(rows, self.floor) == len(rows) - 1:
            with written_atomically(self.path) as path:
                torch.save(self.model.policy.state_dict(), path)

    def give_back(self, model: Any) -> int:
        """Put the best weights into a model whose run is over, and remove their file.

        Raises:
            NsrlError: the file is damaged.

        Returns:
            The timesteps at which the policy had them; the model's own where it keeps those it has.
        """
        rows = self.evaluation.history
        chosen = best_row(rows, self.floor) if rows else -1
        found = int(model.num_timesteps)
        if rows and chosen != len(rows) - 1 and self.path.is_file():
            model.policy.load_state_dict(_weights(self.path))
            found = int(rows[chosen]["timesteps"])
        self.path.unlink(missing_ok=True)
        return found


def _weights(path: Path) -> dict[str, Tensor]:
    try:
        with opened(path) as file:
            return mapping(read_tensors(file), "it")
    except OSError as error:
        raise NsrlError(f"cannot read {path}: {error.strerror or error}") from error
    except Unreadable as error:
        raise NsrlError(f"{about(path, error)}; remove it, and the run hands on its last policy") from error
