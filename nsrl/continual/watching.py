"""What happens to learnt tasks while another one is learnt: the worst of it, not only where it ends."""

from __future__ import annotations

import math

from nsrl.continual.benchmarks import Benchmark
from nsrl.continual.scores import evaluate
from nsrl.continual.strategies.base import Strategy

#: Looks within a task, evenly spread over its steps, and test examples of every learnt task that are looked at.
LOOKS, EXAMPLES = 10, 1000


class Watch:
    """Looks at all learnt tasks while a task is learnt, ten times unless more are asked for; it moves nothing.

    Args:
        strategy: that learns.
        benchmark: its tasks.
        device: of the model.
    """

    def __init__(self, strategy: Strategy, benchmark: Benchmark, device: str = "cpu"):
        self._strategy, self._benchmark, self._device = strategy, benchmark, device
        self._learnt: list[float] = []
        self._worst: dict[str, float] = {}

    def learnt(self) -> None:
        """A task has just been learnt: its score now is what later ones are compared with."""
        self._learnt.append(self._scores(len(self._learnt) + 1)[-1])

    def begin(self) -> None:
        """A task begins."""
        self._worst = {}

    def look(self) -> None:
        """In the middle of a task."""
        if not self._learnt:
            return
        scores = self._scores(len(self._learnt))
        found = {
            "kl": max(self._strategy.moved()),
            "accuracy": -min(scores),
            "drop": max(then - now for then, now in zip(self._learnt, scores, strict=True)),
        }
        promised = self._strategy.promised_kl()
        if promised is not None:
            found["retained_kl"] = promised
        for key, value in found.items():
            # a model that has diverged is as far away as can be
            value = math.inf if math.isnan(value) else value
            self._worst[key] = max(value, self._worst.get(key, -math.inf))

    def worst(self) -> dict[str, float]:
        """The worst since the task began: {} in the first task.

        Returns:
            "kl": largest mean KL(then || now) of a learnt task, on inputs that are no part of any method. "accuracy":
            least score of a learnt task, and "drop", how far below that right after it was learnt one has come, on test
            examples. "retained_kl": largest KL on what a budget is held on, for strategies with one.
        """
        found = dict(self._worst)
        if "accuracy" in found:
            found["accuracy"] = -found["accuracy"]
        return found

    def _scores(self, count: int) -> list[float]:
        """Scores on the first tasks, on some test examples; a class counts from the moment its task is learnt."""
        tasks = [data.task for data in self._benchmark.tasks]
        seen = tasks[: len(self._learnt) + 1]
        recalled = self._strategy.recalled
        return evaluate(
            self._strategy.model, self._benchmark, "test", seen, self._device, recalled, first=count, examples=EXAMPLES
        )
