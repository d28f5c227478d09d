"""The inert unpickler against Python's own, on everything that both may read."""

import pickle
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsrl.reading.limits import DEPTH, OPCODES, Unreadable
from nsrl.reading.pickles import BUILTINS, ForeignName, Part, parse_pickle

KEYS = st.text(max_size=5) | st.integers(-(2**59), 2**59)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**400), 2**400) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)


def read(content, names=BUILTINS, **options):
    return parse_pickle(memoryview(content), names, **options)[0]


def plain(value):
    """The value with bytes in place of views, and texts in place of floats, so that NaN equals itself."""
    if isinstance(value, list | tuple):
        return type(value)(plain(part) for part in value)
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, memoryview | bytearray):
        return bytes(value)
    return repr(value) if isinstance(value, float) else value


@settings(max_examples=300)
@given(VALUES, st.sampled_from([3, 4, 5]))
def test_plain_values_are_read_as_python_reads_them(value, protocol):
    content = pickle.dumps(value, protocol)
    assert plain(read(content)) == plain(pickle.loads(content))


def test_what_is_shared_stays_shared_and_lists_may_hold_themselves():
    inner = [1]
    value = [inner, (inner, inner), {"a": inner}]
    value.append(value)
    found = read(pickle.dumps(value))
    assert found[0] is found[1][0] is found[1][1] is found[2]["a"] and found[3] is found


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_sets_come_as_sequences_and_bytearrays_as_views(protocol):
    assert sorted(read(pickle.dumps({3, 1}, protocol))) == [1, 3]
    assert sorted(read(pickle.dumps(frozenset("ab"), protocol))) == ["a", "b"]
    assert bytes(read(pickle.dumps(bytearray(b"xyz"), protocol))) == b"xyz"


def test_several_pickles_lie_one_behind_the_other():
    content = memoryview(pickle.dumps([1]) + pickle.dumps("b") + b"rest")
    first, position = parse_pickle(content, BUILTINS)
    second, end = parse_pickle(content, BUILTINS, start=position)
    assert (first, second, bytes(content[end:])) == ([1], "b", b"rest")


def test_every_opcode_is_read_or_refused():
    whole = pickle.dumps([1, "a", (2.5, None), {"k": b"bytes"}])
    for code in range(256):
        for position in range(2, len(whole)):
            changed = bytearray(whole)
            changed[position] = code
            try:
                read(bytes(changed))
            except Unreadable:
                pass


def test_no_truncation_is_read():
    whole = pickle.dumps({"a": list(range(50)), "b": np.float64(1.5).item()})
    for length in range(len(whole)):
        with pytest.raises(Unreadable):
            read(whole[:length])


class Kept(Part):
    """Keeps whatever it is given."""

    def __init__(self, *arguments):
        self.arguments, self.state = arguments, None

    @classmethod
    def made(cls, *arguments):
        return cls(*arguments)

    def take(self, state):
        self.state = state


def test_names_stand_for_parts_and_others_are_refused():
    value = pickle.dumps(np.dtype("f4"))
    found = read(value, {**BUILTINS, ("numpy", "dtype"): Kept})
    assert found.arguments[0] == "f4" and found.state[1] == "<"
    with pytest.raises(ForeignName, match=r"numpy\.dtype"):
        read(value)


def tower(depth):
    return b"\x80\x04)" + b"\x85" * depth + b"."


def test_depth_and_length_are_refused_exactly_beyond_their_limits():
    nested = read(tower(DEPTH - 1))
    for _ in range(DEPTH - 1):
        (nested,) = nested
    assert nested == ()
    with pytest.raises(Unreadable, match="nested deeper"):
        read(tower(DEPTH))
    most = b"\x80\x04" + b"N0" * ((OPCODES - 3) // 2) + b"N"
    assert read(most + b".") is None
    with pytest.raises(Unreadable, match="opcodes"):
        read(most + b"0N.")


@pytest.mark.parametrize("code", [b"B", b"X", b"\x8b"])
def test_a_length_that_the_file_does_not_have_allocates_nothing(code):
    with pytest.raises(Unreadable):
        read(b"\x80\x04" + code + struct.pack("<I", 2**32 - 1) + b"x.")
