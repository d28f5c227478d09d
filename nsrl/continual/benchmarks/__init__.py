"""Sequences of tasks: generated ones, scikit-learn's digits, and data sets that are read from the user's files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from nsrl.continual.benchmarks.benchmark import Benchmark, Examples, Minibatches, Splits, TaskData, ordered
from nsrl.continual.benchmarks.cifar import split_cifar100
from nsrl.continual.benchmarks.digits import permuted_digits, rotated_digits, split_digits
from nsrl.continual.benchmarks.mnist import permuted_fashion_mnist, permuted_mnist, split_fashion_mnist, split_mnist
from nsrl.continual.benchmarks.synthetic import regression, teacher_student
from nsrl.continual.benchmarks.tinyimagenet import split_tinyimagenet
from nsrl.continual.config import BenchmarkSettings
from nsrl.errors import NsrlError

__all__ = ["BENCHMARKS", "Benchmark", "Examples", "Minibatches", "Splits", "TaskData", "build_benchmark"]

BENCHMARKS: dict[str, Callable[[BenchmarkSettings, int], Benchmark]] = {
    "permuted_digits": permuted_digits,
    "split_digits": split_digits,
    "rotated_digits": rotated_digits,
    "teacher_student": teacher_student,
    "regression": regression,
    "permuted_mnist": permuted_mnist,
    "split_mnist": split_mnist,
    "permuted_fashion_mnist": permuted_fashion_mnist,
    "split_fashion_mnist": split_fashion_mnist,
    "split_cifar100": split_cifar100,
    "split_tinyimagenet": split_tinyimagenet,
}


def build_benchmark(settings: BenchmarkSettings, seed: int = 0) -> Benchmark:
    """The benchmark that the settings describe, its tasks in the order that they ask for.

    Args:
        settings: what is asked for.
        seed: of splits, permutations, teachers and curves; the same seed gives the same benchmark.

    Raises:
        NsrlError: an unknown benchmark, a scenario that it does not have, missing or damaged files.
    """
    if settings.name not in BENCHMARKS:
        raise NsrlError(f"there is no benchmark {settings.name!r}; known: {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[settings.name](settings, seed)
    return replace(benchmark, tasks=ordered(benchmark.tasks, settings.order))
