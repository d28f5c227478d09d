"""The folder of a sequence of tasks: one folder a task inside it, and what is read from their measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsrl.files import read_lines
from nsrl.rl.budget.config import accepted
from nsrl.rl.training.callbacks import TaskEvaluation
from nsrl.rl.training.progress import FineTuningProgress
from nsrl.runs.folder import RunFolder
from nsrl.runs.sequences.config import SequenceConfig


@dataclass(frozen=True)
class StageFolder(RunFolder):
    """What one task of a sequence leaves behind: its agent, its states, and metrics.json when it is complete.

    Events and history are those of the whole sequence, so that their curves go through all tasks.
    """

    @property
    def tensorboard(self) -> Path:
        """TensorBoard events of the sequence."""
        return self.path.parents[1] / "tb"

    @property
    def history(self) -> Path:
        """What was measured during the sequence."""
        return self.path.parents[1] / "history.jsonl"


def stage_folders(folder: RunFolder, config: SequenceConfig) -> list[StageFolder]:
    """The folder of each task, in order."""
    return [
        StageFolder(folder.path / "tasks" / f"{number}-{label}") for number, label in enumerate(config.labels, start=1)
    ]


def reference_folder(folder: RunFolder, label: str) -> RunFolder:
    """Where a task is learnt alone."""
    return RunFolder(folder.path / "references" / label)


def read_curve(history: Path, budgets: Mapping[str, float]) -> dict[str, Any]:
    """What was evaluated during a sequence, as plain JSON.

    Args:
        history: the history.jsonl of the run.
        budgets: of all tasks, by name.

    Returns:
        `timesteps` of the evaluations, `returns` by task, and `share`: how much of its budget the task that has spent
        most of it had spent then.
    """
    rows = [row for row in read_lines(history) if f"return/{next(iter(budgets))}" in row]
    return {
        "timesteps": [row["timesteps"] for row in rows],
        "returns": {label: [row[f"return/{label}"] for row in rows] for label in budgets},
        "share": [budget_share(row, budgets) for row in rows],
    }


def largest_share(history: Path, budgets: Mapping[str, float]) -> float:
    """The largest share of its budget that any task had spent after any update; over 1 where a budget was broken."""
    return max((budget_share(row, budgets) for row in read_lines(history)), default=0.0)


def budget_share(row: Mapping[str, Any], budgets: Mapping[str, float]) -> float:
    """The largest KL / budget over the tasks of a row of history.jsonl; budget 0 counts as its tolerance."""
    spent = [row[f"kl/{label}"] / accepted(budget) for label, budget in budgets.items() if f"kl/{label}" in row]
    # The hard null space is for all tasks together, and a single one is not named then.
    return max(spent, default=(row.get("kl_mean") or 0.0) / accepted(max(budgets.values())))


def read_reference(path: RunFolder) -> tuple[list[int], list[float]]:
    """Steps and returns of a task that was learnt alone."""
    rows: Sequence[dict[str, Any]] = [row for row in read_lines(path.history) if row.get("return/new") is not None]
    return [row["timesteps"] for row in rows], [row["return/new"] for row in rows]


class SequenceProgress(FineTuningProgress):
    """A bar over all tasks of a sequence, while one of them is learnt.

    Args:
        evaluation: whose latest returns are shown.
        labels: names of the tasks.
        number: which one is learnt, from 0.
        steps: of the whole sequence.
        budgets: of the tasks before it, by name.
    """

    def __init__(
        self, evaluation: TaskEvaluation, labels: Sequence[str], number: int, steps: int, budgets: dict[str, float]
    ):
        super().__init__(evaluation, f"task {number + 1}/{len(labels)} {labels[number]}")
        self.steps = steps
        self.budgets = budgets

    def state(self) -> str:
        """The return of every task, and the largest share of its KL budget that one of them has spent."""
        parts = []
        if self.evaluation is not None and self.evaluation.history:
            values = self.evaluation.history[-1]["old_returns"].values()
            parts.append("returns " + "/".join(f"{value:.1f}" for value in values))
        retention = getattr(self.model, "retention", None)
        if retention is not None:
            row = {"kl_mean": retention.last.kl_mean}
            row |= {f"kl/{label}": kl for label, kl in retention.last.kl_by_task.items()}
            parts.append(f"KL {budget_share(row, self.budgets):.0%} of its budget")
        return "  ".join(parts)

    # The model counts to the end of its task; the time left is that of the sequence.

    def _draw(self) -> None:
        self._extend()
        if self._bar is not None:
            self._bar.update(self._task, total=self._total)
        super()._draw()

    def _print(self) -> None:
        self._extend()
        super()._print()

    def _extend(self) -> None:
        self._total = max(self.steps, self._total)
