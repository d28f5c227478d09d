"""Hostile pickles of observation statistics, put together opcode by opcode."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from datetime import date
from typing import Any

import numpy as np

from tests.reading.hostile.workbench import Case, content

VEC = b"cstable_baselines3.common.vec_env.vec_normalize\nVecNormalize\n"
RMS = b"cstable_baselines3.common.running_mean_std\nRunningMeanStd\n"
DTYPE, NDARRAY = b"cnumpy\ndtype\n", b"cnumpy\nndarray\n"
RECONSTRUCT, SCALAR = b"cnumpy._core.multiarray\n_reconstruct\n", b"cnumpy._core.multiarray\nscalar\n"
FROMBUFFER = b"cnumpy._core.numeric\n_frombuffer\n"
GOOD = {"norm_obs": True, "epsilon": 1e-8, "clip_obs": 10.0}


def raw(value: Any) -> bytes:
    """Opcodes that put a value on the stack; bytes are opcodes already."""
    if isinstance(value, bytes):
        return value
    return pickle.dumps(value, 3)[2:-1]


def instance(name: bytes, attributes: dict[str, Any]) -> bytes:
    """An object of a class with attributes."""
    entries = b"".join(raw(key) + raw(value) for key, value in attributes.items())
    return name + b")\x81}(" + entries + b"ub"


def whole(**changes: Any) -> bytes:
    """A VecNormalize of five observations with attributes changed; `mean` and `var` are those of its statistics."""
    mean, var = changes.pop("mean", np.zeros(5)), changes.pop("var", np.ones(5))
    statistics = instance(RMS, {"mean": mean, "var": var, "count": changes.pop("count", 1.0)})
    return b"\x80\x04" + instance(VEC, {**GOOD, "obs_rms": statistics, **changes}) + b"."


def array(code: Any = "f8", shape: Any = (5,), data: Any = None, state: Any = None, fortran: Any = False) -> bytes:
    """An array as protocol 2 writes it, with any of its parts replaced."""
    state = raw((3, "<", None, None, None, -1, -1, 0)) if state is None else raw(state)
    number = DTYPE + raw((code, False, True)) + b"R" + state + b"b"
    contents = b"B" + struct.pack("<I", 40) + bytes(40) if data is None else raw(data)
    made = RECONSTRUCT + NDARRAY + raw((0,)) + b"C\x01b\x87R"
    return made + b"(" + raw(1) + raw(shape) + number + raw(fortran) + contents + b"tb"


def interface(**entries: Any) -> bytes:
    """An object of an allowed class that numpy would take for an array."""
    return instance(RMS, {"__array_interface__": {"version": 3, **entries}})


def tower(opcode: bytes, depth: int, start: bytes = b")") -> bytes:
    return start + opcode * depth


def file(make: Callable[[], bytes]) -> Case:
    return content("statistics", lambda bench: make())


def ops(code: bytes, harmless: bool = False) -> Case:
    """Opcodes as an attribute that nothing looks at."""
    return content("statistics", lambda bench: whole(stowaway=code), harmless)


def _doubled(times: int) -> bytes:
    """A tuple of two of the same tuple, and so on: its hash takes 2^times steps."""
    return b")" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(times))


CASES: dict[str, Case] = {
    # objects that numpy would follow
    "`__array_interface__` with an address": file(
        lambda: whole(mean=interface(data=(4096, False), shape=(4,), typestr="<f8"))
    ),
    "`__array_interface__` longer than its bytes": file(
        lambda: whole(mean=interface(data=b"C\x01x", shape=(65536,), typestr="<f8"))
    ),
    "`__array_interface__` of objects": file(
        lambda: whole(mean=interface(data=b"C\x08abcdefgh", shape=(1,), typestr="|O8"))
    ),
    "`__array_struct__`": file(lambda: whole(mean=instance(RMS, {"__array_struct__": 4096}))),
    "`__array__`": file(lambda: whole(mean=instance(RMS, {"__array__": [1.0]}))),
    "`__float__`": file(lambda: whole(epsilon=instance(RMS, {"__float__": 1.0}))),
    "`__class__` and `__dict__` as attributes": file(
        lambda: whole(mean=instance(RMS, {"__class__": 1, "__dict__": {}}))
    ),
    # opcodes
    "persistent id (BINPERSID)": ops(b"NQ"),
    "persistent id (PERSID)": ops(b"P1\n"),
    "extension registry (EXT1)": ops(b"\x82\x01"),
    "extension registry (EXT2)": ops(b"\x83\x01\x00"),
    "extension registry (EXT4)": ops(b"\x84\x01\x00\x00\x00"),
    "class of old style (INST)": ops(b"(ios\nsystem\n"),
    "class of old style (OBJ)": ops(b"(" + RMS + b"o"),
    "buffer outside the file": ops(b"\x97"),
    "read-only buffer": ops(b"N\x98"),
    "text number (INT)": ops(b"I" + b"9" * 10**6 + b"\n"),
    "text number (LONG)": ops(b"L" + b"9" * 10**6 + b"L\n"),
    "text of Python 2": ops(b"U\x03abc"),
    "memo index 2^31": ops(b"Nr\xff\xff\xff\x7f"),
    "memo that was never written": ops(b"h\xff"),
    "number of 255 bytes": ops(b"\x8a\xff" + b"\x7f" * 255),
    "number of a million bytes": ops(b"\x8b" + struct.pack("<I", 10**6) + b"\x7f" * 10**6),
    "number of 2^31 bytes": ops(b"\x8b\xff\xff\xff\x7f"),
    "number of negative length": ops(b"\x8b\xff\xff\xff\xff"),
    "bytes of length 2^62": ops(b"\x8e" + struct.pack("<Q", 2**62)),
    "bytearray of length 2^40": ops(b"\x96" + struct.pack("<Q", 2**40)),
    "text of length 2^62": ops(b"\x8d" + struct.pack("<Q", 2**62)),
    "frame of length 2^62": file(lambda: b"\x80\x04\x95" + struct.pack("<Q", 2**62) + whole()[2:-1]),
    "stack underflow": file(lambda: b"\x80\x04\x87."),
    "two values at the end": file(lambda: b"\x80\x04NN."),
    "a million marks": ops(b"(" * 10**6),
    "three million opcodes": ops(b"N0" * 1_500_000 + b"N"),
    "protocol 0": file(lambda: pickle.dumps({"norm_obs": True}, 0)),
    "protocol 77": file(lambda: b"\x80\x4d" + whole()[2:]),
    # nesting and hashes
    "a million nested tuples": ops(tower(b"\x85", 900_000)),
    "200,000 nested lists": ops(b"]" * 200_000 + b"a" * 199_999),
    "200,000 nested frozensets": ops(b"(" * 200_000 + b")" + b"\x91" * 200_000),
    "nested states of an object": ops(b"".join([VEC + b")\x81}" + raw("obs_rms")] * 3000) + b"N" + b"sb" * 3000),
    "key whose hash takes 2^40 steps": ops(b"}" + _doubled(40) + b"Ns"),
    "member of a set whose hash takes 2^40 steps": ops(b"\x8f(" + _doubled(40) + b"\x90"),
    "100,000 keys of one hash": ops(
        b"}(" + b"".join(b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N" for n in range(100_000)) + b"u"
    ),
    "list that holds itself": file(lambda: whole(mean=b"]q\x00h\x00a")),
    "list of 2^40 entries, by sharing": file(
        lambda: whole(
            mean=b"](K\x01K\x01e"
            + b"".join(b"q" + bytes([n]) + b"0](h" + bytes([n]) + b"h" + bytes([n]) + b"e" for n in range(40))
        )
    ),
    "calls that copy a long list": ops(
        b"](" + b"N" * 100_000 + b"eq\x00" + (b"0cbuiltins\nlist\nh\x00\x85R") * 60_000, harmless=True
    ),
    "calls with a long tuple of arguments": ops(
        b"(" + b"N" * 100_000 + b"tq\x00" + b"0" + RMS + b"q\x01" + (b"0h\x01h\x00R") * 100_000
    ),
    # names and calls
    "os.system": ops(b"cos\nsystem\nC\x04true\x85R"),
    "builtins.eval": ops(b"cbuiltins\neval\n" + raw("1") + b"\x85R"),
    "builtins.getattr": ops(b"cbuiltins\ngetattr\n(N" + raw("x") + b"tR"),
    "numpy.load": ops(b"cnumpy\nload\n" + raw("x") + b"\x85R"),
    "copyreg._reconstructor": ops(b"ccopyreg\n_reconstructor\n(NNNtR"),
    "name without end": file(lambda: b"\x80\x04c" + b"a" * 10**6),
    "name that is a number": ops(b"K\x01K\x01\x93"),
    "name with control characters": ops(b"cos\x1b[2J\nsys\x07tem\n"),
    "keyword arguments (NEWOBJ_EX)": ops(VEC + b")}" + raw("venv") + b"Ns\x92"),
    "call of a text": ops(raw("os.system") + b")R"),
    "arguments that are no tuple": ops(RMS + b"]R"),
    "attributes of a class": ops(NDARRAY + b"N}" + raw("values") + b"K\x07s\x86b"),
    "attributes of None": ops(b"N}b"),
    "append to a tuple": ops(b")Na"),
    "keys of a list": ops(b"]NNs"),
    "odd number of keys and values": ops(b"}(N" + b"u"),
    # arrays
    "array of objects": file(lambda: whole(mean=array("O8"))),
    "structured array": file(lambda: whole(mean=array("V8", state=(3, "|", None, ("a",), {"a": 1}, 8, 1, 0)))),
    "dtype with a sub-array": file(
        lambda: whole(mean=array("f8", state=(3, "<", ("f8", (2**40,)), None, None, -1, -1, 0)))
    ),
    "array of dates": file(lambda: whole(mean=array("M8"))),
    "array of text": file(lambda: whole(mean=array("U8"))),
    "dtype that is a number": file(lambda: whole(mean=array(8))),
    "dtype of 10^6 bytes": file(lambda: whole(mean=array("f" + "9" * 10**6))),
    "shape larger than its bytes": file(lambda: whole(mean=array(shape=(2**40,)))),
    "shape smaller than its bytes": file(lambda: whole(mean=array(shape=(1,)))),
    "negative shape": file(lambda: whole(mean=array(shape=(-1, -5)))),
    "shape (0, 2^62)": file(lambda: whole(mean=array(shape=(0, 2**62), data=b"C\x00"))),
    "shape of 100,000 dimensions": file(lambda: whole(mean=array(shape=b"(" + b"K\x01" * 100_000 + b"t"))),
    "shape of texts": file(lambda: whole(mean=array(shape=("4",)))),
    "array from a text": file(lambda: whole(mean=array(data="x" * 40))),
    "array state of two parts": file(
        lambda: whole(mean=RECONSTRUCT + NDARRAY + raw((0,)) + b"C\x01b\x87R" + raw((1, 2)) + b"b")
    ),
    "array without state": file(lambda: whole(mean=RECONSTRUCT + NDARRAY + raw((0,)) + b"C\x01b\x87R")),
    "buffer in another order": file(
        lambda: whole(
            mean=FROMBUFFER + b"(C\x28" + bytes(40) + DTYPE + raw(("f8",)) + b"R" + raw((5,)) + raw("K") + b"tR"
        )
    ),
    "scalar of too few bytes": file(lambda: whole(epsilon=SCALAR + DTYPE + raw(("f8",)) + b"RC\x04abcd\x86R")),
    "scalar of objects": file(lambda: whole(epsilon=SCALAR + DTYPE + raw(("O8",)) + b"RC\x08abcdefgh\x86R")),
    # contents
    "no VecNormalize": file(lambda: pickle.dumps({"norm_obs": True})),
    "attribute missing": file(lambda: b"\x80\x04" + instance(VEC, {"norm_obs": True}) + b"."),
    "statistics that are a list": file(lambda: whole(obs_rms=[1.0])),
    "statistics inside themselves": file(lambda: whole(obs_rms=b"}q\x00" + raw("a") + b"h\x00s")),
    "mean that is a text": file(lambda: whole(mean="0")),
    "mean of dates": file(lambda: whole(mean=[date(2020, 1, 1)])),
    "mean and variance of other shapes": file(lambda: whole(mean=np.zeros(3))),
    "negative variance": file(lambda: whole(var=-np.ones(5))),
    "NaN": file(lambda: whole(mean=np.full(5, np.nan))),
    "epsilon of infinity": file(lambda: whole(epsilon=float("inf"))),
    "count of 10^400": file(lambda: whole(count=b"\x8a\xa8" + (10**400).to_bytes(168, "little"))),
    # files
    "empty": file(lambda: b""),
    "truncated": content("statistics", lambda bench: bench.statistics[:-20]),
    "noise": file(lambda: np.random.default_rng(0).bytes(5000)),
    "100 MB of zeros": file(lambda: bytes(100 * 2**20)),
}
