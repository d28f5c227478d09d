"""Permuted MNIST from the idx files of its distribution, compressed or not."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nsrl.continual.benchmarks.benchmark import Benchmark, Examples, Splits, split_examples
from nsrl.continual.benchmarks.digits import domain_scenario, domain_task
from nsrl.continual.benchmarks.folders import find_folder
from nsrl.continual.config import BenchmarkSettings
from nsrl.errors import NsrlError
from nsrl.reading.limits import MIB, Expansion, Unreadable, opened

#: MNIST's images take a fifth of their bytes when compressed.
OF_IMAGES = Expansion(128 * MIB, 20)

WANTED = (
    "the four files train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
    "t10k-labels-idx1-ubyte of https://yann.lecun.com/exdb/mnist or a mirror of it (with .gz or without)"
)


def permuted_mnist(settings: BenchmarkSettings, seed: int) -> Benchmark:
    """MNIST under another permutation of the pixels in every task, the first one without; 10 tasks."""
    splits = read_mnist(settings, seed)
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
    return Benchmark(
        "permuted_mnist", domain_scenario(settings), tuple(tasks), 10, normalise=lambda images: images.float() / 255.0
    )


def read_mnist(settings: BenchmarkSettings, seed: int) -> Splits:
    """MNIST as flat images of bytes; the validation part is drawn from the training files.

    Raises:
        NsrlError: no folder, a missing file, or one that is not idx.
    """
    folder = find_folder(settings, "MNIST", WANTED, ("", "MNIST/raw", "raw"), "train-images-idx3-ubyte")
    found = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte", 3)
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise NsrlError(f"{folder} holds {len(images)} {part} images but {len(labels)} labels; download it again")
        found[part] = Examples(torch.from_numpy(images).flatten(1), torch.from_numpy(labels).long())
    rest = split_examples(found["train"], settings.validation, 0.0, seed)
    return Splits(rest.train, rest.validation, found["test"])


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An idx file of unsigned bytes: labels (N,), or images (N, H, W).

    Args:
        path: without .gz, which is tried too.
        dimensions: that it must have.

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
        raise NsrlError(f"{path} is missing, and {compressed.name} too; MNIST consists of {WANTED}") from error
    except (OSError, EOFError, zlib.error, Unreadable) as error:
        raise NsrlError(f"{compressed} cannot be read ({error}); download it again") from error
    if found != expected:
        raise NsrlError(f"{path} should hold {expected} bytes but holds {found}; download it again")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape).copy()
