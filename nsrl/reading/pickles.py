"""Pickles read as data: opcodes are followed one by one, and no class, function or hash of the file's choice is called.

A pickle is a program for a stack machine that imports and calls. The machine here has no import: a name stands for a
`Part`, or the file is refused; a call makes that part from its arguments, which it checks. Values are None, truth
values, whole numbers, floats, text, bytes (as views of the file), tuples, lists, mappings and parts. Python's own
unpickler hashes every key and member of a set while it reads (nested tuples take 2^depth steps, nested frozensets the
C stack), and allocates what a length says before it looks whether the file is that long.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from nsrl.reading.limits import DEPTH, OPCODES, Unreadable, shown

#: Bytes of a whole number; the states of random generators have 17.
LONGEST_NUMBER = 64
#: Arguments of a call. Calls may share one tuple, so that a long one would be read again by each.
ARGUMENTS = 16
CONTAINERS = (list, tuple, dict)
STOP = ord(".")
U1, U2, U4, U8, I4, F8 = (struct.Struct(code) for code in ("<B", "<H", "<I", "<Q", "<i", ">d"))


class ForeignName(Unreadable):
    """A pickle names a class or function that is not on the list.

    Attributes:
        name: module and name.
    """

    def __init__(self, module: str, name: str):
        self.name = shown(f"{module}.{name}", 120)
        super().__init__(f"it names {self.name}")


class Part:
    """What a class or function of the file is read as; this one keeps nothing."""

    @classmethod
    def made(cls, *arguments: Any) -> Any:
        """The value that a call stands for.

        Raises:
            Unreadable: the arguments are not such as the class takes.
        """
        return cls()

    def take(self, state: Any) -> None:
        """Take in the attributes that the file gives."""


class Listed(Part):
    """`list`, `tuple`, `set` and `frozenset`: members of a set are not compared."""

    @classmethod
    def made(cls, *arguments: Any) -> Any:
        """The members.

        Raises:
            Unreadable: it is made of anything but one list or tuple.
        """
        values = arguments[0] if arguments else []
        if len(arguments) > 1 or type(values) not in (list, tuple):
            raise Unreadable("the pickle makes a list or set of something else")
        return values


class Mapped(Part):
    """`OrderedDict`; its entries come later."""

    @classmethod
    def made(cls, *arguments: Any) -> Any:
        """An empty mapping.

        Raises:
            Unreadable: it is made of anything.
        """
        if arguments:
            raise Unreadable("the pickle makes a mapping of something else")
        return {}


class Bytes(Part):
    """`bytearray`."""

    @classmethod
    def made(cls, *arguments: Any) -> Any:
        """A view of the bytes.

        Raises:
            Unreadable: it is made of anything but bytes.
        """
        if len(arguments) != 1 or type(arguments[0]) is not memoryview:
            raise Unreadable("the pickle makes bytes of something else")
        return arguments[0]


Names = Mapping[tuple[str, str], type[Part]]
#: Python's own types that a pickle names where there is no opcode for them.
BUILTINS: Names = {
    **{("builtins", name): Listed for name in ("list", "tuple", "set", "frozenset")},
    ("builtins", "bytearray"): Bytes,
    ("collections", "OrderedDict"): Mapped,
}


def parse_pickle(
    content: memoryview, names: Names, *, start: int = 0, persistent: Callable[[Any], Any] | None = None
) -> tuple[Any, int]:
    """The value of a pickle.

    Args:
        content: the file; bytes in the value are views of it.
        names: what a module and a name stand for.
        start: position of the pickle.
        persistent: makes a value of a persistent id; without it there may be none.

    Returns:
        The value, and the position behind the pickle.

    Raises:
        ForeignName: a name that `names` does not have.
        Unreadable: it is damaged, has opcodes that Python 3 does not write from protocol 2 on, or asks for more than
            the limits.
    """
    machine = _Machine(content, names, start, persistent)
    try:
        return machine.run(), machine.position
    except Unreadable:
        raise
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise Unreadable("the pickle is damaged") from error


def plain(values: list[Any]) -> list[Any]:
    """Keys, or members of a set, whose hash costs nothing.

    Raises:
        Unreadable: one is of another kind.
    """
    for value in values:
        if type(value) in CONTAINERS or isinstance(value, Part) or (type(value) is int and abs(value) >= 2**60):
            raise Unreadable(f"the pickle uses {shown(value)} as a key or a member of a set")
    return values


class _Machine:
    """Stack, marks and memo of one pickle."""

    def __init__(self, content: memoryview, names: Names, position: int, persistent: Callable[[Any], Any] | None):
        self.content, self.names, self.position, self.persistent = content, names, position, persistent
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        # Of what holds containers, by identity; it is kept, so that nothing else takes its identity over.
        self.depths: dict[int, tuple[int, Any]] = {}

    def run(self) -> Any:
        """Follow the opcodes; the value."""
        content = self.content
        for _ in range(OPCODES):
            code = content[self.position]
            self.position += 1
            if code == STOP:
                (value,) = self.stack
                return value
            if code not in OPERATIONS:
                raise Unreadable(f"the pickle has the opcode {code:#x} at byte {self.position - 1}")
            OPERATIONS[code](self)
        raise Unreadable(f"the pickle has more than {OPCODES} opcodes")

    # -- arguments of opcodes ------------------------------------------------------------------------------------------

    def raw(self, length: int) -> memoryview:
        """The next bytes."""
        end = self.position + length
        if end > len(self.content):
            raise Unreadable("the pickle ends early")
        piece = self.content[self.position : end]
        self.position = end
        return piece

    def unpacked(self, layout: struct.Struct) -> Any:
        """The next number."""
        return layout.unpack(self.raw(layout.size))[0]

    def whole(self, layout: struct.Struct) -> int:
        """The next number of any length."""
        length = self.unpacked(layout)
        if length > LONGEST_NUMBER:
            raise Unreadable(f"the pickle has a whole number of {length} bytes, the limit is {LONGEST_NUMBER}")
        return int.from_bytes(self.raw(length), "little", signed=True)

    def text(self, layout: struct.Struct) -> str:
        """The next text, behind its length."""
        return str(self.raw(self.unpacked(layout)), "utf-8", "surrogatepass")

    def line(self) -> str:
        """The rest of a line."""
        piece = bytes(self.content[self.position : self.position + 256])
        length = piece.index(b"\n")
        self.position += length + 1
        return piece[:length].decode("utf-8")

    # -- the stack -----------------------------------------------------------------------------------------------------

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def mark(self) -> None:
        """Begin a list of values."""
        self.marks.append(self.stack)
        self.stack = []

    def marked(self) -> list[Any]:
        """Take off what lies above the last mark."""
        values, self.stack = self.stack, self.marks.pop()
        return values

    def last(self, count: int) -> list[Any]:
        """Take off the last values."""
        if len(self.stack) < count:
            raise Unreadable("the pickle is damaged")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def memoize(self, index: int) -> None:
        """Remember the last value."""
        if index > len(self.content):
            raise Unreadable(f"the pickle numbers a value {index}")
        self.memo[index] = self.stack[-1]

    # -- containers ----------------------------------------------------------------------------------------------------

    def nested(self, container: Any, values: Any) -> Any:
        """The container, unless its new values make it too deep."""
        depths = [
            self.depths[id(value)][0] if id(value) in self.depths else 1
            for value in values
            if type(value) in CONTAINERS or isinstance(value, Part)
        ]
        if depths:
            depth = max(*depths, self.depths.get(id(container), (0, None))[0] - 1, 0) + 1
            if depth > DEPTH:
                raise Unreadable(f"the pickle is nested deeper than {DEPTH}")
            self.depths[id(container)] = depth, container
        return container

    def push_tuple(self, values: list[Any]) -> None:
        """Put a tuple on the stack."""
        whole = tuple(values)
        self.push(self.nested(whole, whole))

    def extend(self, values: list[Any]) -> None:
        """Append to the list on the stack."""
        container = self.stack[-1]
        if type(container) is not list:
            raise Unreadable("the pickle appends to something that is no list")
        container.extend(values)
        self.nested(container, values)

    def enter(self, values: list[Any]) -> None:
        """Put keys and values into the mapping on the stack; those under plain keys of odd kinds are left out.

        Hashes of text are seeded and those of small numbers differ: no choice of keys makes a mapping slow.
        """
        container = self.stack[-1]
        if type(container) is not dict:
            raise Unreadable("the pickle sets keys of something that is no mapping")
        keys = plain(values[::2])
        for key, value in zip(keys, values[1::2], strict=True):
            if type(key) in (str, int):
                container[key] = value
        self.nested(container, values)

    # -- names and what is made of them --------------------------------------------------------------------------------

    def push_named(self, module: Any, name: Any) -> None:
        """Put what a name stands for on the stack."""
        if type(module) is not str or type(name) is not str:
            raise Unreadable("the pickle names something that is no text")
        if (module, name) not in self.names:
            raise ForeignName(module, name)
        self.push(self.names[module, name])

    def call(self, function: Any, arguments: Any, keywords: Any = None) -> None:
        """Put what a call stands for on the stack."""
        if not (isinstance(function, type) and issubclass(function, Part)):
            raise Unreadable("the pickle calls something that is no class")
        if type(arguments) is not tuple or len(arguments) > ARGUMENTS or keywords:
            raise Unreadable("the pickle calls a class with odd arguments")
        value = function.made(*arguments)
        self.push(self.nested(value, arguments) if isinstance(value, Part) else value)

    def give_state(self, state: Any) -> None:
        """Give attributes to the value on the stack."""
        value = self.stack[-1]
        if isinstance(value, Part):
            value.take(state)
            self.nested(value, [state])
        elif type(value) is not dict:  # an OrderedDict's own attributes mean nothing here
            raise Unreadable("the pickle sets attributes of something that has none")

    def push_persistent(self, identity: Any) -> None:
        """Put the value of a persistent id on the stack."""
        if self.persistent is None:
            raise Unreadable("the pickle has a persistent id")
        self.push(self.persistent(identity))

    def check_protocol(self, protocol: int) -> None:
        """Refuse what Python 2 wrote, and what is yet to be invented."""
        if not 2 <= protocol <= 5:
            raise Unreadable(f"the pickle has protocol {protocol}, of which 2 to 5 are read")


#: What Python 3 writes from protocol 2 on. Left out: the text forms of protocol 0, text of Python 2, classes of old
#: style, the extension registry, buffers outside the file. Frames say nothing new where the whole file is at hand.
OPERATIONS: dict[int, Callable[[_Machine], None]] = {
    code[0]: operation
    for code, operation in {
        b"\x80": lambda m: m.check_protocol(m.unpacked(U1)),
        b"\x95": lambda m: m.unpacked(U8),
        b"N": lambda m: m.push(None),
        b"\x88": lambda m: m.push(True),
        b"\x89": lambda m: m.push(False),
        b"K": lambda m: m.push(m.unpacked(U1)),
        b"M": lambda m: m.push(m.unpacked(U2)),
        b"J": lambda m: m.push(m.unpacked(I4)),
        b"\x8a": lambda m: m.push(m.whole(U1)),
        b"\x8b": lambda m: m.push(m.whole(U4)),
        b"G": lambda m: m.push(m.unpacked(F8)),
        b"\x8c": lambda m: m.push(m.text(U1)),
        b"X": lambda m: m.push(m.text(U4)),
        b"\x8d": lambda m: m.push(m.text(U8)),
        b"C": lambda m: m.push(m.raw(m.unpacked(U1))),
        b"B": lambda m: m.push(m.raw(m.unpacked(U4))),
        b"\x8e": lambda m: m.push(m.raw(m.unpacked(U8))),
        b"\x96": lambda m: m.push(m.raw(m.unpacked(U8))),
        b")": lambda m: m.push(()),
        b"\x85": lambda m: m.push_tuple(m.last(1)),
        b"\x86": lambda m: m.push_tuple(m.last(2)),
        b"\x87": lambda m: m.push_tuple(m.last(3)),
        b"t": lambda m: m.push_tuple(m.marked()),
        b"]": lambda m: m.push([]),
        b"a": lambda m: m.extend(m.last(1)),
        b"e": lambda m: m.extend(m.marked()),
        b"}": lambda m: m.push({}),
        b"s": lambda m: m.enter(m.last(2)),
        b"u": lambda m: m.enter(m.marked()),
        # Sets, as lists; frozensets, as tuples.
        b"\x8f": lambda m: m.push([]),
        b"\x90": lambda m: m.extend(plain(m.marked())),
        b"\x91": lambda m: m.push_tuple(plain(m.marked())),
        b"(": lambda m: m.mark(),
        b"0": lambda m: m.last(1),
        b"1": lambda m: m.marked(),
        b"\x94": lambda m: m.memoize(len(m.memo)),
        b"q": lambda m: m.memoize(m.unpacked(U1)),
        b"r": lambda m: m.memoize(m.unpacked(U4)),
        b"h": lambda m: m.push(m.memo[m.unpacked(U1)]),
        b"j": lambda m: m.push(m.memo[m.unpacked(U4)]),
        b"c": lambda m: m.push_named(m.line(), m.line()),
        b"\x93": lambda m: m.push_named(*m.last(2)),
        b"R": lambda m: m.call(*m.last(2)),
        b"\x81": lambda m: m.call(*m.last(2)),
        b"\x92": lambda m: m.call(*m.last(3)),
        b"b": lambda m: m.give_state(*m.last(1)),
        b"Q": lambda m: m.push_persistent(*m.last(1)),
    }.items()
}
