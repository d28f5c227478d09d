"""A retention buffer inside another file: as the bytes of its own."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nsrl.errors import NsrlError
from nsrl.reading.limits import Unreadable
from nsrl.rl.retention.buffer import RetentionBuffer
from nsrl.rl.retention.states import RetainedStates


def packed(buffer: RetainedStates) -> Tensor:
    """The bytes of the file that `RetentionBuffer.save` writes, (B,) uint8."""
    with TemporaryDirectory() as folder:
        content = buffer.save(Path(folder) / "buffer.npz").read_bytes()
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def unpacked(content: Any) -> RetentionBuffer:
    """Inverse of `packed`; nothing is ever unpickled.

    Raises:
        Unreadable: anything that `packed` cannot have given.
    """
    if not isinstance(content, Tensor) or content.dtype != torch.uint8 or content.ndim != 1:
        raise Unreadable("the refreshed buffer is damaged")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "buffer.npz"
        path.write_bytes(content.cpu().numpy().tobytes())
        try:
            return RetentionBuffer.load(path)
        except NsrlError as error:
            raise Unreadable("the refreshed buffer is damaged") from error


def training_states(buffer: RetainedStates) -> Tensor:
    """Indices of the states that something is fitted to, (T,) int64."""
    return torch.tensor(np.flatnonzero((buffer.weights > 0.0) & ~buffer.heldout))
