"""The progress line of a sequence of tasks: how far all of it is, and what each task's return is."""

from __future__ import annotations

from collections.abc import Sequence

from nsrl.rl.training.callbacks import TaskEvaluation
from nsrl.rl.training.progress import FineTuningProgress
from nsrl.runs.sequences.stages import budget_share


class SequenceProgress(FineTuningProgress):
    """A bar over all tasks of a sequence, while one of them is learnt.

    Args:
        evaluation: whose latest returns are shown.
        labels: names of the tasks.
        number: which one is learnt, from 0.
        steps: of the whole sequence.
        budgets: of the tasks before it, by name.
    """

    def __init__(self, evaluation: TaskEvaluation, labels: Sequence[str], number: int, steps: int,
                 budgets: dict[str, float]):  # fmt: skip
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
