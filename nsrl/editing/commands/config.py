"""The settings of `nsrl edit`: frozen dataclasses that a YAML file and the command line fill in; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nsrl.errors import NsrlError


@dataclass(frozen=True)
class EditConfig:
    """A model and the edits to be written into it.

    Attributes:
        model: a folder of transformers, or smollm2-135m.
        method: an editor by name, as "nsrl", "memit_history", "alphaedit".
        options: flags of the method, by name; the others keep their values.
        layers: pattern of the layers to edit; null takes the preset of the model's type.
        edits: each with prompt (one {} for the subject), subject and target.
        facts: JSON file in CounterFact's form or ZsRE's, whose facts are edited instead.
        count: facts that are taken from it, the first ones.
        batch_size: edits that are written at once.
        preserve: file with a text to be preserved on every line; null lets the model write some.
        samples: texts that the model writes, where there is no file.
        seed: of these texts.
        device: "cpu", "cuda", ...
        out: folder for the run and the edited model; null writes none, and what is interrupted begins anew.
    """

    model: str = "smollm2-135m"
    method: str = "nsrl"
    options: dict[str, Any] = field(default_factory=dict)
    layers: str | None = None
    edits: list[dict[str, str]] = field(default_factory=list)
    facts: str | None = None
    count: int = 100
    batch_size: int = 100
    preserve: str | None = None
    samples: int = 64
    seed: int = 0
    device: str = "cpu"
    out: str | None = None

    def __post_init__(self) -> None:
        for key in ("count", "batch_size", "samples"):
            if getattr(self, key) < 1:
                raise NsrlError(f"{key} must be at least 1, not {getattr(self, key)}")
        if self.facts is not None and self.edits:
            raise NsrlError("give edits or a file of facts, not both; --edits '[]' leaves out those of a configuration")
        for number, edit in enumerate(self.edits, start=1):
            if set(edit) != {"prompt", "subject", "target"}:
                raise NsrlError(
                    f"edit {number} must have prompt, subject and target, not {', '.join(edit) or 'nothing'}"
                )
