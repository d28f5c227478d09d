"""Named arrays of numbers from an npz: shapes and sizes are compared before anything is allocated.

The headers are read here, not by numpy: theirs are Python expressions, from which numpy makes any dtype.
"""

from __future__ import annotations

import math
import re
from typing import Any, BinaryIO

import numpy as np

from nsrl.reading.limits import Expansion, Unreadable, shown
from nsrl.reading.zips import Members, fill, opened_zip

#: The header as numpy writes it, in all its versions.
HEADER = re.compile(
    rb"\{'descr': '(?P<dtype>[<>|=]?[biuf][0-9]{1,2})', 'fortran_order': (?P<fortran>True|False), "
    rb"'shape': \((?P<shape>[0-9, ]*)\), \} *\n?"
)
#: Bytes of the header's length, by how an array begins.
LENGTHS = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4, b"\x93NUMPY\x03\x00": 4}
LARGEST_HEADER = 10_000
DIMENSIONS = 32
#: Bytes of an element, by the kind of its numbers.
SIZES = {"b": (1,), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "f": (2, 4, 8, np.dtype(np.longdouble).itemsize)}


def read_arrays(file: BinaryIO, expansion: Expansion) -> dict[str, np.ndarray]:
    """The arrays of an npz, read-only, by name.

    Raises:
        Unreadable: naming the key where one is at fault: it is damaged, holds something other than numbers, or the
            file would unpack to more than `expansion` allows.
    """
    arrays: dict[str, np.ndarray] = {}
    name = ""
    try:
        with opened_zip(file, expansion) as members:
            for name in members.sizes:
                arrays[name.removesuffix(".npy")] = _array(members, name)
    except Unreadable as error:
        what = f"key {shown(name.removesuffix('.npy'))!r}" if name else "the file"
        raise Unreadable(f"{what} is damaged or no array of numbers: {error}") from error
    return arrays


def _array(members: Members, name: str) -> np.ndarray:
    with members.opened(name) as member:
        size = members.sizes[name]
        start = member.read(8)
        if start not in LENGTHS or not name.endswith(".npy"):
            raise Unreadable("it is not in numpy's form")
        length = int.from_bytes(member.read(LENGTHS[start]), "little")
        if length > min(LARGEST_HEADER, size):
            raise Unreadable("its header is too long")
        dtype, shape, order = parse_header(member.read(length))
        if math.prod(shape) * dtype.itemsize != size - len(start) - LENGTHS[start] - length:
            raise Unreadable(f"its shape {shown(shape)} of {dtype} does not fit its size")
        array = np.empty(shape, dtype, order=order)
        if array.size:
            fill(member, array.reshape(-1, order="A").view(np.uint8).data)
    array.flags.writeable = False
    return array


def parse_header(header: bytes) -> tuple[np.dtype, tuple[int, ...], Any]:
    """Dtype, shape and order ("C" or "F") from an array's header.

    Raises:
        Unreadable: it is damaged, or of something other than numbers.
    """
    match = HEADER.fullmatch(header)
    if match is None:
        raise Unreadable(f"its header is {shown(header.decode('ascii', 'replace').rstrip(), 100)}")
    shape = tuple(int(size[:20]) for size in re.findall(rb"[0-9]+", match["shape"]))
    return number_type(match["dtype"].decode()), checked_shape(shape), "F" if match["fortran"] == b"True" else "C"


def number_type(text: Any) -> np.dtype:
    """The dtype that a text such as "<f8" means.

    Raises:
        Unreadable: it is none of numbers.
    """
    match = re.fullmatch(r"[<>|=]?([biuf])([0-9]{1,2})", text) if type(text) is str else None
    if match is None or int(match[2]) not in SIZES[match[1]]:
        raise Unreadable(f"its elements are {shown(text, 20)}, no numbers")
    return np.dtype(text)


def checked_shape(shape: Any) -> tuple[int, ...]:
    """A shape that an array can have.

    Raises:
        Unreadable: it is none: not whole numbers, negative, or of more bytes than an address has.
    """
    if type(shape) is not tuple or len(shape) > DIMENSIONS or any(type(size) is not int for size in shape):
        raise Unreadable(f"its shape is {shown(shape)}")
    if min(shape, default=0) < 0 or math.prod(max(size, 1) for size in shape) >= 2**48:
        raise Unreadable(f"its shape is {shown(shape)}")
    return shape
