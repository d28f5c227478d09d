"""A portable retention file: token ids with what a model answered to them, beside its checkpoint.

Made once by whoever has the model; enforced later, on another machine, by anyone who fine-tunes it. It holds the
likeliest classes of every token and all others as one mass. The KL between what is held and the same of the trained
model is a lower bound of the full KL (the log-sum inequality; Cover & Thomas, Elements of Information Theory, 2.7): a
budget on it does not bound how the module shares out the rest. With `top_k` at the vocabulary's size less one nothing
is left out.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nsrl.editing.fingerprint import fingerprint
from nsrl.editing.post_training.preserved import Batch, Preserved, Reference
from nsrl.errors import NsrlError
from nsrl.files import given_path, written_atomically
from nsrl.reading.checksums import check_checksum, checksum
from nsrl.reading.documents import parse_json
from nsrl.reading.limits import Unreadable, shown
from nsrl.reading.safetensors import read_safetensors
from nsrl.reading.values import items, whole
from nsrl.versions import VERSION

#: Layout of the file.
FORMAT = 1
#: Nats a token by which a model with other weights may differ from the file's and still count as the same one: as much
#: as half precision makes.
SAME = 1e-3
#: Keys of the metadata that a file must have.
KEYS = ("format", "nsrl", "model", "tokenizer", "vocabulary", "top_k", "digest", "made")
#: Tensors of log-probabilities; the others are token ids.
ANSWERS = ("log_probabilities", "rest")
#: Tokens, and classes, of a file at most.
MOST = 2**40


@dataclass(frozen=True)
class RetentionFile:
    """Sequences of token ids and what a model answered.

    Attributes:
        ids: all sequences one behind the other, (M,) int64.
        lengths: of the sequences, summing to M.
        answers: of all M positions.
        provenance: metadata of the file: hashes of model and tokenizer, vocabulary, when and with what it was made.
    """

    ids: Tensor
    lengths: tuple[int, ...]
    answers: Reference
    provenance: dict[str, Any]

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def make(
        cls,
        model: nn.Module,
        content: Iterable[Any],
        tokenizer: Any = None,
        *,
        top_k: int = 64,
        max_tokens: int = 512,
        batch_size: int = 8,
        name: str = "",
    ) -> RetentionFile:
        """What a model answers now.

        Args:
            model: a causal language model.
            content: texts, for which the tokenizer is needed, or sequences of token ids.
            tokenizer: as transformers makes them; its hash goes into the file, too.
            top_k: likeliest classes kept of every token.
            max_tokens: of a sequence; the rest of a longer one is left out.
            batch_size: sequences in one pass.
            name: of the model, for the provenance.

        Raises:
            NsrlError: no content, a text without a tokenizer or shorter than a token, a bad number.
        """
        if min(top_k, max_tokens, batch_size) < 1:
            raise NsrlError("top_k, max_tokens and batch_size must be at least 1")
        sequences = [_ids(entry, tokenizer)[:max_tokens] for entry in content]
        if not sequences:
            raise NsrlError("there is nothing to retain: give texts, or sequences of token ids")
        preserved = Preserved(model, _padded(sequences, batch_size), top_k)
        answers = Reference(*(_joined(parts) for parts in zip(*map(_parts, preserved.references), strict=True)))
        ids = torch.cat(sequences)
        provenance = {
            "format": FORMAT,
            "nsrl": VERSION,
            "name": name,
            "model": fingerprint(model),
            "tokenizer": None if tokenizer is None else tokenizer_hash(tokenizer),
            "vocabulary": _classes(preserved),
            "top_k": top_k,
            "torch": torch.__version__,
            "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "lengths": [len(sequence) for sequence in sequences],
        }
        cpu = answers.to(torch.device("cpu"))
        provenance["digest"] = checksum([ids, *_parts(cpu)])
        return cls(ids, tuple(len(sequence) for sequence in sequences), cpu, provenance)

    def save(self, path: str | Path) -> Path:
        """Write it as safetensors, whole or not at all.

        Raises:
            NsrlError: it cannot be written, or the package is missing.
        """
        _require_safetensors()
        from safetensors.torch import save_file

        assert self.answers.indices is not None and self.answers.rest is not None
        tensors = {
            "ids": self.ids.to(torch.int32),
            "log_probabilities": self.answers.outputs.contiguous(),
            "classes": self.answers.indices.to(torch.int32).contiguous(),
            "rest": self.answers.rest.contiguous(),
        }
        with written_atomically(given_path(path)) as temporary:
            save_file(tensors, temporary, {"nsrl_retention": json.dumps(self.provenance)})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> RetentionFile:
        """Read a file; what it says of itself is checked.

        Raises:
            NsrlError: there is no such file, it is no retention file, damaged or of a newer version.
        """
        place = given_path(path)
        if not place.is_file():
            raise NsrlError(f"{path}: there is no such file; make one with RetentionFile.make(...).save(path)")
        try:
            told, tensors = read_safetensors(place)
            provenance = parse_json(told["nsrl_retention"]) if "nsrl_retention" in told else None
        except OSError as error:
            raise NsrlError(
                f"{path} cannot be read as safetensors: {error.strerror or error}; make it again"
            ) from error
        except Unreadable as error:
            raise NsrlError(f"{path} cannot be read as safetensors: {error}; make it again") from error
        if type(provenance) is not dict or any(key not in provenance for key in (*KEYS, "lengths")):
            raise NsrlError(f"{path} is safetensors, but no retention file; make one with RetentionFile.make")
        if provenance["format"] != FORMAT:
            raise NsrlError(
                f"{path} has format {shown(provenance['format'])}, and this nsrl reads {FORMAT}; update nsrl"
            )
        try:
            return cls._checked(tensors, provenance)
        except Unreadable as error:
            raise NsrlError(f"{path} is damaged: {error}; make it again") from error

    @classmethod
    def _checked(cls, tensors: dict[str, Tensor], provenance: dict[str, Any]) -> RetentionFile:
        lengths = [whole(length, "a length", 1, MOST) for length in items(provenance["lengths"], "its list of lengths")]
        vocabulary = whole(provenance["vocabulary"], "its vocabulary", 2, MOST)
        whole(provenance["top_k"], "its top_k", 1, MOST)
        for key in ("model", "made", "name", "digest"):
            if type(provenance.get(key, "")) is not str:
                raise Unreadable(f"its entry {key} is no text")
        shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        count, top = sum(lengths), shapes.get("classes", (0, 0))[-1:]
        wanted = {"ids": (count,), "log_probabilities": (count, *top), "classes": (count, *top), "rest": (count,)}
        if not count or top < (1,) or shapes != wanted:
            raise Unreadable("its tensors have not the shapes that it announces")
        if any(tensors[key].is_floating_point() != (key in ANSWERS) for key in wanted):
            raise Unreadable("its tensors have not the formats that they should")
        answers = Reference(tensors["log_probabilities"], tensors["classes"].long(), tensors["rest"])
        ids = tensors["ids"].long()
        check_checksum([ids, *_parts(answers)], provenance["digest"])
        for held in (ids, answers.indices):
            assert held is not None
            if int(held.min()) < 0 or int(held.max()) >= vocabulary:
                raise Unreadable("it names classes outside its vocabulary")
        # The mass of the rest may be 0, whose logarithm is -inf.
        if not bool(torch.isfinite(answers.outputs).all()) or not bool((tensors["rest"] < 1e-3).all()):
            raise Unreadable("its answers are no log-probabilities")
        return cls(ids, tuple(lengths), answers, provenance)

    def check(self, model: nn.Module, tokenizer: Any = None) -> None:
        """Raise NsrlError unless the file is of this model.

        The weights' hash tells it. Where they differ in form alone (half precision, adapters that do nothing yet,
        another library's names), the answers tell: they must agree to `SAME` nats a token, with a warning.

        Raises:
            NsrlError: it is of another model, another tokenizer or another vocabulary.
        """
        if tokenizer is not None and self.provenance["tokenizer"] not in (None, tokenizer_hash(tokenizer)):
            raise NsrlError(
                "the retention file was made with another tokenizer, so that its token ids mean something else; give "
                "the tokenizer of its model, or make the file again"
            )
        if self.provenance["model"] == fingerprint(model):
            return
        of = self.provenance.get("name") or "another model"
        try:
            found = self.preserved(model)
            classes = _classes(found)
            kl = found.measure().kl_mean if classes == self.provenance["vocabulary"] else float("inf")
        except (IndexError, RuntimeError):  # token ids that this model does not have
            classes, kl = 0, float("inf")
        if kl > SAME:
            told = f"{kl:.3g} nats a token away" if kl < float("inf") else "of another vocabulary"
            raise NsrlError(
                f"the retention file is of {of} (made {self.provenance['made']}), and this model is {told}; give the "
                "model that it was made with, or make a file of this one"
            )
        warnings.warn(
            f"the retention file was made with other weights, but this model answers alike ({kl:.2g} nats a token)",
            stacklevel=3,
        )

    def preserved(self, model: nn.Module, batch_size: int = 8) -> Preserved:
        """The file as what `protect_module` preserves: its sequences, padded, and its answers.

        Args:
            model: that they are to be asked of.
            batch_size: sequences in one pass.
        """
        device = next(model.parameters()).device
        ends = list(self.lengths)
        sequences = list(self.ids.split(ends))
        sizes = [sum(ends[start : start + batch_size]) for start in range(0, len(ends), batch_size)]
        pieces = zip(*(t.to(device).split(sizes) for t in _parts(self.answers) if t is not None), strict=True)
        return Preserved(model, _padded(sequences, batch_size), references=[Reference(*piece) for piece in pieces])


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary, and of what it makes of a sentence."""
    vocabulary = sorted((str(token), int(number)) for token, number in tokenizer.get_vocab().items())
    sample = [int(token) for token in _encoded(tokenizer, "The quick brown fox, 12 of them; Ünïcödé.")]
    return hashlib.sha256(json.dumps([vocabulary, sample]).encode()).hexdigest()


def _encoded(tokenizer: Any, text: str) -> list[int]:
    found = tokenizer(text)
    return list(found["input_ids"] if hasattr(found, "keys") else found)


def _ids(entry: Any, tokenizer: Any) -> Tensor:
    if isinstance(entry, str):
        if tokenizer is None:
            raise NsrlError("texts need a tokenizer; give it, or sequences of token ids")
        entry = _encoded(tokenizer, entry)
    if not isinstance(entry, Tensor | Sequence):
        raise NsrlError(f"a {type(entry).__name__} is neither a text nor a sequence of token ids")
    ids = torch.as_tensor(entry).cpu()
    if not ids.numel():
        raise NsrlError("a text that is shorter than a token has no answer; leave it out")
    if ids.dim() != 1 or ids.is_floating_point():
        raise NsrlError(f"a sequence of token ids has shape (T,) and whole numbers, not {tuple(ids.shape)} {ids.dtype}")
    return ids.long()


def _padded(sequences: Sequence[Tensor], size: int) -> list[Batch]:
    batches = []
    for start in range(0, len(sequences), size):
        part = sequences[start : start + size]
        ids = nn.utils.rnn.pad_sequence(list(part), batch_first=True)
        lengths = torch.tensor([len(sequence) for sequence in part])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        batches.append(Batch({"input_ids": ids, "attention_mask": mask.long()}, mask))
    return batches


def _parts(reference: Reference) -> tuple[Tensor | None, ...]:
    return reference.outputs, reference.indices, reference.rest


def _joined(parts: Sequence[Tensor | None]) -> Any:
    held = [part for part in parts if part is not None]
    return torch.cat(held) if held else None


@torch.no_grad()
def _classes(preserved: Preserved) -> int:
    return preserved.outputs(0).shape[-1]


def _require_safetensors() -> None:
    if find_spec("safetensors") is None:
        raise NsrlError("a retention file needs the package safetensors; install nsrl with its extra: nsrl[llm]")
