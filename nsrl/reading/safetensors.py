"""A safetensors file, read without its package: a header of JSON, then dense tensors one behind the other."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nsrl.reading.documents import parse_json
from nsrl.reading.limits import JSON, Unreadable, opened, shown
from nsrl.reading.values import items, mapping, whole

#: The package's own limit is 100 MB.
HEADER = JSON
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
METADATA = "__metadata__"


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors (each of its own shape (...,)), which lie apart and fill the file.

    Raises:
        OSError: it is missing or may not be read.
        Unreadable: it is no such file, damaged, or beyond the limits.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(HEADER, size - 8):
            raise Unreadable("it is no safetensors file or is cut off")
        header = mapping(parse_json(file.read(length)), "its header")
        told = mapping(header.pop(METADATA, {}), "its metadata")
        if any(type(value) is not str for value in told.values()):
            raise Unreadable("its metadata are no texts")
        places = {name: _place(name, entry, size - 8 - length) for name, entry in header.items()}
        content = bytearray(file.read(size - 8 - length))
    end = 0
    for name, (_, _, begin, last) in sorted(places.items(), key=lambda entry: entry[1][2:]):
        if begin != end:
            raise Unreadable(f"the tensor {shown(name)} does not begin where the one before it ends")
        end = last
    if end != len(content):
        raise Unreadable("its tensors do not fill it")
    return told, {name: _tensor(content, *place) for name, place in places.items()}


def _place(name: str, entry: Any, room: int) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    described = mapping(entry, f"the tensor {shown(name)}", ("dtype", "shape", "data_offsets"), ())
    dtype = DTYPES.get(described["dtype"]) if type(described["dtype"]) is str else None
    if dtype is None:
        raise Unreadable(f"the tensor {shown(name)} has the format {shown(described['dtype'])}")
    shape = tuple(whole(length, "a length", 0, 2**40) for length in items(described["shape"], "a shape"))
    begin, end = (whole(offset, "an offset", 0, room) for offset in items(described["data_offsets"], "offsets", 2))
    if len(shape) > 16 or math.prod(shape) * dtype.itemsize != end - begin:
        raise Unreadable(f"the tensor {shown(name)} does not have the {end - begin} bytes of its shape {shown(shape)}")
    return dtype, shape, begin, end


def _tensor(content: bytearray, dtype: torch.dtype, shape: tuple[int, ...], begin: int, end: int) -> Tensor:
    elements = torch.empty(end - begin, dtype=torch.uint8)  # aligned as torch aligns
    elements.numpy()[:] = np.frombuffer(content, dtype=np.uint8, count=end - begin, offset=begin)
    if dtype is torch.bool and bool((elements > 1).any()):
        raise Unreadable("a truth value is neither true nor false")
    return elements.view(dtype).reshape(shape)
