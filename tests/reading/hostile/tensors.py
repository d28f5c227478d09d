"""Hostile weights and task files: what `torch.save` never writes."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.reading.hostile.workbench import Case, Workbench, content, saved, zipped

FIRST = "mlp_extractor__policy_net__0__weight"
FLOAT = b"ctorch\nFloatStorage\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def weights(make: Callable[[Workbench], Any]) -> Case:
    """An agent with these weights."""
    return content("agent", lambda bench: bench.agent_with(weights=make(bench)))


def changed(make: Callable[[Workbench], Any]) -> Case:
    """An agent of whose weights the first is another tensor."""
    return weights(lambda bench: bench.weights(**{FIRST: make(bench)}))


def built(
    sizes: Any = (2,),
    strides: Any = (1,),
    offset: Any = 0,
    count: Any = 4,
    key: Any = "0",
    data: bytes = bytes(16),
    kind: bytes = FLOAT,
    **members: Any,
) -> bytes:
    """A file of one tensor, put together by hand."""

    def raw(value: Any) -> bytes:
        return value if isinstance(value, bytes) else pickle.dumps(value, 3)[2:-1]

    storage = b"(" + raw("storage") + kind + raw(key) + raw("cpu") + raw(count) + b"tQ"
    tensor = REBUILD + b"(" + storage + raw(offset) + raw(sizes) + raw(strides) + b"\x89}tR"
    pickled = b"\x80\x02}" + raw("a") + tensor + b"s."
    return zipped({"archive/data.pkl": pickled, "archive/version": "3", "archive/data/0": data, **members})


def hand(**parts: Any) -> Case:
    return weights(lambda bench: built(**parts))


def stream(change: Callable[[bytes], bytes]) -> Case:
    """Weights as torch before 1.6 wrote them, changed."""
    return weights(lambda bench: change(saved(bench.weights(), _use_new_zipfile_serialization=False)))


def aliased(count: int) -> dict[str, torch.Tensor]:
    """Many tensors of one storage."""
    whole = torch.zeros(200_000)
    return {f"w{n}": whole[n:] for n in range(count)}


def script(bench: Workbench) -> bytes:
    """An archive of TorchScript, which is code."""
    stream = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), stream)
    return stream.getvalue()


class Subclass(torch.Tensor):
    """A tensor of another class."""


def sparse_outside() -> torch.Tensor:
    """A sparse tensor whose indices lie outside its shape: using it reads out of bounds."""
    with torch.sparse.check_sparse_tensor_invariants(False):
        return torch.sparse_csr_tensor(torch.tensor([0, 2**20]), torch.tensor([0]), torch.tensor([1.0]), (1, 4))


def recompressed(bench: Workbench) -> bytes:
    """Weights whose inner members are compressed, 64 MB in 64 KB."""
    with zipfile.ZipFile(io.BytesIO(saved({"a": torch.zeros(2**24)}))) as archive:
        return zipped({name: archive.read(name) for name in archive.namelist()}, zipfile.ZIP_DEFLATED)


def many_opcodes() -> bytes:
    return zipped({"archive/data.pkl": b"\x80\x02" + b"N0" * 2_000_000 + b"N.", "archive/version": "3"})


def task(make: Callable[[Workbench], bytes]) -> Case:
    return content("task", make)


def progress(**changes: Any) -> Case:
    """A task whose strategy's progress is changed."""
    return task(lambda bench: bench.task_with(lambda t: t["state"]["progress"].update(changes)))


def entry(**changes: Any) -> Case:
    """A task whose results are changed."""
    return task(lambda bench: bench.task_with(lambda t: t["entry"].update(changes)))


def pipe(bench: Workbench, path: Path) -> None:
    os.mkfifo(path)


CASES: dict[str, Case] = {
    # what a tensor may be
    "stride of 0 in 3.5 GB": changed(lambda bench: torch.zeros(1).expand(30_000, 30_000)),
    "overlapping strides": changed(lambda bench: torch.zeros(100).as_strided((10, 10), (1, 1))),
    "sparse tensor (COO)": changed(lambda bench: torch.eye(3).to_sparse()),
    "sparse tensor with indices outside": changed(lambda bench: sparse_outside()),
    "quantised tensor": changed(lambda bench: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)),
    "meta tensor": changed(lambda bench: torch.empty(10**12, device="meta")),
    "complex tensor": changed(lambda bench: torch.ones(2, dtype=torch.complex64)),
    "8-bit floats": changed(lambda bench: torch.ones(2).to(torch.float8_e4m3fn)),
    "tensor of another class": changed(lambda bench: torch.ones(2).as_subclass(Subclass)),
    "NaN in the weights": changed(lambda bench: torch.full((64, 5), torch.nan)),
    "64-bit weights": changed(lambda bench: torch.zeros(64, 5, dtype=torch.float64).expand(64, 5)[:, :4]),
    "names that are numbers": weights(lambda bench: {1: torch.ones(1)}),
    "a list of tensors": weights(lambda bench: [torch.ones(1)]),
    "a dtype": weights(lambda bench: {"a": torch.float32}),
    "a device": weights(lambda bench: {"a": torch.device("cpu")}),
    "a size": weights(lambda bench: {"a": torch.Size([1])}),
    "a module": weights(lambda bench: torch.nn.Linear(2, 2)),
    "an array of numpy": weights(lambda bench: {"a": torch.zeros(2).numpy()}),
    "20,000 tensors of one storage": weights(lambda bench: aliased(20_000)),
    "900 tensors of one storage": weights(lambda bench: aliased(900)),
    "100 nested mappings": weights(lambda bench: _nested(200)),
    "a mapping inside itself": weights(lambda bench: _circle()),
    "TorchScript": weights(script),
    "a pickle that calls print": weights(lambda bench: pickle.dumps(_Call(print, "ran"))),
    "a pickle of torch.load": weights(lambda bench: pickle.dumps(_Call(torch.load, "x"))),
    # how a file is made
    "tensor behind its storage": hand(offset=3),
    "tensor longer than its storage": hand(sizes=(5,)),
    "storage shorter than announced": hand(count=2**40, sizes=(2**40,)),
    "storage longer than announced": hand(count=1, sizes=(1,)),
    "negative size": hand(sizes=(-1,)),
    "negative stride": hand(strides=(-1,)),
    "sizes of 2^62": hand(sizes=(0, 2**62, 2**62), strides=(1, 1, 1)),
    "sizes without strides": hand(strides=()),
    "sizes that are truth values": hand(sizes=(True,)),
    "1,000 dimensions": hand(sizes=(1,) * 1000, strides=(1,) * 1000),
    "storage of an unknown class": hand(kind=b"ctorch\nUntypedStorage\n"),
    "storage of no class": hand(kind=b"X\x05\x00\x00\x00float"),
    "storage of a negative count": hand(count=-4),
    "key that leads elsewhere": hand(key="../../version"),
    "key that is a number": hand(key=0),
    "truth values of 7": hand(kind=b"ctorch\nBoolStorage\n", data=b"\x07" * 4),
    "two data.pkl": hand(**{"other/data.pkl": b"\x80\x02N."}),
    "no data.pkl": weights(lambda bench: zipped({"archive/version": "3"})),
    "members compressed inside": weights(recompressed),
    "four million opcodes": weights(lambda bench: many_opcodes()),
    "weights that are no file": weights(lambda bench: b"PK\x03\x04"),
    # before torch 1.6
    "old form cut off": stream(lambda whole: whole[:-100]),
    "old form with another magic number": stream(lambda whole: whole[:5] + b"\x00" + whole[6:]),
    "old form with a count of 2^60": weights(lambda bench: _counted(2**60)),
    "old form of a sparse tensor": weights(
        lambda bench: saved({"a": torch.eye(3).to_sparse()}, _use_new_zipfile_serialization=False)
    ),
    "old form with a stride of 0": weights(
        lambda bench: saved({"a": torch.zeros(1).expand(30_000, 30_000)}, _use_new_zipfile_serialization=False)
    ),
    # tasks of a continual run
    "task: stride of 0 in 3.5 GB": progress(feasible=torch.zeros(1).expand(30_000, 30_000)),
    "task: a list": task(lambda bench: saved([1, 2])),
    "task: no entry": task(lambda bench: saved({"state": {}})),
    "task: results that are text": entry(scores=["1"]),
    "task: results that are no list": entry(scores=1.0),
    "task: negative seconds": entry(train_seconds=-1.0),
    "task: memory of 2^70 bytes": entry(memory_bytes=2**70),
    "task: diagnostics that are tensors": entry(diagnostics={"kl": torch.zeros(1)}),
    "task: weights that are text": task(lambda bench: bench.task_with(lambda t: t["state"].update(weights="x"))),
    "task: weights of another network": task(
        lambda bench: bench.task_with(lambda t: t["state"].update(weights={"x": torch.zeros(1)}))
    ),
    "task: no progress": task(lambda bench: bench.task_with(lambda t: t["state"].update(progress={}))),
    "task: queue beyond the memory": progress(queue=torch.tensor([10**6])),
    "task: queue of floats": progress(queue=torch.zeros(3)),
    "task: generator of zeros": progress(generator=torch.zeros(5056, dtype=torch.uint8)),
    "task: generator that is text": progress(generator="x"),
    "task: multiplier of NaN": progress(multiplier=float("nan")),
    "task: counts that are text": progress(counts=["a", "b", "c"]),
    "task: point of another size": progress(feasible=torch.zeros(3)),
    "task: a pipe": Case("task", pipe),
    "task: empty": task(lambda bench: b""),
}


def _counted(count: int) -> bytes:
    """Four numbers in the old form, said to be `count`."""
    whole = saved({"a": torch.zeros(4)}, _use_new_zipfile_serialization=False)
    return whole[:-24] + struct.pack("<Q", count) + whole[-16:]


def _nested(depth: int) -> Any:
    value: Any = torch.zeros(1)
    for _ in range(depth):
        value = {"a": value}
    return value


def _circle() -> Any:
    value: Any = OrderedDict()
    value["a"] = value
    return value


class _Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call
