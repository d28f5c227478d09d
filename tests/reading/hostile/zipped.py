"""Hostile zips: agents whose directory, metadata or spaces ask for too much."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reading.hostile.workbench import Case, Workbench, content, zipped

MIB = 2**20
SPACE = "<class 'gymnasium.spaces.{}.{}'>"


def agent(make: Callable[[Workbench], bytes]) -> Case:
    return content("agent", make)


def data(harmless: bool = False, **changes: Any) -> Case:
    """An agent with other metadata."""
    return content("agent", lambda bench: bench.agent_with(**changes), harmless)


def text(make: Callable[[str], str]) -> Case:
    """An agent whose metadata are another text, made of the true one."""
    return agent(lambda bench: bench.agent_with(members={"data": make(_metadata(bench))}))


def _metadata(bench: Workbench) -> str:
    with zipfile.ZipFile(io.BytesIO(bench.agent)) as archive:
        return archive.read("data").decode()


def box(shape: list[Any], low: str = "-1.0", high: str = "1.0") -> dict[str, Any]:
    return {":type:": SPACE.format("box", "Box"), "dtype": "float32", "_shape": shape, "low": low, "high": high}


def other_bomb(size: int, method: int) -> bytes:
    """A zip of an agent's names whose `data` are zeros, compressed by any method."""
    return zipped({"data": bytes(size), "policy.pth": b""}, method)


@dataclass(frozen=True)
class Member:
    """A member of a zip that is put together by hand.

    Attributes:
        packed: its bytes in the file.
        size, crc: what they unpack to.
        method: 0 stored, 8 deflated.
    """

    packed: bytes
    size: int
    crc: int
    method: int = 8

    @classmethod
    def stored(cls, data: bytes) -> Member:
        """Bytes as they are."""
        return cls(data, len(data), zlib.crc32(data), 0)

    @classmethod
    def zeros(cls, size: int, start: bytes = b"") -> Member:
        """A start, and then so many zeros, deflated a megabyte at a time: 2 GB take a second."""
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        packed = packer.compress(start) + packer.flush(zlib.Z_FULL_FLUSH)
        block = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
        crc = zlib.crc32(start)
        for _ in range(size // MIB):
            crc = zlib.crc32(ZEROS, crc)
        return cls(packed + block * (size // MIB) + packer.flush(), size + len(start), crc)


ZEROS = bytes(MIB)


def assembled(members: dict[str, Member], shared: bool = False) -> bytes:
    """A zip of members; `shared` ones all lie in the place of the first, as in Fifield's bomb."""
    body, directory = b"", b""
    for name, member in members.items():
        position = 0 if shared else len(body)
        sizes = (member.crc, len(member.packed), member.size, len(name))
        if not shared or not body:
            body += struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, member.method, 0, 0, *sizes, 0)
            body += name.encode() + member.packed
        directory += struct.pack(
            "<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, member.method, 0, 0, *sizes, 0, 0, 0, 0, 0, position
        )
        directory += name.encode()
    count = len(members)
    return body + directory + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, len(directory), len(body), 0)


def edited(bench: Workbench, name: str, offset: int, layout: str, value: int) -> bytes:
    """The agent's zip with a number changed in the directory's entry of a member."""
    whole = bytearray(bench.agent)
    position = whole.rindex(b"PK\x01\x02", 0, whole.rindex(name.encode(), 0, whole.rindex(b"PK\x05\x06")))
    struct.pack_into(layout, whole, position + offset, value)
    return bytes(whole)


def doubled(bench: Workbench) -> bytes:
    stream = io.BytesIO(bench.agent)
    with zipfile.ZipFile(stream, "a") as archive:
        archive.writestr("data", "{}")
    return stream.getvalue()


def overlapping(count: int = 60) -> bytes:
    """Many entries of the directory that share one stream of zeros."""
    names = ["data", "policy.pth", *(f"m{n}" for n in range(count))]
    return assembled(dict.fromkeys(names, Member.zeros(8 * MIB)), shared=True)


def crowded(count: int) -> bytes:
    """A directory of so many entries, all of one empty member."""
    head = struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b"a"
    entry = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 65535, 65535, len(entry) * count, len(head), 0)
    return head + entry * count + end


def linked(bench: Workbench) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        info = zipfile.ZipInfo("data")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
        archive.writestr("policy.pth", b"")
    return stream.getvalue()


def pipe(bench: Workbench, path: Path) -> None:
    os.mkfifo(path)


def sparse(bench: Workbench, path: Path) -> None:
    """A file of 8 GB that takes 100 KB of the disk: the agent's zip behind a hole."""
    with path.open("wb") as file:
        file.truncate(8 * 2**30)
        file.seek(8 * 2**30)
        file.write(bench.agent)


NETWORK = {":type:": "<class 'dict'>", "net_arch": [64] * 10**5}
POLICY = "stable_baselines3.common.policies"

CASES: dict[str, Case] = {
    # directories
    "`data` of 2 GB in 2 MB": agent(
        lambda bench: assembled({"data": Member.zeros(2048 * MIB), "policy.pth": Member.stored(b"")})
    ),
    "`data` of 20 MB by bzip2": agent(lambda bench: other_bomb(20 * MIB, zipfile.ZIP_BZIP2)),
    "`data` of 20 MB by lzma": agent(lambda bench: other_bomb(20 * MIB, zipfile.ZIP_LZMA)),
    "weights of 1 GB in 1 MB": agent(
        lambda bench: assembled(
            {"data": Member.stored(_metadata(bench).encode()), "policy.pth": Member.zeros(1024 * MIB)}
        )
    ),
    "two members of one name": agent(doubled),
    "62 members in one place": agent(lambda bench: overlapping()),
    "a million members": agent(lambda bench: crowded(10**6)),
    "member that is a link": agent(linked),
    "encrypted member": agent(lambda bench: edited(bench, "data", 8, "<H", 1)),
    "member of 4 GB by its directory": agent(lambda bench: edited(bench, "policy.pth", 24, "<I", 2**32 - 2)),
    "compressed size beyond the file": agent(lambda bench: edited(bench, "policy.pth", 20, "<I", 2**31)),
    "member before the file": agent(lambda bench: edited(bench, "policy.pth", 42, "<I", 2**32 - 2)),
    "unknown compression": agent(lambda bench: edited(bench, "policy.pth", 10, "<H", 99)),
    "wrong checksum": agent(lambda bench: edited(bench, "policy.pth", 16, "<I", 1)),
    "directory cut off": agent(lambda bench: bench.agent[:-30]),
    "no zip": agent(lambda bench: b"hello"),
    "a pipe": Case("agent", pipe),
    "8 GB of holes": Case("agent", sparse),
    "/dev/zero": Case("agent", lambda bench, path: path.symlink_to("/dev/zero")),
    # metadata
    "100,000 nested lists": text(lambda true: "[" * 100_000),
    "1,000 nested mappings inside": text(lambda true: true[:-1] + ', "x": ' + '{"a":' * 1000 + "1" + "}" * 1001),
    "number of a million digits": text(lambda true: true[:-1] + ', "gamma": ' + "9" * 10**6 + "}"),
    "four million entries": text(lambda true: true[:-1] + ', "x": [' + "[]," * 4_000_000 + "0]}"),
    "30 million signs, one beyond ASCII": text(lambda true: true[:-1] + ', "x": "\U0001f600' + "a" * 30_000_000 + '"}'),
    "key twice": text(lambda true: true[:-1] + ', "gamma": 0.5}'),
    "metadata that are no text": agent(lambda bench: bench.agent_with(members={"data": b"\xff\xfe{}"})),
    "metadata that are a list": text(lambda true: "[1]"),
    "gamma of NaN": text(lambda true: true.replace('"gamma": 0.99', '"gamma": NaN')),
    "n_steps of 10^9": data(n_steps=10**9),
    "n_steps of -1": data(n_steps=-1),
    "n_epochs of 10^30": data(n_epochs=10**30),
    "batch_size of 2.5": data(batch_size=2.5),
    "schedule in a million wrappers": data(
        learning_rate={":type:": "x", "value_schedule": "FloatSchedule(" * 500_000 + ")" * 500_000}, harmless=True
    ),
    "policy class with control characters": data(
        policy_class={"__module__": "\x1b[2J" * 1000, "__init__": "<function P.__init__ at"}
    ),
    "policy class of a megabyte": data(policy_class={"__module__": "m" * 10**6, "__init__": "x"}),
    "policy argument of 100,000 entries": data(policy_kwargs={"odd": [0] * 100_000}),
    "hidden layers of 10^9 units": data(policy_kwargs={"net_arch": {"pi": [10**9], "vf": [10**9]}}, harmless=True),
    "100,000 hidden layers": data(policy_kwargs=NETWORK, harmless=True),
    "features of 10^9 units": data(
        policy_kwargs={"features_extractor_kwargs": {"features_dim": 10**9}},
        policy_class={"__module__": POLICY, "__init__": "<function ActorCriticCnnPolicy.__init__ at 0>"},
        observation_space={**box([4, 84, 84], "0", "255"), "dtype": "uint8"},
    ),
    # spaces
    "observations of 10^9 entries": data(observation_space=box([10**9])),
    "observations of 10^6 entries, and weights for 5": data(observation_space=box([10**6])),
    "observations of 7 million entries, in double precision": data(
        observation_space={**box([7 * 10**6]), "dtype": "float64"}
    ),
    "10,000 dimensions of 10^18": data(observation_space=box([10**18] * 10**4)),
    "negative dimensions": data(observation_space=box([-2, -2])),
    "bounds of a million words": data(observation_space=box([5], low="[" + "1 " * 10**6 + "]")),
    "bounds that are a number of 5,000 digits": data(observation_space=box([5], low="9" * 5000)),
    "10^12 actions": data(action_space={":type:": SPACE.format("discrete", "Discrete"), "n": "1000000000000"}),
    "10^9 actions": data(action_space={":type:": SPACE.format("discrete", "Discrete"), "n": "1000000000"}),
    "2^40 binary actions": data(action_space={":type:": SPACE.format("multi_binary", "MultiBinary"), "n": 2**40}),
    "10^9 actions of two": data(
        action_space={":type:": SPACE.format("multi_discrete", "MultiDiscrete"), "nvec": "[2]", "_shape": [10**9]}
    ),
    "Dict space of 100,000 spaces": data(
        observation_space={
            ":type:": SPACE.format("dict", "Dict"),
            "spaces": "Dict(" + "'a': Discrete(2), " * 100_000 + ")",
        }
    ),
    "Dict space of open brackets": data(
        observation_space={":type:": SPACE.format("dict", "Dict"), "spaces": "'a': M" + "(" * 900_000}
    ),
    "Dict space of nested calls": data(
        observation_space={":type:": SPACE.format("dict", "Dict"), "spaces": "'a': MultiBinary(" + "()" * 400_000}
    ),
    "Dict space of quotes": data(observation_space={":type:": SPACE.format("dict", "Dict"), "spaces": "'\\" * 240_000}),
    "Dict space of minus signs": data(
        observation_space={
            ":type:": SPACE.format("dict", "Dict"),
            "spaces": "Dict('a': MultiBinary(" + "-" * 100_000 + "1))",
        }
    ),
}
