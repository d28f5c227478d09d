"""A checksum of what a file says, not of how it says it: zip's own cannot tell a file that was written anew."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

import torch
from torch import Tensor

from nsrl.reading.limits import DEPTH, Unreadable, shown


def checksum(value: Any) -> str:
    """SHA-256 of None, truth values, numbers, text, tensors, and lists and mappings of these.

    Lists and tuples count the same, and so does any order of a mapping: what JSON and torch.save give back has the
    checksum of what they were given. Tensors count by their dtype, shape and bits, wherever they lie.

    Raises:
        Unreadable: it holds anything else, or is nested deeper than the limits.
    """
    digest = hashlib.sha256()
    _add(digest, value, 0)
    return digest.hexdigest()


def check_checksum(value: Any, expected: Any) -> None:
    """Raise Unreadable unless this is what had the checksum."""
    if type(expected) is not str or not hmac.compare_digest(checksum(value).encode(), expected.encode()):
        raise Unreadable("its content does not have the checksum that was written with it")


def _add(digest: Any, value: Any, depth: int) -> None:
    if depth > DEPTH:
        raise Unreadable(f"lists and mappings are nested deeper than {DEPTH}")
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        _put(digest, "tensor", f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, dict):
        _put(digest, "mapping", str(len(value)).encode())
        for key in sorted(value, key=lambda key: (type(key).__name__, key)):
            _add(digest, key, depth + 1)
            _add(digest, value[key], depth + 1)
    elif isinstance(value, list | tuple):
        _put(digest, "list", str(len(value)).encode())
        for part in value:
            _add(digest, part, depth + 1)
    elif value is None or type(value) in (bool, int, str):
        _put(digest, type(value).__name__, str(value).encode("utf-8", "surrogatepass"))
    elif isinstance(value, float):
        _put(digest, "float", float.hex(value).encode())
    else:
        raise Unreadable(f"it holds {shown(type(value).__name__)}, neither a tensor nor plain")


def _put(digest: Any, kind: str, content: bytes) -> None:
    # The length too, so that no two values run together into the same bytes.
    digest.update(f"{kind} {len(content)} ".encode() + content)
