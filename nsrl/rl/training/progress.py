"""One progress line for a fine-tuning run: how far, how long still, what is kept and what is learnt."""

from __future__ import annotations

import atexit
import sys
from time import perf_counter
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from stable_baselines3.common.callbacks import BaseCallback

from nsrl.rl.training.callbacks import TaskEvaluation

#: Seconds between redraws, and shares of the run between printed lines.
REDRAW = 0.2
SHARE = 0.1


class FineTuningProgress(BaseCallback):
    """A bar with the time left, old-task and new-task return, and KL against the budget, on stderr.

    Where stderr is no terminal it prints a line at the start, after every tenth of the run, and at the end.
    As a context manager it gives the terminal back whatever happens inside:

        with FineTuningProgress(evaluation) as progress:
            model.learn(total, callback=[evaluation, progress])

    Args:
        evaluation: whose latest returns are shown; None shows none.
        title: what the bar is called.
        console: where to; default stderr.
    """

    def __init__(
        self,
        evaluation: TaskEvaluation | None = None,
        title: str = "fine-tuning",
        console: Console | None = None,
    ):
        super().__init__()
        self.evaluation = evaluation
        self.title = title
        self.console = Console(stderr=True) if console is None else console
        self._bar: Progress | None = None
        self._opening = False

    def __enter__(self) -> FineTuningProgress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; harmless when there is nothing to close."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            atexit.unregister(self.close)

    def state(self) -> str:
        """Old and new return and KL / budget as they were last measured."""
        parts = []
        row = self.evaluation.history[-1] if self.evaluation is not None and self.evaluation.history else None
        if row is not None:
            if row["old_returns"]:
                parts.append("old " + "/".join(f"{value:.1f}" for value in row["old_returns"].values()))
            if row["new_return"] is not None:
                parts.append(f"new {row['new_return']:.1f}")
        retention = getattr(self.model, "retention", None)
        if retention is not None:
            parts.append(f"KL {retention.last.kl_mean:.2g}/{retention.config.kl_budget:g}")
            if retention.opening.pending:
                parts.append("opening")
        return "  ".join(parts)

    def _on_training_start(self) -> None:
        self._total = self.model._total_timesteps
        self._begun, self._started = self.model.num_timesteps, perf_counter()
        self._drawn = 0.0
        retention = getattr(self.model, "retention", None)
        self._opening = retention is not None and retention.opening.pending
        self._next = float(self._begun)
        if not self.console.is_terminal:
            self._print()
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
            console=self.console,
            redirect_stdout=sys.stdout.isatty(),  # piped tables belong to the pipe
        )
        # SB3 tells callbacks nothing of an exception, and a bar that is left running hides the cursor
        atexit.register(self.close)
        self._task = self._bar.add_task(self.title, total=self._total, completed=self._begun, state=self.state())
        self._bar.start()

    def _on_rollout_start(self) -> None:
        if not self._opening:
            return
        self._opening = False
        if self._bar is not None:
            self._draw()
        else:
            self._print()

    def _on_step(self) -> bool:
        now = perf_counter()
        if self._bar is not None:
            if now - self._drawn >= REDRAW:
                self._drawn = now
                self._draw()
        elif self.model.num_timesteps >= self._next:
            self._print()
        return True

    def _on_training_end(self) -> None:
        if self._bar is not None:
            self._draw()
            self.close()
        else:
            self._print()

    def _draw(self) -> None:
        assert self._bar is not None
        self._bar.update(self._task, completed=min(self.model.num_timesteps, self._total), state=self.state())

    def _print(self) -> None:
        steps, total = self.model.num_timesteps, self._total
        self._next = steps + max(SHARE * total, 1.0)
        share = min(steps / total, 1.0) if total else 1.0
        made, elapsed = steps - self._begun, perf_counter() - self._started
        left = f"  {_clock(elapsed * (total - steps) / made)} left" if 0 < made and steps < total else ""
        rate = f"  {made / elapsed:.0f} steps/s" if made and elapsed > 0.0 else ""
        line = f"{self.title} {share:4.0%}  {steps}/{total} steps{rate}{left}  {self.state()}".rstrip()
        # not through rich, which would break the line at 80 columns
        print(line, file=self.console.file, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
