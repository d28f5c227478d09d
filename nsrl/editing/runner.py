"""One configuration of edits, carried out: load, preserve, edit, ask before and after, save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nsrl.editing.config import EditConfig
from nsrl.editing.editor import Editor
from nsrl.editing.edits import Edit
from nsrl.editing.knowledge.evaluation import ask
from nsrl.editing.knowledge.sampling import sample_texts
from nsrl.editing.methods import find_method
from nsrl.editing.models import load_model
from nsrl.editing.reports import EditorReport
from nsrl.errors import NsrlError
from nsrl.files import given_path

#: Tokens of a text that the model writes.
SAMPLED = 48


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        rows: prompt, most likely continuation before and after, wanted one; an edit each.
        written: edits whose target is the most likely continuation afterwards.
        report: of the editor.
        folder: of the edited model, or None.
    """

    rows: list[tuple[str, str, str, str]]
    written: int
    report: EditorReport
    folder: Path | None


def run_edits(config: EditConfig, told: Callable[[str], None] = lambda _: None) -> Outcome:
    """Carry a configuration out.

    Args:
        config: the settings.
        told: called with how far it is.

    Raises:
        NsrlError: no edits, a folder that is not empty, or as `load_model` and `Editor`.
    """
    find_method(config.method, **config.options)
    edits = [Edit(**edit) for edit in config.edits]
    if not edits:
        raise NsrlError("there are no edits; list them under edits in a configuration, as configs/edit does")
    folder = None if config.out is None else given_path(config.out)
    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise NsrlError(f"{config.out} is there already; choose another --out")
    texts = None if config.preserve is None else _lines(config.preserve)
    told("loading the model")
    model, tokenizer = load_model(config.model, config.device)
    editor = Editor(model, tokenizer, config.method, config.layers, **config.options)
    if texts is None:
        told(f"{config.samples} texts written by the model")
        texts = sample_texts(model, tokenizer, config.samples, SAMPLED, config.seed)
    editor.preserve(texts)
    questions = [(edit.text, edit.target) for edit in edits]
    before = ask(model, tokenizer, questions)
    for start in range(0, len(edits), config.batch_size):
        editor.apply(edits[start : start + config.batch_size])
        told(f"{min(start + config.batch_size, len(edits))} of {len(edits)} edits")
    after = ask(model, tokenizer, questions)
    if folder is not None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    words = [[tokenizer.decode([token]) for token in told_by.top.tolist()] for told_by in (before, after)]
    rows = [(edit.text, old, new, edit.target) for edit, old, new in zip(edits, *words, strict=True)]
    return Outcome(rows, int(after.exact.sum()), editor.report(), folder)


def _lines(name: str) -> list[str]:
    path = given_path(name)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise NsrlError(f"cannot read the texts of {name}: {error}; give a text file with one on every line") from error
    return [line for line in lines if line.strip()]
