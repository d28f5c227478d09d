"""What all cells of the editing study share: a model, facts to edit, and values found once on the unedited model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from nsrl.editing.editor import Editor
from nsrl.editing.knowledge.evaluation import ask
from nsrl.editing.knowledge.facts import NOTES, Fact, World
from nsrl.editing.knowledge.known_facts import HELDOUT, questions
from nsrl.editing.knowledge.sampling import sample_texts
from nsrl.editing.knowledge.tiny import knowing_gpt2
from nsrl.editing.models import load_model
from nsrl.editing.values import Values, ValueSearch
from nsrl.files import write_json, written_atomically

#: Edits whose values are found, and written, at a time.
CHUNK = 50
FIELDS = tuple(field.name for field in fields(Values))
#: Texts of a large model's own, and tokens of each.
SAMPLES, SAMPLED = 160, 48
Told = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """One model's share of the study.

    Attributes:
        people: in the generated world.
        edits: that are made in a run, at most.
        seeds: of worlds, models and facts.
        layers: edited blocks.
        search: how values are found.
        epochs: of training of a tiny model; 0 where the model is a package's.
        unknown: whether a tiny model's facts are edited that it does not know, too.
    """

    people: int
    edits: int
    seeds: tuple[int, ...]
    layers: tuple[int, ...]
    search: ValueSearch
    epochs: int = 0
    unknown: bool = False


SETTINGS: dict[str, Setting] = {
    "tiny": Setting(2000, 1000, (0, 1, 2, 3, 4), (0,), ValueSearch(steps=20, prefixes=1, batch=64), 6),
    "smollm2-135m": Setting(1000, 100, (0, 1, 2), (6,), ValueSearch(steps=20, prefixes=1, enough=0.1)),
}
QUICK: dict[str, Setting] = {
    "tiny": Setting(40, 20, (0,), (0,), ValueSearch(steps=2, prefixes=1, batch=64), 1, True),
    "smollm2-135m": Setting(1000, 2, (0,), (6,), ValueSearch(steps=1, prefixes=0)),
}


@dataclass(frozen=True)
class Pool:
    """A model with facts to edit, and all that stays the same from editor to editor.

    Attributes:
        model: unedited.
        tokenizer: its own.
        layers: edited blocks.
        facts: from which runs draw, each about a subject of its own.
        values: of the facts' edits, in their order.
        preserved: texts that every editor preserves.
        knowledge: questions about what else the model may know.
        heldout: texts of the perplexity.
        search: how the values were found.
    """

    model: Any
    tokenizer: Any
    layers: list[int]
    facts: tuple[Fact, ...]
    values: Values
    preserved: tuple[str, ...]
    knowledge: tuple[tuple[str, str], ...]
    heldout: tuple[str, ...]
    search: ValueSearch


def open_pool(name: str, seed: int, cache: Path, quick: bool = False, told: Told = lambda _: None) -> Pool:
    """The pool of a model and a seed; what takes long lies in a folder of the cache, and is made once.

    Args:
        name: of the model, one of `SETTINGS`.
        seed: of world, weights and facts.
        cache: folder.
        quick: small sizes.
        told: called with how far it is.
    """
    setting = (QUICK if quick else SETTINGS)[name]
    return (_tiny if setting.epochs else _packaged)(name, setting, seed, cache, told)


def _tiny(name: str, setting: Setting, seed: int, cache: Path, told: Told) -> Pool:
    """A tiny GPT-2 that has been taught a generated world: what it knows is edited.

    Nobody who is edited, and no neighbour by whom specificity is judged, is in a text that is preserved; the perplexity
    is that of sentences about the neighbours.
    """
    folder = cache / f"{name}{seed}"
    if (folder / "config.json").is_file():
        model, tokenizer = load_model(str(folder))
        world = World.generated(setting.people, seed, NOTES)
    else:
        model, tokenizer, world = knowing_gpt2(
            setting.people, seed, setting.epochs, told=lambda epoch, loss: told(f"epoch {epoch}, loss {loss:.3f}")
        )
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    known = ask(model, tokenizer, world.questions()).exact.tolist()
    told(f"the model knows {sum(known)} of {len(known)} facts")
    half, quarter = len(world.people) // 2, len(world.people) // 4
    # Of the people one half is edited, a quarter preserved, and a quarter asked about beside them.
    about = [
        index for relation in world.relations.values() for index in range(len(world.people)) for _ in relation.templates
    ]
    editable = [
        (right or setting.unknown) and not half <= index % len(world.people) < half + quarter
        for index, right in enumerate(known)
    ]
    facts = world.facts(setting.edits, seed, neighbours=1, known=editable, alone=True)
    told_of = list(zip(about, world.sentences(), strict=True))
    drawn = torch.randperm(len(told_of), generator=torch.Generator().manual_seed(seed)).tolist()
    texts = [told_of[index] for index in drawn]
    preserved = [text for person, text in texts if half <= person < half + quarter]
    heldout = [text for person, text in texts if person >= half + quarter][:400]
    values = found_values(_searching(model, tokenizer, setting), facts, preserved, folder, told)
    return Pool(
        model,
        tokenizer,
        list(setting.layers),
        tuple(facts),
        values,
        tuple(preserved),
        (),
        tuple(heldout),
        setting.search,
    )


def _packaged(name: str, setting: Setting, seed: int, cache: Path, told: Told) -> Pool:
    """SmolLM2: generated people that it does not know, texts of its own to preserve, real facts as its knowledge."""
    model, tokenizer = load_model(name)
    folder = cache / f"{name}_{seed}"
    texts = cache / f"{name}_texts.json"
    if not texts.is_file():
        told(f"{SAMPLES} texts written by the model")
        write_json(texts, sample_texts(model, tokenizer, SAMPLES, SAMPLED, seed=0))
    preserved = json.loads(texts.read_text(encoding="utf-8"))
    facts = World.generated(setting.people, seed).facts(setting.edits, seed, neighbours=1, alone=True)
    values = found_values(_searching(model, tokenizer, setting), facts, preserved, folder, told)
    return Pool(
        model,
        tokenizer,
        list(setting.layers),
        tuple(facts),
        values,
        tuple(preserved),
        tuple(questions()),
        HELDOUT,
        setting.search,
    )


def _searching(model: Any, tokenizer: Any, setting: Setting) -> Editor:
    # Values do not depend on the method; this one needs no more than preserved texts, for the prefixes.
    return Editor(model, tokenizer, "memit_history", list(setting.layers), setting.search, ridge=1.0)


def found_values(
    editor: Editor, facts: Sequence[Fact], preserved: Sequence[str], folder: Path, told: Told = lambda _: None
) -> Values:
    """Values of facts, searched for in chunks, each of which is written and not searched for again.

    Args:
        editor: of the unedited model.
        facts: whose edits.
        preserved: texts, whose beginnings are the prefixes of the search.
        folder: of the chunks.
        told: called with how far it is.
    """
    from safetensors.torch import load_file, save_file

    parts, ready = [], False
    for start in range(0, len(facts), CHUNK):
        path = folder / f"values_{start:05d}.safetensors"
        if not path.is_file():
            if not ready:
                editor.preserve(preserved)
                ready = True
            found = editor.find_values([fact.edit for fact in facts[start : start + CHUNK]])
            with written_atomically(path) as temporary:
                save_file({name: getattr(found, name).contiguous() for name in FIELDS}, temporary)
            told(f"values of {start + len(found)} of {len(facts)} edits")
        parts.append(load_file(path))
    return Values(*(torch.cat([part[name] for part in parts]) for name in FIELDS))
