"""The members of a zip, none of which is unpacked before all are known to be within bounds."""

from __future__ import annotations

import io
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from nsrl.errors import NsrlError
from nsrl.reading.limits import MIB, Expansion, Unreadable, shown

#: Bytes of a zip's directory; an entry takes 46 and its name, and half a kilobyte once it is read.
DIRECTORY = 4 * MIB
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
#: Bits of an entry's flags: encrypted, a patch, strongly encrypted, with a masked header.
ODD_FLAGS = 0x1 | 0x20 | 0x40 | 0x2000
#: Bytes unpacked at once: zipfile joins its own pieces of some kilobytes in quadratic time.
PIECE = 2**16


class Members:
    """The members of an open zip.

    Attributes:
        sizes: unpacked bytes of each, by name.
    """

    def __init__(self, archive: zipfile.ZipFile):
        self._archive = archive
        self.sizes = {entry.filename: entry.file_size for entry in archive.infolist()}

    def __contains__(self, name: str) -> bool:
        return name in self.sizes

    def read(self, name: str, limit: int | None = None) -> bytes:
        """A whole member, its checksum verified.

        Raises:
            Unreadable: it is missing, damaged, or has more than `limit` bytes.
        """
        if name not in self.sizes:
            raise Unreadable(f"it has no {shown(name)}")
        if limit is not None and self.sizes[name] > limit:
            raise Unreadable(f"{shown(name)} has {self.sizes[name]} bytes, the limit is {limit}")
        with self.opened(name) as member:
            if self._archive.getinfo(name).compress_type == zipfile.ZIP_STORED:
                return member.read(self.sizes[name])
            content = bytearray(self.sizes[name])
            fill(member, memoryview(content))
        return bytes(content)

    @contextmanager
    def opened(self, name: str) -> Iterator[Any]:
        """A member as a file; leaving the block verifies its size and checksum.

        Raises:
            Unreadable: it is damaged, or not all of it has been read.
        """
        try:
            with self._archive.open(name) as member:
                yield member
                if member.read(1) or member.tell() != self.sizes[name]:
                    raise Unreadable(f"{shown(name)} has another size than the directory says")
        except NsrlError:
            raise
        except Exception as error:  # zipfile and zlib answer damage with a dozen types
            raise Unreadable(f"{shown(name)}: {shown(str(error), 120)}") from error


def fill(member: Any, room: memoryview) -> None:
    """Read a member into memory that has its size.

    Raises:
        Unreadable: it ends early.
    """
    for start in range(0, len(room), PIECE):
        piece = room[start : start + PIECE]
        if member.readinto(piece) != len(piece):
            raise Unreadable("a member ends early")


@contextmanager
def opened_zip(content: BinaryIO | bytes, expansion: Expansion) -> Iterator[Members]:
    """The members of a zip.

    Args:
        content: the zip, or a file that holds it.
        expansion: what its members may come to.

    Raises:
        Unreadable: it is no zip, has encrypted members, two of one name or two in one place, or its members would be
            larger than `expansion` allows.
    """
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    size = file.seek(0, io.SEEK_END)
    try:
        archive = zipfile.ZipFile(_Directory(file))  # type: ignore[arg-type]
    except NsrlError:
        raise
    except Exception as error:  # as above
        raise Unreadable(shown(str(error), 120)) from error
    with archive:
        _check(archive.infolist(), size, expansion)
        archive.fp = file  # type: ignore[assignment]
        yield Members(archive)


class _Directory:
    """A file of which no more than `DIRECTORY` bytes are read at once.

    A zip says itself how long its directory is, and zipfile reads that many bytes and makes an object of every entry.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """As of a file."""
        content = self._file.read(DIRECTORY + 1 if size < 0 else min(size, DIRECTORY + 1))
        if len(content) > DIRECTORY:
            raise Unreadable(f"its directory has more than {DIRECTORY} bytes")
        return content


def _check(entries: list[zipfile.ZipInfo], size: int, expansion: Expansion) -> None:
    names: set[str] = set()
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        name = shown(entry.filename)
        if entry.filename in names:
            raise Unreadable(f"it has two members {name}")
        names.add(entry.filename)
        if entry.flag_bits & ODD_FLAGS or entry.compress_type not in METHODS:
            raise Unreadable(f"its member {name} is encrypted, or compressed otherwise than by deflate")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise Unreadable(f"its member {name} is a link")
        if entry.compress_type == zipfile.ZIP_STORED and entry.compress_size != entry.file_size:
            raise Unreadable(f"its member {name} has two sizes")
        if entry.header_offset < end or entry.header_offset + entry.compress_size > size:
            raise Unreadable(f"its member {name} lies inside another one or beyond the end")
        end = entry.header_offset + 30 + entry.compress_size  # a local header takes 30 bytes at least
    total = sum(entry.file_size for entry in entries)
    if total > expansion.allowed(size):
        raise Unreadable(
            f"its {size} bytes would unpack to {total}, of which no more than {expansion.allowed(size)} are read"
        )
