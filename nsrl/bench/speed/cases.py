"""What is timed: three Gram matrices and a projection, each on a model that its users know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Problem:
    """What every method is given.

    Attributes:
        model: the network, in eval mode, float32.
        inputs: a batch, samples first.
        proposal: the displacement to project, shape (P,); unused where a Gram matrix is asked for.
    """

    model: nn.Module
    inputs: Tensor
    proposal: Tensor

    @property
    def rows(self) -> int:
        """k, samples times outputs."""
        with torch.no_grad():
            return len(self.inputs) * self.model(self.inputs[:1]).shape[1]

    @property
    def parameters(self) -> int:
        """P."""
        return len(self.proposal)

    def first(self, samples: int) -> Problem:
        """The same problem on the first few samples."""
        return replace(self, inputs=self.inputs[:samples])


@dataclass(frozen=True)
class Case:
    """One thing to compute.

    Attributes:
        name: in the results and on the command line.
        title: in tables.
        goal: "gram", K = J J^T with rows sample-major, or "projection", the proposal without its part in J's row space.
        build: function of `quick` to the model and its inputs; quick ones are for trying the benchmark out.
    """

    name: str
    title: str
    goal: str
    build: Callable[[bool], tuple[nn.Module, Tensor]]

    def problem(self, *, quick: bool = False, device: str = "cpu") -> Problem:
        """Model, inputs and proposal, always the same ones."""
        torch.manual_seed(0)
        model, inputs = self.build(quick)
        proposal = torch.randn(sum(parameter.numel() for parameter in model.parameters()))
        return Problem(model.eval().to(device), inputs.to(device), proposal.to(device))


class Attention(nn.Module):
    """Multi-head self-attention, spelt out: functional transforms have no fast rule for the fused kernel on a CPU."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (N, T, width) to the same shape."""
        split = self.project(tokens).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-1, -2) / key.shape[-1] ** 0.5).softmax(-1)
        return self.mix((weights @ value).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attend = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.think = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (N, T, width) to the same shape."""
        tokens = tokens + self.attend(tokens)
        return tokens + self.think(tokens)


class MeanOverPositions(nn.Module):
    """(N, T, width) to (N, width)."""

    def forward(self, tokens: Tensor) -> Tensor:
        """The mean over the second axis, (N, T, D) to (N, D)."""
        return tokens.mean(1)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for inner, outer in pairwise(widths):
        layers += [nn.Linear(inner, outer), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _mlp(quick: bool) -> tuple[nn.Module, Tensor]:
    width, samples = (32, 8) if quick else (256, 128)
    return mlp(784, width, width, 10), torch.randn(samples, 784)


def _nature_cnn(quick: bool) -> tuple[nn.Module, Tensor]:
    import numpy as np
    from gymnasium.spaces import Box
    from stable_baselines3.common.torch_layers import NatureCNN

    side, features, samples = (36, 16, 4) if quick else (84, 512, 64)
    extractor = NatureCNN(Box(0, 255, (4, side, side), np.uint8), features)
    return nn.Sequential(extractor, nn.Linear(features, 6)), torch.rand(samples, 4, side, side)


def _transformer(quick: bool) -> tuple[nn.Module, Tensor]:
    width, positions, samples, outputs = (16, 4, 4, 4) if quick else (256, 32, 32, 16)
    layers = (Layer(width, 4) for _ in range(4))
    model = nn.Sequential(*layers, nn.LayerNorm(width), MeanOverPositions(), nn.Linear(width, outputs))
    return model, torch.randn(samples, positions, width)


def _policy(quick: bool) -> tuple[nn.Module, Tensor]:
    width, samples = (32, 8) if quick else (256, 128)
    return mlp(width, width, width, width, 8), torch.randn(samples, width)


def _wide_policy(quick: bool) -> tuple[nn.Module, Tensor]:
    width, samples = (64, 16) if quick else (1024, 512)
    return mlp(width, width, width, width, 8), torch.randn(samples, width)


CASES = {
    case.name: case
    for case in (
        Case("gram_mlp", "Gram, MLP 784-256-256-10, 128 samples x 10 outputs", "gram", _mlp),
        Case("gram_cnn", "Gram, NatureCNN 84x84x4, 64 samples x 6 outputs", "gram", _nature_cnn),
        Case("gram_transformer", "Gram, 4-layer transformer d=256 T=32, 32 samples x 16 outputs", "gram", _transformer),
        Case("projection", "Projection, k=1024, three 256-wide layers", "projection", _policy),
        Case("projection_wide", "Projection, k=4096, three 1024-wide layers", "projection", _wide_policy),
    )
}
#: Cases of a device; dense Q of the wide projection alone takes 52 GB.
ON_DEVICE = {
    "cpu": ("gram_mlp", "gram_cnn", "gram_transformer", "projection"),
    "cuda": ("gram_mlp", "gram_cnn", "gram_transformer", "projection", "projection_wide"),
}
