"""The state of an editor as a file: the weights as edited, and what later batches count with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from nsrl.editing.edits import Edit
from nsrl.editing.layer_memory import LayerMemory, State
from nsrl.editing.methods import Method
from nsrl.editing.models import require_transformers
from nsrl.editing.reports import BatchReport
from nsrl.errors import NsrlError
from nsrl.files import written_atomically
from nsrl.reading.checksums import checksum
from nsrl.versions import VERSION, Format

EDITS = Format("edits of a language model", 1)
#: Tensors of a layer.
PARTS = ("weight", "keys", "wanted")
#: What the edits were made with, for sentences.
WITH = {"model": "another model", "method": "another method", "tokens": "other preserved texts"}


def provenance(model: str, method: Method, tokens: int) -> dict[str, Any]:
    """What edits are made with, in the form in which a file gives it back.

    Args:
        model: hash of the unedited one.
        method: of the editor.
        tokens: preserved ones.
    """
    return json.loads(json.dumps({"model": model, "method": asdict(method), "tokens": tokens}))


def write_checkpoint(
    path: Path,
    made_with: Mapping[str, Any],
    edits: Sequence[Edit],
    batches: Sequence[BatchReport],
    penalty: float | None,
    memories: Sequence[LayerMemory],
) -> None:
    """Write the state of an editor as safetensors, whole or not at all.

    Args:
        path: of the file.
        made_with: as `provenance` has it.
        edits: that have been applied.
        batches: their reports.
        penalty: of the last batch.
        memories: of the layers.

    Raises:
        NsrlError: it cannot be written.
    """
    require_transformers()
    from safetensors.torch import save_file

    told = {
        **made_with,
        "edits": [asdict(edit) for edit in edits],
        "batches": [asdict(batch) for batch in batches],
        "penalty": penalty,
    }
    tensors = {}
    for memory in memories:
        state = memory.state()
        for part in PARTS:
            tensors[f"{part}.{memory.layer.name}"] = getattr(state, part).cpu().contiguous()
    header = {"format": str(EDITS.newest), "nsrl": VERSION, "edits": json.dumps(told)}
    header["checksum"] = checksum([json.loads(header["edits"]), tensors])
    with written_atomically(path) as temporary:
        save_file(tensors, temporary, header)


def read_checkpoint(
    path: Path, made_with: Mapping[str, Any], memories: Sequence[LayerMemory]
) -> tuple[list[Edit], list[BatchReport], float | None, list[State]]:
    """Edits, reports of their batches, last penalty and states of the layers; nothing is changed.

    Args:
        path: as `write_checkpoint` wrote it.
        made_with: that the edits have to be made with.
        memories: of the layers that they have to be of.

    Raises:
        NsrlError: there is no such file, it is damaged, or its edits were made with something else.
    """
    told, tensors = _read(path)
    # Files from before values could be searched for together do not say that they were not.
    told["method"] = {"together": None, **told["method"]}
    for key, what in WITH.items():
        if told[key] != made_with[key]:
            raise NsrlError(f"the edits in {path} were made with {what}; give those that they were made with")
    names = {f"{part}.{memory.layer.name}" for memory in memories for part in PARTS}
    if set(tensors) != names:
        raise NsrlError(f"the edits in {path} were written into other layers; give those that they were made with")
    edits, batches = [Edit(**edit) for edit in told["edits"]], [BatchReport(**batch) for batch in told["batches"]]
    states = []
    for memory in memories:
        weight, keys, wanted = (tensors[f"{part}.{memory.layer.name}"].to(memory.layer.weight.device) for part in PARTS)
        states.append(State(weight, keys, wanted, None))
    return edits, batches, told["penalty"], states


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    require_transformers()
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise NsrlError(f"{path}: there is no such file; write one with Editor.save")
    try:
        with safe_open(path, "pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        EDITS.check(path, int(header["format"]), header.get("nsrl"))
        told = json.loads(header["edits"])
        if checksum([told, tensors]) != header["checksum"]:
            raise ValueError("its content does not have the checksum that was written with it")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        if isinstance(error, NsrlError):
            raise
        raise NsrlError(f"{path} holds no edits, or is damaged ({error}); write it again with Editor.save") from error
    return told, tensors
