"""What `torch.save` wrote, read without `torch.load`: nested plain values and dense tensors, within bounds.

`torch.load(weights_only=True)` trusts sizes and strides (an expanded tensor of a hundred bytes takes gigabytes once it
is copied) and, up to 2.13 at least, the indices of sparse tensors, which then read out of bounds
(https://github.com/pytorch/pytorch/pull/184750); and its zip reader may see other members in a file than Python's.
Both forms are read: the zip of torch 1.6 and later, and the stream of pickles before it.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from nsrl.reading.limits import DEPTH, MIB, Expansion, Unreadable, shown
from nsrl.reading.pickles import BUILTINS, Names, Part, parse_pickle
from nsrl.reading.zips import Members, opened_zip

#: How a file of before torch 1.6 begins: a pickle of this number, then one of the form's version.
MAGIC, STREAM_VERSION = 0x1950A86A20F9469CFC6C, 1001

#: How often a storage may be seen through tensors: SB3 shows an extractor of features under three names.
VIEWS = 8

DIMENSIONS = 16

#: torch.save compresses nothing.
STORED = Expansion(0, 1)


class StorageType(Part):
    """A class of storages, which stands for the dtype of its elements."""

    dtype: torch.dtype


class Storage:
    """Elements in a row, as the file announces them.

    Attributes:
        dtype: of the elements.
        count: how many.
        elements: themselves; None until they are there.
    """

    def __init__(self, dtype: torch.dtype, count: int):
        self.dtype, self.count = dtype, count
        self.elements: Tensor | None = None


class View(Part):
    """A dense tensor: storage, offset, sizes and strides."""

    def __init__(self, storage: Storage, offset: int, sizes: tuple[int, ...], strides: tuple[int, ...]):
        self.storage, self.offset, self.sizes, self.strides = storage, offset, sizes, strides

    @classmethod
    def made(cls, *arguments: Any) -> View:
        """From the arguments of `torch._utils._rebuild_tensor_v2`.

        Raises:
            Unreadable: storage or shape are none.
        """
        if len(arguments) < 4 or type(arguments[0]) is not Storage:
            raise Unreadable("a tensor has no storage")
        storage, offset, sizes, strides = arguments[:4]
        if any(type(part) is not tuple or len(part) > DIMENSIONS for part in (sizes, strides)):
            raise Unreadable("a tensor has no shape")
        whole = all(type(number) is int and 0 <= number < 2**40 for number in (offset, *sizes, *strides))
        if len(sizes) != len(strides) or not whole:
            raise Unreadable("a tensor has a damaged shape")
        view = cls(storage, offset, sizes, strides)
        view.check()
        return view

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    def check(self) -> None:
        """Raise Unreadable unless each element has a place of its own inside the storage."""
        if self.count == 0:
            if math.prod(size or 1 for size in self.sizes) >= 2**40:
                raise Unreadable("a tensor has a damaged shape")
            return
        reach = 0
        for stride, size in sorted(zip(self.strides, self.sizes, strict=True)):
            if size > 1 and stride <= reach:
                raise Unreadable(
                    f"a tensor of shape {shown(self.sizes)} overlaps itself, its strides are {shown(self.strides)}"
                )
            reach += (size - 1) * stride
        if self.offset + reach >= self.storage.count:
            raise Unreadable(f"a tensor of shape {shown(self.sizes)} reaches beyond its storage")

    def tensor(self) -> Tensor:
        """The tensor, of the view's shape (...,); those of one storage share memory.

        Raises:
            Unreadable: its storage is missing.
        """
        if self.storage.elements is None:
            raise Unreadable("a tensor's storage is missing")
        if self.count == 0:
            return torch.empty_strided(self.sizes, self.strides, dtype=self.storage.dtype)
        return self.storage.elements.as_strided(self.sizes, self.strides, self.offset)


class Parameter(Part):
    """A parameter, read as its tensor."""

    @classmethod
    def made(cls, *arguments: Any) -> View:
        """From the arguments of `torch._utils._rebuild_parameter`.

        Raises:
            Unreadable: it has no tensor.
        """
        if not arguments or type(arguments[0]) is not View:
            raise Unreadable("a parameter has no tensor")
        return arguments[0]


STORAGES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}

NAMES: Names = {
    **BUILTINS,
    **{("torch", f"{name}Storage"): type(name, (StorageType,), {"dtype": dtype}) for name, dtype in STORAGES.items()},
    ("torch._utils", "_rebuild_tensor_v2"): View,
    ("torch._utils", "_rebuild_parameter"): Parameter,
}


def read_tensors(content: BinaryIO | bytes) -> Any:
    """The value that `torch.save` wrote: None, numbers, text, lists, tuples and mappings, and tensors on the CPU.

    Attributes of mappings (`_metadata`) and gradients are left out.

    Args:
        content: the bytes, or a file that holds them.

    Raises:
        ForeignName: it holds something else, by its class.
        Unreadable: it is damaged, or asks for more than the limits.
    """
    storages: dict[str, Storage] = {}
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    if file.read(1) == b"\x80":  # a pickle's first byte
        file.seek(0)
        value = _read_stream(memoryview(file.read()), storages)
    else:
        with opened_zip(file, STORED) as members:
            value = _read_zip(members, storages)
    return _Filling(VIEWS * sum(storage.count for storage in storages.values())).fill(value)


def like(value: Any, here: Tensor, what: str) -> Tensor:
    """A finite tensor of the shape of `here`, (...,), where that one is and of its type.

    Raises:
        Unreadable: it is none.
    """
    if not isinstance(value, Tensor) or value.shape != here.shape or not bool(torch.isfinite(value).all()):
        raise Unreadable(f"{what} is no tensor of finite numbers of shape {tuple(here.shape)}")
    return value.to(here)


def _read_zip(members: Members, storages: dict[str, Storage]) -> Any:
    found = [name for name in members.sizes if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(found) != 1:
        raise Unreadable("it holds no tensors that torch.save wrote")
    folder = found[0].removesuffix("data.pkl")
    # Absent before torch 2.1, when only little-endian machines wrote files that others could read.
    order = members.read(f"{folder}byteorder", 10) if f"{folder}byteorder" in members else b"little"
    pickled = memoryview(members.read(found[0], 16 * MIB))
    value, _ = parse_pickle(pickled, NAMES, persistent=_announced(storages))
    for key, storage in storages.items():
        size = storage.count * storage.dtype.itemsize
        name = f"{folder}data/{key}"
        if members.sizes.get(name, -1) != size:
            raise Unreadable(f"the storage {shown(key)} does not have the {size} bytes that it should")
        storage.elements = _elements(members.read(name), storage.dtype, order == b"big")
    return value


def _read_stream(content: memoryview, storages: dict[str, Storage]) -> Any:
    position = 0
    heads = []
    for _ in range(3):
        head, position = parse_pickle(content, BUILTINS, start=position)
        heads.append(head)
    if heads[:2] != [MAGIC, STREAM_VERSION] or type(heads[2]) is not dict:
        raise Unreadable("it is nothing that torch.save wrote")
    value, position = parse_pickle(content, NAMES, start=position, persistent=_announced(storages))
    keys, position = parse_pickle(content, BUILTINS, start=position)
    if type(keys) is not list or any(type(key) is not str for key in keys) or sorted(keys) != sorted(storages):
        raise Unreadable("its list of storages is damaged")
    for key in keys:  # what follows is little-endian on every machine
        storage = storages[key]
        size = storage.count * storage.dtype.itemsize
        count = int.from_bytes(content[position : position + 8], "little")
        if count != storage.count or len(content) < position + 8 + size:
            raise Unreadable(f"the storage {shown(key)} does not have the {size} bytes that it should")
        storage.elements = _elements(content[position + 8 : position + 8 + size], storage.dtype, False)
        position += 8 + size
    return value


def _announced(storages: dict[str, Storage]) -> Callable[[Any], Storage]:
    """Makes storages of persistent ids: ("storage", class, key, device, count) and, before torch 1.6, a view."""

    def announce(identity: Any) -> Storage:
        if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
            raise Unreadable("a persistent id is no storage")
        kind, key, _, count = identity[1:5]
        named = isinstance(kind, type) and issubclass(kind, StorageType) and type(key) is str
        if not named or type(count) is not int or count < 0 or identity[5:] not in ((), (None,)):
            raise Unreadable("a storage is damaged")
        known = storages.setdefault(key, Storage(kind.dtype, count))
        if (known.dtype, known.count) != (kind.dtype, count):
            raise Unreadable(f"the storage {shown(key)} is announced twice, and differently")
        return known

    return announce


def _elements(raw: bytes | memoryview, dtype: torch.dtype, big_endian: bool) -> Tensor:
    elements = torch.empty(len(raw), dtype=torch.uint8)  # aligned as torch aligns, by which its kernels differ
    elements.numpy()[:] = np.frombuffer(raw, dtype=np.uint8)
    if big_endian != (sys.byteorder == "big"):
        elements = elements.view(-1, dtype.itemsize).flip(1).reshape(-1)
    if dtype is torch.bool and bool((elements > 1).any()):
        raise Unreadable("a truth value is neither true nor false")
    return elements.view(dtype)


class _Filling:
    """Makes a value anew with tensors in place of views; what is shared is made once, and shared again."""

    def __init__(self, room: int):
        self._room = room
        self._made: dict[int, Any] = {}

    def fill(self, part: Any, depth: int = 0) -> Any:
        """The part made anew."""
        kind = type(part)
        if kind in (bool, int, float, str) or part is None:
            return part
        if id(part) in self._made:
            return self._made[id(part)]
        if depth > DEPTH:
            raise Unreadable(f"it is nested deeper than {DEPTH}")
        made: Any
        if kind is View:
            self._room -= part.count
            if self._room < 0:
                raise Unreadable(f"its tensors show its storages more than {VIEWS} times")
            made = self._made[id(part)] = part.tensor()
        elif kind is dict:
            made = self._made[id(part)] = {}
            made.update((key, self.fill(entry, depth + 1)) for key, entry in part.items())
        elif kind is list:
            made = self._made[id(part)] = []
            made.extend(self.fill(entry, depth + 1) for entry in part)
        elif kind is tuple:
            made = self._made[id(part)] = tuple(self.fill(entry, depth + 1) for entry in part)
        else:
            raise Unreadable(f"it holds {shown(kind.__name__)}, neither a tensor nor plain")
        return made


def check_torch_state(state: Any) -> None:
    """Raise Unreadable unless this is a state that a generator of torch can have."""
    here = torch.get_rng_state()
    if not isinstance(state, torch.Tensor) or (state.dtype, state.shape) != (here.dtype, here.shape):
        raise Unreadable("the state of torch's generator is damaged")
    try:
        torch.Generator().set_state(state)
    except RuntimeError as error:
        raise Unreadable("the state of torch's generator is damaged") from error
