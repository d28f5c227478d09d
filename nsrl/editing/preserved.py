"""Second moments of the keys of text that is to stay: streamed through `FeatureConstraint`, kept with provenance."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nsrl.editing.fingerprint import fingerprint
from nsrl.editing.layers import EditedLayer
from nsrl.editing.models import require_transformers
from nsrl.editing.observation import stopping
from nsrl.errors import NsrlError
from nsrl.files import given_path, written_atomically
from nsrl.projection import FeatureConstraint
from nsrl.projection.constraints.feature_moments import LayerMoments
from nsrl.reading.documents import parse_json
from nsrl.reading.limits import Unreadable, shown
from nsrl.reading.safetensors import read_safetensors
from nsrl.reading.values import mapping, whole
from nsrl.versions import VERSION, Format

STATISTICS = Format("second moments of a language model", 1)
#: Tokens of the batch on which it is looked whether a layer's weight acts elsewhere, too.
VERIFIED = 64


class PreservedKeys:
    """Second moments of the inputs of the edited layers, counted per token.

    Args:
        model: the language model, unedited.
        layers: the edited ones.

    Attributes:
        constraint: the one of `nsrl.projection` that holds them.
        texts: how many have been seen.
    """

    def __init__(self, model: nn.Module, layers: Sequence[EditedLayer]):
        self.model, self.layers = model, list(layers)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._names = [names[id(layer.weight)] for layer in layers]
        with _trainable(self.layers):
            self.constraint = FeatureConstraint(model, self._names)
        self.texts = 0
        self._verified = False

    @property
    def tokens(self) -> int:
        """Tokens that have been counted."""
        return min((part.count for part in self.constraint.moments.values()), default=0)

    def of(self, layer: EditedLayer) -> LayerMoments:
        """The moment of one layer.

        Raises:
            NsrlError: no text has been preserved.
        """
        if not self.tokens:
            raise NsrlError("the editor does not know what is to stay; call preserve with texts first")
        return self.constraint.moments[layer.name]

    def update(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add batches of tokens (N, T) with their masks (N, T); padding is left out.

        Raises:
            NsrlError: a weight that is used outside its own layer.
        """
        for ids, mask in batches:
            if not self._verified:
                self._verify(ids[:1, :VERIFIED], mask[:1, :VERIFIED])
            with stopping(self.layers[-1].linear) as call:
                forward: Any = partial(_forward, call, mask)
                self.constraint.update(self.model, ids, forward, mask, verify=False)
            self.texts += len(ids)

    def _verify(self, ids: Tensor, mask: Tensor) -> None:
        """Look once whether the weights act through their layers alone, and forget that text."""
        with _trainable(self.layers):
            self.constraint.update(
                self.model,
                ids,
                lambda model, ids: model(input_ids=ids, attention_mask=mask, use_cache=False).logits,
                mask,
            )
        if self.constraint.uncovered:
            raise NsrlError(
                f"{', '.join(self.constraint.uncovered)} is used outside its own layer too (tied, say), so an edit "
                "would change more than is preserved; edit other layers"
            )
        self.constraint.reset()
        self._verified = True

    def save(self, path: str | Path, model_hash: str) -> Path:
        """Write the moments as safetensors, with the model's hash and what was counted.

        Raises:
            NsrlError: nothing has been preserved, or the file cannot be written.
        """
        require_transformers()
        from safetensors.torch import save_file

        tensors = {f"moment.{layer.name}": self.of(layer).moment for layer in self.layers}
        counts = {layer.name: self.of(layer).count for layer in self.layers}
        header = {
            "format": str(STATISTICS.newest),
            "nsrl": VERSION,
            "model": model_hash,
            "tokens": json.dumps(counts),
            "texts": str(self.texts),
        }
        with written_atomically(given_path(path)) as temporary:
            save_file({name: t.contiguous().cpu() for name, t in tensors.items() if t is not None}, temporary, header)
        return Path(path)

    def load(self, path: str | Path, model_hash: str | None = None) -> None:
        """Take over the moments of a file.

        Args:
            path: as `save` wrote it.
            model_hash: of the model; computed when None.

        Raises:
            NsrlError: no such file, a damaged one, one of another model, or of other layers.
        """
        require_transformers()
        header, tensors = _read(given_path(path))
        if header["model"] != (model_hash or fingerprint(self.model)):
            raise NsrlError(
                f"{path} holds the second moments of another model (hash {header['model'][:12]}...); preserve "
                "the texts with this one"
            )
        for layer in self.layers:
            moment, count = tensors.get(f"moment.{layer.name}"), header["tokens"].get(layer.name)
            if moment is None or not isinstance(count, int):
                raise NsrlError(f"{path} has no second moment of {layer.name}; preserve the texts with these layers")
            try:
                self.constraint.moments[layer.name].restore(moment.to(layer.weight.device), count)
            except ValueError as error:
                raise NsrlError(f"{path}: {error}") from error
        self.texts = header["texts"]


def _forward(call: Callable[..., None], mask: Tensor, model: nn.Module, ids: Tensor) -> None:
    call(model, input_ids=ids, attention_mask=mask, use_cache=False)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise NsrlError(f"{path}: there is no such file; write one with Editor.save_statistics")
    try:
        header, tensors = read_safetensors(path)
        mapping(header, "its metadata", ("format", "model", "tokens", "texts"))
        version = whole(parse_json(header["format"]), "its format", 1)
        STATISTICS.check(path, version, header.get("nsrl"))
        counts = mapping(parse_json(header["tokens"]), "its counts of tokens")
        for name, count in counts.items():
            whole(count, f"the count of {shown(name)}", 1)
        texts = whole(parse_json(header["texts"]), "its number of texts")
    except OSError as error:
        raise NsrlError(f"cannot read {path}: {error.strerror or error}") from error
    except Unreadable as error:
        raise NsrlError(f"{path} holds no second moments of an editor ({error}); write it again") from error
    return {"model": header["model"], "tokens": counts, "texts": texts}, tensors


class _trainable:
    """Within the block the edited weights have gradients; afterwards as before."""

    def __init__(self, layers: Sequence[EditedLayer]):
        self.weights = [layer.weight for layer in layers]

    def __enter__(self) -> None:
        self.before = [weight.requires_grad for weight in self.weights]
        for weight in self.weights:
            weight.requires_grad_(True)

    def __exit__(self, *_: object) -> None:
        for weight, before in zip(self.weights, self.before, strict=True):
            weight.requires_grad_(before)
