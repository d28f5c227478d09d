"""Where a model is edited: the last linear map of its feed-forward blocks, by preset or by pattern."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from nsrl.errors import NsrlError, near
from nsrl.projection.jacobians.layers import is_transposed_linear

#: Path of the edited map inside block {} by transformers' model type.
PRESETS: Mapping[str, str] = {
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gptj": "transformer.h.{}.mlp.fc_out",
    "llama": "model.layers.{}.mlp.down_proj",
    "qwen2": "model.layers.{}.mlp.down_proj",
    "qwen3": "model.layers.{}.mlp.down_proj",
    "mistral": "model.layers.{}.mlp.down_proj",
    "gemma": "model.layers.{}.mlp.down_proj",
}
#: Blocks that the official code edits (hparams of AlphaEdit), by model type and number of blocks, first and last.
PUBLISHED: Mapping[tuple[str, int], tuple[int, int]] = {
    ("gpt2", 48): (13, 17),
    ("gptj", 28): (3, 8),
    ("llama", 32): (4, 8),
    ("qwen2", 28): (4, 8),
    ("mistral", 32): (4, 8),
}
#: What a block may have between its map and what it adds to the hidden state (Gemma 2 and 3): the closed form is for
#: maps whose output is added as it is.
BEHIND = "post_feedforward_layernorm"
#: Where nobody has searched: from 1/8 to 1/4 of the depth, as in Llama-3-8B.
SHARE = 8, 4
#: Matches that a sentence lists.
SHOWN = 3


@dataclass(frozen=True)
class EditedLayer:
    """One linear map of a model, with the block that it belongs to.

    Attributes:
        name: of the map, dotted.
        linear: the map; a Linear, or GPT-2's Conv1D, whose weight is transposed.
        block: the block around it, whose output is the hidden state that edits are written into.
    """

    name: str
    linear: nn.Module
    block: nn.Module

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that is edited, as the module holds it."""
        weight = self.linear.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def transposed(self) -> bool:
        """Whether the weight is (d_in, d_out)."""
        return is_transposed_linear(self.linear)

    def displacement(self, original: Tensor) -> Tensor:
        """The weight less another one of the module's layout, shape (d_out, d_in), float64."""
        difference = self.weight.detach().double() - original.double()
        return difference.T if self.transposed else difference

    def write(self, original: Tensor, displacement: Tensor) -> None:
        """Set the weight to another one plus a displacement (d_out, d_in), rounded once from float64."""
        step = displacement.T if self.transposed else displacement
        with torch.no_grad():
            self.weight.copy_(original.double() + step)


def find_layers(model: nn.Module, layers: str | list[int] | None = None) -> list[EditedLayer]:
    """The maps to edit, in the order of the model.

    Args:
        model: a causal language model of transformers, or one whose blocks lie in one list of modules.
        layers: None for the preset of the model's type, block numbers for the preset's map in those blocks, or a
            pattern of names, as "model.layers.[4-6].mlp.down_proj".

    Raises:
        NsrlError: no preset for this model, a block that there is not or that normalises what its map says, a pattern
            that matches nothing or something that is no linear map.
    """
    names = [name for name, module in model.named_modules() if _is_map(module)]
    if isinstance(layers, str):
        found = [name for name in names if fnmatchcase(name, layers)]
        if not found:
            alike = near(layers, names, SHOWN, cutoff=0.3)
            known = f"near it are {', '.join(alike)}" if alike else f"the model has {', '.join(names[:SHOWN])}, ..."
            raise NsrlError(f"the pattern {layers!r} matches no linear layer of the model; {known}")
    else:
        found = _preset(model, names, layers)
    modules = dict(model.named_modules())
    chosen = [EditedLayer(name, modules[name], modules[_block_of(name, modules)]) for name in found]
    for layer in chosen:
        if hasattr(layer.block, BEHIND):
            raise NsrlError(
                f"{layer.name} cannot be edited: its block normalises what the map says ({BEHIND}) before it is added "
                "to the hidden state, and the closed form is for maps whose output is added as it is"
            )
    return chosen


def _preset(model: nn.Module, names: list[str], blocks: list[int] | None) -> list[str]:
    config: Any = getattr(model, "config", None)
    kind = str(getattr(config, "model_type", type(model).__name__))
    if kind not in PRESETS:
        raise NsrlError(
            f"there is no preset of layers for a model of type {kind!r} (known: {', '.join(PRESETS)}); give a pattern "
            "of the layers to edit, as 'model.layers.[4-6].mlp.down_proj'"
        )
    path = PRESETS[kind]
    count = sum(bool(re.fullmatch(re.escape(path).replace(r"\{\}", r"\d+"), name)) for name in names)
    if blocks is None:
        first, last = PUBLISHED.get((kind, count), (count // SHARE[0], count // SHARE[1]))
        blocks = list(range(first, min(last, count - 1) + 1))
    wrong = [number for number in blocks if not 0 <= number < count]
    if wrong or not blocks:
        raise NsrlError(f"the model has blocks 0 to {count - 1}, so {wrong or blocks} cannot be edited; give others")
    return [path.format(number) for number in sorted(set(blocks))]


def _block_of(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The outermost numbered module around a map: the entry of the model's list of blocks."""
    parts = name.split(".")
    for stop in range(1, len(parts)):
        if parts[stop].isdigit() and isinstance(modules[".".join(parts[:stop])], nn.ModuleList):
            return ".".join(parts[: stop + 1])
    raise NsrlError(f"{name} lies in no list of blocks, so an edit has no hidden state to be written into")


def _is_map(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_transposed_linear(module)
