"""Split CIFAR-100 from the files of its binary version."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from nsrl.continual.benchmarks.benchmark import Benchmark, Examples, Splits, split_classes, split_examples
from nsrl.continual.benchmarks.digits import split_scenario
from nsrl.continual.benchmarks.folders import find_folder
from nsrl.continual.config import BenchmarkSettings
from nsrl.errors import NsrlError
from nsrl.reading.limits import Unreadable, opened

CLASSES = 100
SIDE = 32
#: Bytes of an example: coarse label, fine label, then the red, green and blue planes.
RECORD = 2 + 3 * SIDE * SIDE
MEAN, DEVIATION = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
WANTED = "the binary version, https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz (train.bin and test.bin)"


def split_cifar100(settings: BenchmarkSettings, seed: int) -> Benchmark:
    """CIFAR-100's classes in 10 tasks (or 20, ...); task-incremental unless the scenario is "class"."""
    scenario = split_scenario(settings)
    folder = find_folder(settings, "CIFAR-100", WANTED, ("", "cifar-100-binary"), "train.bin")
    rest = split_examples(read_cifar100(folder / "train.bin"), settings.validation, 0.0, seed)
    splits = Splits(rest.train, rest.validation, read_cifar100(folder / "test.bin"))
    tasks = split_classes(splits, CLASSES, settings.tasks or 10, scenario)
    return Benchmark("split_cifar100", scenario, tasks, CLASSES, normalise=normalise)


def read_cifar100(path: Path) -> Examples:
    """Images (N, 3, 32, 32), bytes, and their fine labels, 0 to 99.

    Raises:
        NsrlError: missing, truncated, or not this format.
    """
    try:
        with opened(path) as file:
            content = np.fromfile(file, dtype=np.uint8)
    except (OSError, Unreadable) as error:
        raise NsrlError(f"{path} cannot be read ({error}); CIFAR-100 is {WANTED}") from error
    if content.size == 0 or content.size % RECORD:
        raise NsrlError(
            f"{path} must consist of records of {RECORD} bytes, but has {content.size} bytes; "
            f"download it again: {WANTED}"
        )
    records = content.reshape(-1, RECORD)
    labels = torch.from_numpy(records[:, 1].copy()).long()
    if int(labels.max()) >= CLASSES:
        raise NsrlError(
            f"{path} has the label {int(labels.max())}, but CIFAR-100's are 0 to 99; is it CIFAR-10's file?"
        )
    return Examples(torch.from_numpy(records[:, 2:].reshape(-1, 3, SIDE, SIDE).copy()), labels)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Bytes, (N, 3, H, W), as numbers of mean 0 and deviation 1 by channel, as over CIFAR-100's training images."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return (images.float() / 255.0 - mean) / deviation
