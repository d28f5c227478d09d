"""Scores of a model on the tasks of a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from nsrl.continual.benchmarks import Benchmark
from nsrl.continual.heads import model_outputs, predictions
from nsrl.continual.tasks import Task

#: Inputs and targets of a part of a task.
Batches = Iterable[tuple[Tensor, Tensor]]


def evaluate(
    model: nn.Module,
    benchmark: Benchmark,
    part: str,
    seen: Sequence[Task],
    device: str = "cpu",
    recalled: Callable[[Task], AbstractContextManager[None]] | None = None,
    *,
    first: int | None = None,
    examples: int | None = None,
) -> list[float]:
    """Score on every task: accuracy from 0 to 1, or for regression the share of the variance explained (0 or more).

    Args:
        model: with the outputs that the benchmark needs.
        benchmark: the tasks.
        part: "validation" or "test".
        seen: tasks learnt so far; class-incremental predictions are among their classes.
        device: of the model.
        recalled: makes the model what it is on a task, for as long as a block runs (`Strategy.recalled`).
        first: only so many of the tasks.
        examples: only so many of a task's examples.
    """
    scores = []
    for index, data in enumerate(benchmark.tasks[:first]):
        with nullcontext() if recalled is None else recalled(data.task):
            batches = ((x, y) for x, y, _ in benchmark.loader(index, part, device=device, first=examples))
            score = _explained(model, batches) if benchmark.regression else _accuracy(model, batches, data.task, seen)
            scores.append(score)
    return scores


def _accuracy(model: nn.Module, batches: Batches, task: Task, seen: Sequence[Task]) -> float:
    right = count = 0
    for inputs, targets in batches:
        right += int((predictions(model, inputs, task, seen) == targets).sum())
        count += len(targets)
    return right / count if count else float("nan")


@torch.no_grad()
def _explained(model: nn.Module, batches: Batches) -> float:
    errors, values = [], []
    for inputs, targets in batches:
        errors.append((model_outputs(model, inputs, None) - targets).square())
        values.append(targets)
    variance = torch.cat(values).var(0, correction=0).mean()
    return max(0.0, 1.0 - float(torch.cat(errors).mean() / variance))
