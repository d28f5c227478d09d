"""Split TinyImageNet from its folder of JPEG files (or PNG files of the same names)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from nsrl.continual.benchmarks.benchmark import Benchmark, Examples, Splits, split_classes, split_examples
from nsrl.continual.benchmarks.digits import split_scenario
from nsrl.continual.benchmarks.folders import find_folder
from nsrl.continual.config import BenchmarkSettings
from nsrl.errors import NsrlError
from nsrl.reading.limits import MIB, Unreadable, about, opened, read_text, shown

FILE = re.compile(r"[\w-][\w.-]*")
SIDE = 64
MEAN, DEVIATION = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)
SUFFIXES = (".jpeg", ".jpg", ".png")
WANTED = "http://cs231n.stanford.edu/tiny-imagenet-200.zip (the folder with wnids.txt, train and val)"


def split_tinyimagenet(settings: BenchmarkSettings, seed: int) -> Benchmark:
    """TinyImageNet's classes in 25 tasks; task-incremental unless the scenario is "class".

    The distributed test images have no labels: as everywhere in the literature, scores are on its validation images.
    """
    scenario = split_scenario(settings)
    folder = find_folder(settings, "TinyImageNet", WANTED, ("", "tiny-imagenet-200"), "wnids.txt")
    names = read_names(folder / "wnids.txt")
    rest = split_examples(read_training(folder, names), settings.validation, 0.0, seed)
    splits = Splits(rest.train, rest.validation, read_labelled(folder, names))
    tasks = split_classes(splits, len(names), settings.tasks or 25, scenario)
    return Benchmark("split_tinyimagenet", scenario, tasks, len(names), normalise=normalise)


def read_names(path: Path) -> list[str]:
    """The words of a text file, each the name of a folder.

    Raises:
        NsrlError: missing, too large, or a word that leads elsewhere.
    """
    names = _read(path).split()
    for name in names:
        if not FILE.fullmatch(name):
            raise NsrlError(f"{path} has {shown(name)}, which is no name of a folder; download {WANTED} again")
    return names


def _read(path: Path) -> str:
    try:
        return read_text(path, 8 * MIB)
    except (OSError, UnicodeDecodeError, Unreadable) as error:
        raise NsrlError(f"{path} cannot be read ({error}); download {WANTED} again") from error


def read_training(folder: Path, names: Sequence[str]) -> Examples:
    """train/NAME/images/*.JPEG, the label being the position of NAME in wnids.txt.

    Raises:
        NsrlError: a class without images.
    """
    paths, labels = [], []
    for label, name in enumerate(names):
        found = sorted(
            path for path in (folder / "train" / name / "images").glob("*") if path.suffix.lower() in SUFFIXES
        )
        if not found:
            raise NsrlError(f"{folder / 'train' / name / 'images'} holds no images; download {WANTED} again")
        paths += found
        labels += [label] * len(found)
    return Examples(read_images(paths), torch.tensor(labels))


def read_labelled(folder: Path, names: Sequence[str]) -> Examples:
    """val/images with the labels of val/val_annotations.txt.

    Raises:
        NsrlError: no annotations, or one of an unknown class.
    """
    annotations = folder / "val" / "val_annotations.txt"
    if not annotations.exists():
        raise NsrlError(f"{annotations} is missing; download {WANTED} again")
    rows = [line.split() for line in _read(annotations).splitlines() if line.strip()]
    labels = {name: label for label, name in enumerate(names)}
    for row in rows:
        if len(row) < 2 or row[1] not in labels:
            raise NsrlError(
                f"{annotations} names the class {shown(' '.join(row[1:2])) or '(none)'}, which wnids.txt lacks"
            )
        if not FILE.fullmatch(row[0]):
            raise NsrlError(f"{annotations} names the image {shown(row[0])}; download {WANTED} again")
    # Each image once: otherwise a short text could ask for any number of copies of one.
    if len({row[0] for row in rows}) < len(rows):
        raise NsrlError(f"{annotations} names an image twice; download {WANTED} again")
    images = read_images([folder / "val" / "images" / row[0] for row in rows])
    return Examples(images, torch.tensor([labels[row[1]] for row in rows]))


def read_images(paths: Sequence[Path]) -> torch.Tensor:
    """Images as bytes, shape (N, 3, 64, 64); grey ones get three equal channels.

    Raises:
        NsrlError: one cannot be read, or has another size.
    """
    from PIL import Image, UnidentifiedImageError

    images = np.empty((len(paths), 3, SIDE, SIDE), dtype=np.uint8)
    for position, path in enumerate(paths):
        try:
            # The size is in the head; nothing is decoded before it has been looked at.
            with opened(path) as file, Image.open(file, formats=("JPEG", "PNG")) as image:
                if image.size != (SIDE, SIDE):
                    raise NsrlError(f"the image {path} has {image.width} x {image.height} pixels, not {SIDE} x {SIDE}")
                pixels = np.asarray(image.convert("RGB"))
        except Unreadable as error:
            raise NsrlError(about(path, error)) from error
        except NsrlError:
            raise
        except Exception as error:  # Pillow answers damage, and bombs, with a dozen types
            reason = "it is no JPEG or PNG" if isinstance(error, UnidentifiedImageError) else error
            raise NsrlError(f"the image {path} cannot be read ({reason}); download {WANTED} again") from error
        images[position] = pixels.transpose(2, 0, 1)
    return torch.from_numpy(images)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Bytes, (N, 3, H, W), as numbers of mean 0 and deviation 1 by channel, as over TinyImageNet's training images."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return (images.float() / 255.0 - mean) / deviation
