"""Hostile npz files: retention buffers, and observation statistics in the same form."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.reading.hostile.workbench import Case, Workbench, array, content, zipped
from tests.reading.hostile.zipped import MIB, Member, assembled, crowded, overlapping


def buffer(**changes: Any) -> Case:
    """A buffer with other arrays; functions are called with the workbench."""
    return content(
        "buffer", lambda bench: bench.buffer_with(**{k: v() if callable(v) else v for k, v in changes.items()})
    )


def header(change: Callable[[dict[str, Any]], Any]) -> Case:
    """A buffer of whose JSON header something is changed, or replaced by what `change` returns."""

    def make(bench: Workbench) -> bytes:
        values = json.loads(bench.arrays["header"].tobytes())
        values = change(values) or values
        text = values if isinstance(values, bytes) else json.dumps(values).encode()
        return bench.buffer_with(header=np.frombuffer(text, dtype=np.uint8))

    return content("buffer", make)


def provenance(**changes: Any) -> Case:
    return header(lambda values: values["provenance"].update(changes))


def described(
    descr: str = "'<f4'",
    shape: str = "(16, 2)",
    fortran: str = "False",
    data: bytes = bytes(128),
    version: bytes = b"\x01\x00",
    padding: int = 0,
) -> Case:
    """A buffer whose outputs have a header that numpy did not write."""
    text = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode() + b" " * padding + b"\n"
    length = len(text).to_bytes(2 if version[0] == 1 else 4, "little")
    return buffer(outputs=b"\x93NUMPY" + version + length + text + data)


def zeros(size: int) -> bytes:
    """An npz of outputs that are zeros."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({size // 8}, 2), }}\n".encode()
    start = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
    return assembled({"outputs.npy": Member.zeros(size, start)})


def whole(make: Callable[[Workbench], bytes]) -> Case:
    return content("buffer", make)


def statistics(**arrays: Any) -> Case:
    """Observation statistics as an npz."""
    good = {"mean": np.zeros(5), "var": np.ones(5), "epsilon": 1e-8, "clip_obs": 10.0, "count": 1.0}
    return content("statistics", lambda bench: zipped({f"{k}.npy": array(v) for k, v in {**good, **arrays}.items()}))


def _pipe(bench: Workbench, path: Path) -> None:
    os.mkfifo(path)


CASES: dict[str, Case] = {
    # headers
    "array of objects": buffer(outputs=lambda: np.array([[{}]], dtype=object)),
    "structured array": buffer(outputs=lambda: np.zeros(4, dtype=[("a", "f4"), ("b", "O")])),
    "array of text": buffer(outputs=lambda: np.array([["a"]])),
    "array of dates": buffer(outputs=lambda: np.zeros((16, 2), dtype="M8[s]")),
    "complex numbers": buffer(outputs=lambda: np.zeros((16, 2), dtype=np.complex64)),
    "byte-swapped outputs": buffer(outputs=lambda: np.zeros((16, 2), dtype=">f4")),
    "dtype with a sub-array": described("('<f4', (1099511627776,))"),
    "dtype that is an expression": described("__import__('os')"),
    "dtype of 2^40 bytes": described("'|V1099511627776'"),
    "text of 2^30 signs": described("'<U1073741824'", "(1,)"),
    "float of 3 bytes": described("'<f3'"),
    "header of open brackets": described("(" * 9000),
    "header of minus signs": described(shape="(" + "-" * 9000 + "1,)"),
    "header of 10 MB": described(version=b"\x02\x00", padding=10**7),
    "header of 4 GB": buffer(outputs=b"\x93NUMPY\x02\x00\xff\xff\xff\xff{"),
    "format 9 of numpy": described(version=b"\x09\x00"),
    "shape larger than its data": described(shape="(1099511627776, 2)"),
    "shape smaller than its data": described(shape="(1, 2)"),
    "shape (0, 2^62)": described(shape="(0, 4611686018427387904)", data=b""),
    "negative shape": described(shape="(-16, -2)"),
    "shape of 5,000 digits": described(shape="(" + "9" * 5000 + ",)"),
    "shape of 2,000 dimensions": described(shape="(" + "1, " * 2000 + ")"),
    "order that is a number": described(fortran="2"),
    "no array": buffer(outputs=b"hello"),
    "member of another kind": whole(lambda bench: zipped({"a.txt": "hello", "outputs.npy": b""})),
    # archives
    "outputs of 2 GB in 2 MB": whole(lambda bench: zeros(2048 * MIB)),
    "62 members in one place": whole(lambda bench: overlapping()),
    "a million members": whole(lambda bench: crowded(10**6)),
    "cut off": whole(lambda bench: bench.buffer[:-50]),
    "a pipe": Case("buffer", _pipe),
    # contents
    "version 99": buffer(format=lambda: np.int64(99)),
    "version that is a fraction": buffer(format=lambda: np.float64(1)),
    "version that is a list": buffer(format=lambda: np.ones(3, dtype=np.int64)),
    "header of floats": buffer(header=lambda: np.zeros(3)),
    "header of 100,000 nested lists": header(lambda values: b"[" * 100_000),
    "header that is a list": header(lambda values: b"[1]"),
    "header with a number of 10^6 digits": header(lambda values: b'{"a": ' + b"9" * 10**6 + b"}"),
    "family that is a mapping": header(lambda values: values.update(family={"a": 1})),
    "provenance that is a number": header(lambda values: values.update(provenance=1)),
    "a million sources": provenance(sources=[{}] * 900_000),
    "20,000 sources": provenance(sources=[{}] * 20_000),
    "sources that are numbers": provenance(sources=[1]),
    "task that is a mapping": provenance(task={"a": 1}),
    "task of a megabyte": provenance(task="x" * 10**6),
    "fingerprint that is a number": provenance(fingerprint=3),
    "observations of NaN": buffer(observations=lambda: np.full((16, 5), np.nan, dtype=np.float32)),
    "outputs in half precision": buffer(outputs=lambda: np.zeros((16, 2), dtype=np.float16)),
    "weights of infinity": buffer(weights=lambda: np.full(16, np.inf, dtype=np.float32)),
    "nvec of 10^18": buffer(nvec=lambda: np.array([10**18])),
    "source of 10^18": buffer(source=lambda: np.full(16, 10**18)),
    "statistics of another shape": buffer(**{"normalizer/mean": lambda: np.zeros((2, 2))}),
    # statistics
    "statistics: text as mean": statistics(mean=np.array(["1", "2", "3", "4"])),
    "statistics: objects as mean": statistics(mean=np.array([1.0, None], dtype=object)),
    "statistics: dates as mean": statistics(mean=np.zeros(4, dtype="M8[s]")),
    "statistics: epsilon of four": statistics(epsilon=np.zeros(4)),
    "statistics: count of infinity": statistics(count=np.inf),
    "statistics: 1 GB in 1 MB": content("statistics", lambda bench: zeros(1024 * MIB)),
}
