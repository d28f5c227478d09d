"""Permuted, split and rotated digits: scikit-learn's 1797 images of 8 x 8 pixels, which come with the package."""

from __future__ import annotations

import numpy as np
import torch

from nsrl.continual.benchmarks.benchmark import Benchmark, Examples, Splits, TaskData, split_classes, split_examples
from nsrl.continual.config import BenchmarkSettings
from nsrl.continual.tasks import Scenario, Task
from nsrl.errors import NsrlError

CLASSES = 10
#: Degrees between two tasks of rotated digits.
STEP = 15.0


def permuted_digits(settings: BenchmarkSettings, seed: int) -> Benchmark:
    """The same digits under another permutation of the pixels in every task, the first one without; 10 tasks."""
    splits = read_digits(settings, seed)
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for index in range(settings.tasks or 10):
        pixels = torch.randperm(64, generator=generator) if index else torch.arange(64)
        tasks.append(
            domain_task(
                f"permutation {index}",
                index,
                settings,
                splits.with_inputs(lambda inputs, pixels=pixels: inputs[:, pixels]),  # type: ignore[misc]
            )
        )
    return Benchmark("permuted_digits", domain_scenario(settings), tuple(tasks), CLASSES)


def rotated_digits(settings: BenchmarkSettings, seed: int) -> Benchmark:
    """The digits turned by 0, 15, 30, ... degrees; 6 tasks.

    Kept below 90 degrees or so: a 6 on its head is a 9, and no network can tell them apart.
    """
    splits = read_digits(settings, seed)
    tasks = []
    for index in range(settings.tasks or 6):
        angle = STEP * index
        rotated = splits.with_inputs(lambda inputs, angle=angle: rotate(inputs, angle))  # type: ignore[misc]
        tasks.append(domain_task(f"{angle:g} degrees", index, settings, rotated))
    return Benchmark("rotated_digits", domain_scenario(settings), tuple(tasks), CLASSES)


def split_digits(settings: BenchmarkSettings, seed: int) -> Benchmark:
    """Two digits a task, five tasks; task-incremental unless the scenario is "class"."""
    scenario = split_scenario(settings)
    tasks = split_classes(read_digits(settings, seed), CLASSES, settings.tasks or 5, scenario)
    return Benchmark("split_digits", scenario, tasks, CLASSES)


def read_digits(settings: BenchmarkSettings, seed: int) -> Splits:
    """The digits as vectors of 64 numbers from 0 to 1.

    Raises:
        NsrlError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise NsrlError(
            "the digits come with scikit-learn, which is not installed: pip install nsrl[analysis]"
        ) from error
    images, labels = load_digits(return_X_y=True)
    examples = Examples(torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels, dtype=torch.int64))
    return split_examples(examples, settings.validation, settings.test, seed)


def rotate(inputs: torch.Tensor, angle: float) -> torch.Tensor:
    """Flat 8 x 8 images turned counterclockwise; shape (N, 64). Multiples of 90 degrees lose nothing.

    Raises:
        NsrlError: SciPy is missing.
    """
    images = inputs.reshape(-1, 8, 8)
    if angle % 90 == 0:
        return torch.rot90(images, int(angle // 90), (1, 2)).reshape(-1, 64)
    try:
        from scipy.ndimage import rotate as turn
    except ImportError as error:
        raise NsrlError("rotating digits needs SciPy, which is not installed: pip install nsrl[analysis]") from error
    turned = turn(images.numpy(), angle, axes=(1, 2), reshape=False, order=1, mode="grid-constant")
    return torch.from_numpy(np.ascontiguousarray(turned, dtype=np.float32)).reshape(-1, 64)


def domain_task(name: str, index: int, settings: BenchmarkSettings, splits: Splits) -> TaskData:
    """A task with the same classes as the others; it has a head of its own only in the scenario "task"."""
    head = index if domain_scenario(settings) == "task" else None
    return TaskData(Task(name, index, head=head), splits)


def domain_scenario(settings: BenchmarkSettings) -> Scenario:
    """Of tasks that share their classes.

    Raises:
        NsrlError: classes would have to be told apart that are the same.
    """
    if settings.scenario == "class":
        raise NsrlError(
            f"the tasks of {settings.name} have the same classes; its scenario is domain or task, not class"
        )
    return settings.scenario or "domain"


def split_scenario(settings: BenchmarkSettings) -> Scenario:
    """Of tasks that have their own classes.

    Raises:
        NsrlError: the tasks share no classes.
    """
    if settings.scenario == "domain":
        raise NsrlError(
            f"the tasks of {settings.name} have different classes; its scenario is task or class, not domain"
        )
    return settings.scenario or "task"
