"""Scores of a model on the tasks of a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from nsrl.continual.benchmarks import Benchmark
from nsrl.continual.heads import model_outputs, predictions
from nsrl.continual.tasks import Task


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
            score = _explained if benchmark.regression else _accuracy
            scores.append(score(model, benchmark, index, part, device, seen, examples))
    return scores


def _accuracy(
    model: nn.Module,
    benchmark: Benchmark,
    index: int,
    part: str,
    device: str,
    seen: Sequence[Task],
    examples: int | None,
) -> float:
    right = count = 0
    for inputs, targets, _ in benchmark.loader(index, part, device=device, first=examples):
        right += int((predictions(model, inputs, benchmark.tasks[index].task, seen) == targets).sum())
        count += len(targets)
    return right / count if count else float("nan")


@torch.no_grad()
def _explained(
    model: nn.Module,
    benchmark: Benchmark,
    index: int,
    part: str,
    device: str,
    seen: Sequence[Task],
    examples: int | None,
) -> float:
    errors, values = [], []
    for inputs, targets, _ in benchmark.loader(index, part, device=device, first=examples):
        errors.append((model_outputs(model, inputs, None) - targets).square())
        values.append(targets)
    variance = torch.cat(values).var(0, correction=0).mean()
    return max(0.0, 1.0 - float(torch.cat(errors).mean() / variance))
