"""One configuration of edits, carried out: load, preserve, edit batch by batch, ask before and after, save.

In a folder a run leaves its configuration, the texts, and after every batch the editor. One that finds such there goes
on behind them and comes to the same end, to the last bit, as without the interruption.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from nsrl.editing.commands.config import EditConfig
from nsrl.editing.commands.figure import draw_edits
from nsrl.editing.commands.texts import read_texts
from nsrl.editing.editor import Editor
from nsrl.editing.edits import Edit
from nsrl.editing.knowledge.evaluation import Judge, ask
from nsrl.editing.knowledge.fact_files import read_facts
from nsrl.editing.knowledge.known_facts import HELDOUT, questions
from nsrl.editing.knowledge.sampling import sample_texts
from nsrl.editing.methods import find_method
from nsrl.editing.models import load_model
from nsrl.errors import NsrlError
from nsrl.files import write_json, write_stamp, write_text
from nsrl.versions import RUN

#: Tokens of a text that the model writes.
SAMPLED = 48
CONFIG, METRICS, TEXTS, EDITS, FIGURE = "config.yaml", "metrics.json", "texts.json", "edits.safetensors", "edits.png"


def run_edits(
    config: EditConfig, folder: Path | None = None, told: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Carry a configuration out.

    Args:
        config: the settings.
        folder: of the run; it has the edited model at the end. None writes nothing.
        told: called with how far it is.

    Returns:
        The content of metrics.json: `rows` (prompt, most likely continuation before and after, wanted one, its
        probability before and after), `written` (edits whose target is the most likely continuation afterwards),
        `batches` and `report` of the editor, and for facts of a file their `scores`, as `Scores` has them.

    Raises:
        NsrlError: no edits, a damaged folder, or as `read_facts`, `load_model` and `Editor`.
    """
    find_method(config.method, **config.options)
    facts = [] if config.facts is None else read_facts(config.facts, config.count)
    edits = [fact.edit for fact in facts] or [Edit(**edit) for edit in config.edits]
    if not edits:
        raise NsrlError("there are no edits; list them under edits in a configuration, as configs/edit does")
    texts = None if config.preserve is None else read_texts(config.preserve)
    told("loading the model")
    model, tokenizer = load_model(config.model, config.device)
    editor = Editor(model, tokenizer, config.method, config.layers, **config.options)
    if folder is not None and not (folder / CONFIG).is_file():
        write_stamp(folder, RUN)
        write_text(folder / CONFIG, yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))
    if texts is None:
        texts = _written_texts(model, tokenizer, config, folder, told)
    editor.preserve(texts)
    prompts = [(edit.text, edit.target) for edit in edits]
    before = ask(model, tokenizer, prompts)
    judge = Judge(model, tokenizer, facts, questions(), HELDOUT) if facts else None
    _apply(editor, edits, config.batch_size, None if folder is None else folder / EDITS, told)
    after = ask(model, tokenizer, prompts)
    words = [[tokenizer.decode([token]) for token in answers.top.tolist()] for answers in (before, after)]
    chances = [answers.likelihood.exp().tolist() for answers in (before, after)]
    targets = [edit.target for edit in edits]
    rows = list(zip([edit.text for edit in edits], *words, targets, *chances, strict=True))
    report = editor.report()
    metrics = {
        "rows": rows,
        "written": int(after.exact.sum()),
        "report": {**asdict(report), "kept_share": dict(report.kept_share)},
        "told": str(report),
        "scores": None if judge is None else judge.measure(model).as_dict(),
    }
    if folder is not None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        draw_edits(metrics, folder / FIGURE)
        write_json(folder / METRICS, metrics)
    return metrics


def _apply(editor: Editor, edits: Sequence[Edit], size: int, path: Path | None, told: Callable[[str], None]) -> None:
    if path is not None and path.is_file():
        editor.load(path)
        if list(editor.edits) != list(edits[: len(editor.edits)]):
            raise NsrlError(f"{path} holds other edits than the configuration of its run; give --out a new folder")
        told(f"{len(editor.edits)} of {len(edits)} edits were there")
    for start in range(len(editor.edits), len(edits), size):
        editor.apply(edits[start : start + size])
        if path is not None:
            editor.save(path)
        told(f"{len(editor.edits)} of {len(edits)} edits")


def _written_texts(
    model: Any, tokenizer: Any, config: EditConfig, folder: Path | None, told: Callable[[str], None]
) -> list[str]:
    path = None if folder is None else folder / TEXTS
    if path is not None and path.is_file():
        return [str(text) for text in json.loads(path.read_text(encoding="utf-8"))]
    told(f"{config.samples} texts written by the model")
    texts = sample_texts(model, tokenizer, config.samples, SAMPLED, config.seed)
    if path is not None:
        write_json(path, texts)
    return texts
