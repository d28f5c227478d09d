"""`nsrl retain`: the portable retention file of a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nsrl.editing.commands.config import RetainConfig
from nsrl.editing.commands.texts import read_texts
from nsrl.editing.knowledge.sampling import sample_texts
from nsrl.editing.models import load_model
from nsrl.editing.retention_file import RetentionFile
from nsrl.errors import NsrlError
from nsrl.files import given_path


def make_retention_file(
    config: RetainConfig, told: Callable[[str], None] = lambda _: None
) -> tuple[RetentionFile, Path]:
    """What a model answers to texts, as a file; and where it lies.

    Args:
        config: the settings.
        told: called with how far it is.

    Raises:
        NsrlError: the file is there already, or as `read_texts`, `load_model` and `RetentionFile.make`.
    """
    path = given_path(config.out)
    if path.exists():
        raise NsrlError(f"{config.out} is there already; choose another --out")
    texts = None if config.texts is None else read_texts(config.texts)
    told("loading the model")
    model, tokenizer = load_model(config.model, config.device)
    if texts is None:
        told(f"{config.samples} texts written by the model")
        texts = sample_texts(model, tokenizer, config.samples, config.max_tokens, config.seed)
    found = RetentionFile.make(
        model, texts, tokenizer, top_k=config.top_k, max_tokens=config.max_tokens, name=Path(config.model).name
    )
    return found, found.save(path)
