"""The settings of `nsrl edit`, `retain` and `forecast`: frozen dataclasses from YAML and command line; no torch."""

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
        _check_counts(self, "count", "batch_size", "samples")
        if self.facts is not None and self.edits:
            raise NsrlError("give edits or a file of facts, not both; --edits '[]' leaves out those of a configuration")
        for number, edit in enumerate(self.edits, start=1):
            if set(edit) != {"prompt", "subject", "target"}:
                raise NsrlError(
                    f"edit {number} must have prompt, subject and target, not {', '.join(edit) or 'nothing'}"
                )


@dataclass(frozen=True)
class RetainConfig:
    """A model and the texts to which its answers are kept.

    Attributes:
        model: a folder of transformers, or smollm2-135m.
        texts: file with a text on every line; null lets the model write some.
        samples: texts that the model writes, where there is no file.
        max_tokens: of a text; the rest of a longer one is left out.
        top_k: likeliest classes kept of every token; the others are one mass.
        seed: of the model's texts.
        device: "cpu", "cuda", ...
        out: the file, safetensors.
    """

    model: str = "smollm2-135m"
    texts: str | None = None
    samples: int = 64
    max_tokens: int = 64
    top_k: int = 64
    seed: int = 0
    device: str = "cpu"
    out: str = "retention.safetensors"

    def __post_init__(self) -> None:
        _check_counts(self, "samples", "max_tokens", "top_k")


@dataclass(frozen=True)
class ForecastConfig:
    """A model, old texts and new ones, and how it would be fine-tuned on these.

    Attributes:
        model: a folder of transformers, or smollm2-135m.
        preserve: file with an old text on every line.
        new: file with a new text on every line.
        learning_rate: of the optimizer.
        steps: that it would make.
        optimizer: "adam" or "sgd".
        batch_size: texts of a step.
        max_tokens: of a text; the rest of a longer one is left out.
        calibration: JSON file with a measured calibration, as nsrl bench post_training_forecast leaves; null for none.
        device: "cpu", "cuda", ...
    """

    model: str = "smollm2-135m"
    preserve: str = "old.txt"
    new: str = "new.txt"
    learning_rate: float = 1e-5
    steps: int = 10
    optimizer: str = "adam"
    batch_size: int = 8
    max_tokens: int = 64
    calibration: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        _check_counts(self, "steps", "batch_size", "max_tokens")


def _check_counts(config: Any, *keys: str) -> None:
    for key in keys:
        if getattr(config, key) < 1:
            raise NsrlError(f"{key} must be at least 1, not {getattr(config, key)}")
