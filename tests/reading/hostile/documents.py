"""Hostile configurations in YAML, and data sets of images."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.reading.hostile.workbench import Case, Workbench, content


def yaml(make: Callable[[], str | bytes]) -> Case:
    return content("configuration", lambda bench: make())


def text(written: str) -> Case:
    return content("configuration", lambda bench: written)


def suite(written: str) -> Case:
    return content("suite", lambda bench: written)


def doubling(first: str, each: str, levels: int = 30) -> str:
    """Anchors of which each repeats the one before it ten times."""
    lines = [first.format(0)]
    for level in range(1, levels):
        lines.append(each.format(level, ", ".join([f"*a{level - 1}"] * 10)))
    return "\n".join(lines)


def link(target: str) -> Callable[[Workbench, Path], Any]:
    return lambda bench, path: path.symlink_to(target)


def _pipe(bench: Workbench, path: Path) -> None:
    os.mkfifo(path)


def digits(make: Callable[[], bytes]) -> Case:
    return content("digits", lambda bench: make())


def idx(*sizes: int, data: bytes = b"", dimensions: int = 3) -> bytes:
    return gzip.compress(bytes((0, 0, 8, dimensions)) + struct.pack(f">{len(sizes)}I", *sizes) + data)


def picture(image: bytes, rows: str = "v0.JPEG n0 0 0 1 1\n", names: str = "n0\n") -> Case:
    """A folder of TinyImageNet with one image."""

    def make(bench: Workbench, path: Path) -> None:
        images = path / "train" / "n0" / "images"
        images.mkdir(parents=True)
        (images / "n0_0.JPEG").write_bytes(image)
        (path / "wnids.txt").write_text(names)
        (path / "val" / "images").mkdir(parents=True)
        (path / "val" / "images" / "v0.JPEG").write_bytes(png(64, 64))
        (path / "val" / "val_annotations.txt").write_text(rows)

    return Case("pictures", make)


def png(width: int, height: int, extra: bytes = b"", rows: int | None = None) -> bytes:
    """A black picture of these dimensions."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress((b"\x00" + bytes(3 * width)) * (height if rows is None else rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def text_chunk(size: int) -> bytes:
    data = b"a\x00\x00" + zlib.compress(bytes(size))
    return struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))


CASES: dict[str, Case] = {
    # YAML that grows
    "ten aliases of ten aliases, 30 levels": yaml(lambda: doubling("a0: &a0 [x]", "a{0}: &a{0} [{1}]")),
    "the same as a value": yaml(
        lambda: "agent:\n  " + doubling("a0: &a0 [x]", "a{0}: &a{0} [{1}]").replace("\n", "\n  ")
    ),
    "merge keys of merge keys, 30 levels": yaml(lambda: doubling("a0: &a0 {{k: 1}}", "a{0}: &a{0} {{<<: [{1}]}}")),
    "alias inside its own anchor": text("agent: &a [*a]"),
    "merge of itself": text("agent: &a {<<: *a}"),
    "100,000 open brackets": yaml(lambda: "agent: " + "[" * 100_000),
    "10,000 open braces": yaml(lambda: "agent: " + "{a: " * 10_000),
    "600 levels of indentation": yaml(lambda: "".join(" " * n + "a:\n" for n in range(600))),
    "2,000 dashes in a row": yaml(lambda: "agent:\n" + "- " * 2000 + "x"),
    "100,000 question marks": yaml(lambda: "? " * 100_000),
    "20,000 anchors": yaml(lambda: "agent: [" + ", ".join(f"&a{n} 1" for n in range(20_000)) + "]"),
    "ten megabytes": yaml(lambda: "agent: " + "x" * 10**7),
    "100,000 entries": yaml(lambda: "agent: [" + "1," * 100_000 + "1]"),
    "quarter of a megabyte of colons": yaml(lambda: ": " * 120_000),
    "long line of quotes": yaml(lambda: "agent: " + "'" * 249_999),
    "tabs": yaml(lambda: "agent:\n" + "\t" * 100_000),
    "a thousand documents": yaml(lambda: "--- {}\n" * 1000),
    "tag directives": yaml(lambda: "%TAG !a! tag:x,2000:\n" * 5000 + "--- {}"),
    # values
    "number of a million digits": yaml(lambda: "seed: " + "9" * 200_000),
    "number in base 60 of 80,000 places": yaml(lambda: "seed: 1" + ":59" * 80_000),
    "hexadecimal number of 200,000 digits": yaml(lambda: "seed: 0x" + "f" * 200_000),
    "binary number of 200,000 digits": yaml(lambda: "seed: 0b" + "1" * 200_000),
    "number of 65 bits": text("seed: 36893488147419103232"),
    "NaN as a budget": text("retention: {kl_budget: .nan}"),
    "infinity as a seed": text("seed: .inf"),
    "!!int that is none": text("seed: !!int x"),
    "!!int of nothing": text("seed: !!int ''"),
    "!!bool that is none": text("trust: !!bool maybe"),
    "!!float that is none": text("penalty: !!float x"),
    "!!binary": text("agent: !!binary aGVsbG8="),
    "!!timestamp": text("agent: !!timestamp 2020-01-01"),
    "!!set": text("agent: !!set {a, b}"),
    "!!omap": text("agent: !!omap [a: 1]"),
    "!!pairs": text("agent: !!pairs [a: 1]"),
    "!!python/object/apply": text("agent: !!python/object/apply:os.system ['true']"),
    "!!python/object/new": text("agent: !!python/object/new:os.system ['true']"),
    "!!python/name": text("agent: !!python/name:os.system"),
    "!!python/module": text("agent: !!python/module:antigravity"),
    "!!python/tuple": text("agent: !!python/tuple [1]"),
    "a tag of its own": text("agent: !x 1"),
    "a key that is a list": text("? [a, b]\n: 1"),
    "a key that is a mapping": text("? {a: b}\n: 1"),
    "a key with an anchor, twice": text("&a seed: 1\n*a : 2"),
    "a key twice": text("seed: 1\nseed: 2"),
    "a key that is null": text("null: 1"),
    "an unknown key of 1,000 letters": yaml(lambda: "x" * 1000 + ": 1"),
    "a key with control characters": text('"\\e[2Jseed": 1'),
    "a class to import": text("retention: {class_path: antigravity.x}"),
    "a class to import, as a text": text("retention: '{class_path: antigravity.x}'"),
    "a class to import in a budget": text("retention: {task_budgets: {class_path: antigravity.x}}"),
    "a class to import inside a list": text("retention: {task_budgets: {a: [{class_path: antigravity.x}]}}"),
    "a list for a mapping": text("[1, 2]"),
    "a number for a mapping": text("3"),
    "a mapping for a number": text("seed: {a: 1}"),
    "UTF-16": yaml(lambda: "seed: 1".encode("utf-16")),
    "bytes that are no text": yaml(lambda: b"seed: \xff\xfe"),
    "NUL": yaml(lambda: b"seed: \x00"),
    "open quote": text("agent: 'x"),
    "a pipe": Case("configuration", _pipe),
    "/dev/zero": Case("configuration", link("/dev/zero")),
    "/dev/stdin": Case("configuration", link("/dev/stdin")),
    "a link to itself": Case("configuration", link("c.yaml")),
    "a folder": Case("configuration", lambda bench, path: path.mkdir()),
    # suites
    "suite: a number": suite("3"),
    "suite: seeds that are text": suite("{pretraining: a, finetuning: b, seeds: [x], methods: {}}"),
    "suite: seeds of 10^30": suite(f"{{pretraining: a, finetuning: b, seeds: [{10**30}], methods: {{}}}}"),
    "suite: files that are numbers": suite("{pretraining: 1, finetuning: [2], seeds: [0], methods: {}}"),
    "suite: methods that are a list": suite("{pretraining: a, finetuning: b, seeds: [0], methods: [1]}"),
    # images
    "idx of 16 TB in 40 bytes": digits(lambda: idx(2**14, 2**15, 2**15)),
    "idx of 120 MB in 120 KB, cut off": digits(lambda: idx(60_000, 45, 45, data=bytes(10**6))),
    "idx that goes on": digits(lambda: idx(2, 28, 28, data=bytes(30 * 2**20))),
    "idx of two dimensions": digits(lambda: idx(2, 28, data=bytes(56), dimensions=2)),
    "no gzip": digits(lambda: b"hello"),
    "gzip cut off": digits(lambda: idx(2, 28, 28, data=bytes(1568))[:-12]),
    "idx in a pipe": Case("digits", _pipe),
    "image of 50,000 x 50,000": picture(png(50_000, 50_000, rows=1)),
    "image of 8,000 x 8,000": picture(png(8000, 8000, rows=1)),
    "image whose text unpacks to 100 MB": picture(png(64, 64, text_chunk(100 * 2**20))),
    "image cut off": picture(png(64, 64)[:-30]),
    "image in another form (GIF)": picture(b"GIF89a" + struct.pack("<2H", 64, 64) + bytes(100)),
    "image that is PostScript": picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n"),
    "class that leads elsewhere": picture(png(64, 64), names="../../etc\n"),
    "image that lies elsewhere": picture(png(64, 64), rows="../../../x n0 0 0 1 1\n"),
    "the same image 100,000 times": picture(png(64, 64), rows="v0.JPEG n0 0 0 1 1\n" * 100_000),
    "annotations of 20 MB": picture(png(64, 64), rows="x" * (20 * 2**20)),
}
