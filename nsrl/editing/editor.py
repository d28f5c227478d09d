"""The editor: facts written into a model's weights by one closed form, and taken out again bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from nsrl.editing.budget_search import smallest_penalty
from nsrl.editing.checkpoint import provenance, read_checkpoint, write_checkpoint
from nsrl.editing.edits import Edit
from nsrl.editing.fingerprint import fingerprint
from nsrl.editing.joint.writing import JointWriting
from nsrl.editing.layer_memory import LayerMemory
from nsrl.editing.layers import find_layers
from nsrl.editing.logits import check_logits
from nsrl.editing.methods import Method, find_method
from nsrl.editing.observation import observe
from nsrl.editing.preserved import PreservedKeys
from nsrl.editing.reports import BatchReport, EditorReport
from nsrl.editing.text_budget import TextKL
from nsrl.editing.tokens import Marked, check_tokenizer, longest, text_batches
from nsrl.editing.values import Values, ValueSearch, find_values, mark_edit
from nsrl.errors import NsrlError
from nsrl.files import given_path

#: Tokens of a batch of preserved texts, and of a text in one piece.
TOKENS, LENGTH = 2048, 128
#: Of this many preserved texts one is held out of moments and budget.
HELD_OUT = 5
#: Share of the distance to the wanted state that still counts as written.
CLOSE = 0.1


class Editor:
    """Writes edits into a causal language model of transformers; all state lives here, and `undo` gives it back.

    Args:
        model: it is edited in place.
        tokenizer: its own; needs a padding token.
        method: one of `METHODS` by name, or a `Method`.
        layers: None for the preset of the model's type, block numbers, or a pattern; see `find_layers`.
        search: how values are found.
        measured_tokens: preserved tokens on which the KL is measured, at most; as many held out.
        flags: of the method, to replace those that go with its name.

    Raises:
        NsrlError: a model or tokenizer that cannot be edited, no such method or flag, no such layers.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        method: str | Method = "nsrl",
        layers: str | list[int] | None = None,
        search: ValueSearch | None = None,
        measured_tokens: int = 1024,
        **flags: Any,
    ):
        check_tokenizer(tokenizer)
        self.method = find_method(method, **flags) if isinstance(method, str) else method
        self.model, self.tokenizer = model, tokenizer
        self.layers = find_layers(model, layers)
        device = self.layers[0].weight.device
        check_logits(model, torch.tensor([[tokenizer.pad_token_id, tokenizer.pad_token_id]], device=device))
        if model.training:
            raise NsrlError("the model is in training mode, where dropout moves every measurement; call model.eval()")
        self.search = search or ValueSearch()
        self.measured_tokens = measured_tokens
        self.preserved = PreservedKeys(model, self.layers)
        self._memories = [LayerMemory(layer, self.method) for layer in self.layers]
        self._prefixes: list[str] = []
        self._kl: TextKL | None = None
        self._heldout: TextKL | None = None
        self._edits: list[Edit] = []
        self._batches: list[BatchReport] = []
        self._penalty: float | None = None
        self._marked: dict[Edit, Marked] = {}
        # Hidden states at the edits in the original model, a tensor a batch, where values are searched for together.
        self._before: list[Tensor] = []

    @property
    def edits(self) -> tuple[Edit, ...]:
        """Those that have been applied, in order."""
        return tuple(self._edits)

    def preserve(self, texts: Sequence[str]) -> None:
        """Text whose behaviour is to stay: the second moments of its keys, and its KL from now on.

        May be called again before the first edit; every fifth text is held out and only measured.

        Args:
            texts: streamed; memory does not grow with them, but for the tokens that are measured.

        Raises:
            NsrlError: no texts, a text shorter than a token, or edits have been applied.
        """
        self._check_untouched()
        if self._edits:
            raise NsrlError("preserve texts before the first edit: afterwards the model is no longer the original")
        kept, held = _split(texts)
        batches = self._text_batches(kept)
        self.preserved.update(batches)
        self._measure_from(batches, held, kept)

    def save_statistics(self, path: str | Path) -> Path:
        """Write the second moments as safetensors, with the model's hash.

        Raises:
            NsrlError: nothing has been preserved, or the file cannot be written.
        """
        with self._original():
            return self.preserved.save(path, fingerprint(self.model))

    def load_statistics(self, path: str | Path, texts: Sequence[str] = ()) -> None:
        """Take the second moments from a file instead of streaming texts again.

        Args:
            path: as `save_statistics` wrote it, for this very model.
            texts: on which the KL is measured; needed where a budget is kept.

        Raises:
            NsrlError: the file is of another model or of other layers, or edits have been applied.
        """
        self._check_untouched()
        if self._edits:
            raise NsrlError("load statistics before the first edit: afterwards the model is no longer the original")
        self.preserved.load(path)
        if texts:
            kept, held = _split(texts)
            self._measure_from(self._text_batches(kept), held, kept)

    def find_values(self, edits: Sequence[Edit]) -> Values:
        """Search for the values of edits on the model as it is now, without changing it.

        Raises:
            NsrlError: no edits, or one whose subject or target has no tokens.
        """
        _check_edits(edits)
        return find_values(self.model, self.tokenizer, self.layers, edits, self._prefixes, self.search)

    def apply(self, edits: Sequence[Edit], values: Values | None = None) -> BatchReport:
        """Write a batch of edits into the weights.

        Args:
            edits: one batch; later ones count with these.
            values: from `find_values`, perhaps of the unedited model; searched for when None. A method that searches
                for those of all edits together does not look at them.

        Raises:
            NsrlError: bad edits, nothing preserved, a method whose projector does not fit, a singular system, or a
                weight that somebody else has changed. The model is then as before the call.
        """
        start = perf_counter()
        edits = list(edits)
        _check_edits(edits)
        self._check_untouched()
        if self.method.kl_budget is not None and self._kl is None:
            raise NsrlError("a KL budget needs text to be measured on; call preserve, or load_statistics with texts")
        for memory in self._memories:
            memory.prepare(self.preserved.of(memory.layer))
        together = self.method.together is not None
        found = self.find_values(edits) if values is None and not together else values
        if found is not None and len(found) != len(edits):
            raise NsrlError(f"there are {len(found)} values for {len(edits)} edits; give those of these edits")
        searched = perf_counter() - start
        before = [memory.state() for memory in self._memories]
        try:
            measured = self._write_together(edits) if together or found is None else self._write(edits, found)
        except BaseException:
            for memory, state in zip(self._memories, before, strict=True):
                memory.set_state(state)
            raise
        self._edits += edits
        report = BatchReport(**measured, searching=searched, seconds=perf_counter() - start)
        self._batches.append(report)
        return report

    def undo(self) -> None:
        """Give every weight back as it was before the first edit, bit for bit, and forget the edits.

        Raises:
            NsrlError: somebody else has changed a weight since.
        """
        self._check_untouched()
        for memory in self._memories:
            memory.reset()
        self._edits, self._batches, self._penalty, self._before = [], [], None, []

    def save(self, path: str | Path) -> Path:
        """Write the edits so far as safetensors: the edited weights, and all that later batches count with.

        Raises:
            NsrlError: there are no edits, somebody else has changed a weight since, or the file cannot be written.
        """
        self._check_untouched()
        if not self._edits:
            raise NsrlError("there are no edits to be saved; apply some first")
        write_checkpoint(given_path(path), self._made_with(), self._edits, self._batches, self._penalty, self._memories)
        return Path(path)

    def load(self, path: str | Path) -> None:
        """Take over the edits of a file as if they had been applied here, to the last bit; `undo` takes them out.

        Args:
            path: as `save` wrote it, for this very model, its layers and method, with the same texts preserved.

        Raises:
            NsrlError: no such file, a damaged one, one made with something else, nothing preserved, or edits have been
                applied here.
        """
        self._check_untouched()
        if self._edits:
            raise NsrlError("load edits before others are applied, or call undo first")
        moments = [self.preserved.of(memory.layer) for memory in self._memories]
        edits, batches, penalty, states = read_checkpoint(given_path(path), self._made_with(), self._memories)
        before, start = list[Tensor](), 0
        if self.method.together is not None:
            # Batch by batch, as they were found: other batches round otherwise.
            for batch in batches:
                before.append(self._originals(edits[start : start + batch.edits])[-1])
                start += batch.edits
        for memory, moment, state in zip(self._memories, moments, states, strict=True):
            memory.restore(moment, state, [batch.edits for batch in batches])
        self._edits, self._batches, self._penalty, self._before = edits, batches, penalty, before

    def report(self) -> EditorReport:
        """What has been written, and what it cost the preserved text."""
        return EditorReport(
            edits=len(self._edits),
            batches=tuple(self._batches),
            tokens=self.preserved.tokens,
            kl_mean=None if self._kl is None else self._kl.measure(self.model),
            kl_heldout=None if self._heldout is None else self._heldout.measure(self.model),
            budget=self.method.kl_budget,
            kept_share={memory.layer.name: memory.kept_share for memory in self._memories},
            bytes_thin=sum(memory.nbytes()[0] for memory in self._memories),
            bytes_dense=sum(memory.nbytes()[1] for memory in self._memories),
        )

    def _made_with(self) -> dict[str, Any]:
        with self._original():
            return provenance(fingerprint(self.model), self.method, self.preserved.tokens)

    def _write(self, edits: list[Edit], values: Values) -> dict[str, Any]:
        marked = [mark_edit(self.tokenizer, edit) for edit in edits]
        padding, last = self.tokenizer.pad_token_id, self.layers[-1].block
        wanted = _anchored(values) if self.method.anchor else values.hidden
        for index, memory in enumerate(self._memories):
            keys = values.keys if index == 0 else self._keys(edits, memory, ("", *self._prefixes))
            (now,) = observe(self.model, marked, padding, outputs_of=[last])
            residual = (wanted - now) / (len(self._memories) - index)
            memory.add(keys, residual, self._penalty)
        measured = penalty = None
        if self.method.kl_budget is not None:
            assert self._kl is not None
            penalty, measured = smallest_penalty(
                self._solve,
                max(memory.weakest() for memory in self._memories),
                self._kl,
                self.model,
                self.method.kl_budget,
                self._penalty,
            )
            self._penalty = penalty
        for memory in self._memories:
            memory.close()
        (after,) = observe(self.model, marked, padding, outputs_of=[last])
        missing = (wanted - after).norm(dim=1) / (wanted - values.before).norm(dim=1).clamp_min(1e-30)
        return self._measured(missing, measured, penalty)

    def _write_together(self, edits: list[Edit]) -> dict[str, Any]:
        assert self._kl is not None
        displacements = [memory.displacement() for memory in self._memories]
        for memory in self._memories:
            memory.show_original()
        *keys, before = self._originals(edits)
        for memory, rows, displacement in zip(self._memories, keys, displacements, strict=True):
            memory.remember(rows, displacement)
        every = [*self._edits, *edits]
        final = {edit.text: number for number, edit in enumerate(every)}
        writing = JointWriting(
            self.model,
            self._memories,
            [self._marked[edit] for edit in every],
            [final[edit.text] == number for number, edit in enumerate(every)],
            torch.cat([*self._before, before]),
            len(edits),
            self.tokenizer.pad_token_id,
            self.method,
            self._penalty,
        )
        penalty, measured = writing.write(self._kl)
        missing = writing.still_missing()
        self._penalty = penalty
        self._before.append(before)
        return self._measured(missing, measured, penalty)

    def _originals(self, edits: Sequence[Edit]) -> list[Tensor]:
        """Keys of every layer, and hidden states behind the last one, at some edits, of the model as it is now."""
        # Of the prompts themselves, since the search counts with what is added at these very keys.
        for edit in edits:
            self._marked[edit] = mark_edit(self.tokenizer, edit)
        marked = [self._marked[edit] for edit in edits]
        linears, last = [memory.layer.linear for memory in self._memories], self.layers[-1].block
        return observe(self.model, marked, self.tokenizer.pad_token_id, linears, [last])

    def _solve(self, penalty: float) -> None:
        for memory in self._memories:
            memory.solve(penalty)

    def _measured(self, missing: Tensor, kl: float | None, penalty: float | None) -> dict[str, Any]:
        return {
            "edits": len(missing),
            "kl": kl,
            "penalty": penalty,
            "missing": float(missing.mean()),
            "written": float((missing <= CLOSE).double().mean()),
            "change": sum(memory.change() for memory in self._memories) / len(self._memories),
        }

    def _keys(self, edits: Sequence[Edit], memory: LayerMemory, prefixes: Sequence[str]) -> Tensor:
        rows = [mark_edit(self.tokenizer, edit, prefix) for edit in edits for prefix in prefixes]
        (keys,) = observe(self.model, rows, self.tokenizer.pad_token_id, inputs_of=[memory.layer.linear])
        return keys.reshape(len(edits), len(prefixes), -1).mean(1)

    def _text_batches(self, texts: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        length = longest(self.model, LENGTH)
        return text_batches(self.tokenizer, texts, TOKENS, length, self.layers[0].weight.device)

    def _measure_from(self, batches: list[tuple[Tensor, Tensor]], held: list[str], kept: list[str]) -> None:
        self._kl = TextKL(self.model, batches, self.measured_tokens)
        if held:
            self._heldout = TextKL(self.model, self._text_batches(held), self.measured_tokens)
        words = (text.split()[: self.search.prefix_words] for text in kept)
        self._prefixes = [" ".join(part).rstrip(".") + ". " for part in words][: self.search.prefixes]

    def _check_untouched(self) -> None:
        for memory in self._memories:
            memory.check_untouched()

    @contextmanager
    def _original(self) -> Iterator[None]:
        states = [memory.state() for memory in self._memories]
        try:
            for memory in self._memories:
                memory.show_original()
            yield
        finally:
            for memory, state in zip(self._memories, states, strict=True):
                memory.set_state(state)


def _split(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those that are preserved, and every fifth, which is held out."""
    kept = [text for index, text in enumerate(texts) if (index + 1) % HELD_OUT]
    return kept, list(texts)[HELD_OUT - 1 :: HELD_OUT]


def _anchored(values: Values) -> Tensor:
    """Wanted states with the norms of those that they replace (norm anchoring, arXiv 2602.02543)."""
    norms = values.hidden.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return values.hidden * (values.before.norm(dim=1, keepdim=True) / norms)


def _check_edits(edits: Sequence[Edit]) -> None:
    if not edits:
        raise NsrlError("there are no edits; give at least one")
    said: dict[str, Edit] = {}
    for edit in edits:
        other = said.setdefault(edit.text, edit)
        if other.target != edit.target:
            raise NsrlError(
                f"the batch is singular: {edit.text!r} is to be continued by {other.target!r} and by {edit.target!r}; "
                "leave one of them out"
            )
