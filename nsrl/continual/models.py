"""The networks of the benchmarks: a multilayer perceptron, and the ResNet-18 of the CIFAR experiments."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsrl.continual.benchmarks.benchmark import Benchmark
from nsrl.continual.config import ModelSettings
from nsrl.continual.heads import MultiHead
from nsrl.errors import NsrlError


def build_model(settings: ModelSettings, benchmark: Benchmark, seed: int = 0) -> nn.Module:
    """The network for a benchmark: with a head a task where the task is known at test time, else with one for all.

    Args:
        settings: of the network.
        benchmark: whose inputs it takes.
        seed: of the initial weights.

    Raises:
        NsrlError: a ResNet for vectors.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trunk, width = _trunk(settings, benchmark)
        bias = settings.bias or settings.kind != "mlp"
        if benchmark.head_sizes is not None:
            return MultiHead(trunk, width, benchmark.head_sizes, bias)
        return nn.Sequential(trunk, nn.Linear(width, benchmark.outputs, bias))


def _trunk(settings: ModelSettings, benchmark: Benchmark) -> tuple[nn.Module, int]:
    shape = benchmark.input_shape
    if settings.kind == "mlp":
        return mlp(math.prod(shape), settings.hidden, settings.bias), (settings.hidden or [math.prod(shape)])[-1]
    if len(shape) != 3:
        raise NsrlError(f"resnet18 takes images, but the inputs of {benchmark.name} have the shape {shape}; take mlp")
    return ResNet18(shape[0], settings.width, settings.batch_norm), 8 * settings.width


def mlp(inputs: int, hidden: Iterable[int], bias: bool = True) -> nn.Sequential:
    """Flatten, then linear layers with ReLU behind each."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(inputs, width, bias), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers)


class ResNet18(nn.Module):
    """Trunk of the pre-activation ResNet-18 for small images (He et al. 2016, arXiv 1603.05027), as in Adam-NSCL.

    The first convolution has stride 1 and no pooling behind it; no convolution has a bias. Batch normalisation always
    uses its running statistics, in train mode too: see `measure_statistics`.

    Args:
        channels: of the images.
        width: channels of the first stage; 64 in the paper.
        batch_norm: "frozen", "affine" or "none", see `nsrl.continual.config.ModelSettings`.
    """

    def __init__(self, channels: int = 3, width: int = 64, batch_norm: str = "frozen"):
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        before = width
        for stage, stride in enumerate((1, 2, 2, 2)):
            after = width * 2**stage
            blocks += [Block(before, after, stride, batch_norm), Block(after, after, 1, batch_norm)]
            before = after
        self.blocks = nn.Sequential(*blocks)
        self.norm = normalisation(before, batch_norm)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, channels, H, W) to features (N, 8 width)."""
        return F.relu(self.norm(self.blocks(self.first(images)))).mean((2, 3))


class Block(nn.Module):
    """Two convolutions, each behind normalisation and ReLU, beside a shortcut."""

    def __init__(self, before: int, after: int, stride: int, batch_norm: str):
        super().__init__()
        self.norm1 = normalisation(before, batch_norm)
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm2 = normalisation(after, batch_norm)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        changes = stride != 1 or before != after
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False) if changes else None

    def forward(self, inputs: Tensor) -> Tensor:
        """Residual, (N, C, H, W) to (N, C', H', W')."""
        active = F.relu(self.norm1(inputs))
        shortcut = inputs if self.shortcut is None else self.shortcut(active)
        return shortcut + self.conv2(F.relu(self.norm2(self.conv1(active))))


class FrozenBatchNorm(nn.BatchNorm2d):
    """Batch normalisation whose statistics do not move in training, so that old tasks keep their function."""

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        """Stays in eval mode."""
        return super().train(False)


def normalisation(channels: int, kind: str) -> nn.Module:
    """One of the ResNet's normalisation layers."""
    if kind == "none":
        return nn.Identity()
    layer = FrozenBatchNorm(channels)
    layer.eval()
    return layer.requires_grad_(kind == "affine")


@torch.no_grad()
def measure_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running statistics of frozen batch normalisation to those of some inputs, averaged over the batches.

    Args:
        model: any; without such layers nothing happens.
        batches: inputs of its trunk (of a `MultiHead`), or of itself.
    """
    layers = [module for module in model.modules() if isinstance(module, FrozenBatchNorm)]
    if not layers:
        return
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative average
        layer.training = True
    trunk = model.trunk if isinstance(model, MultiHead) else model
    for batch in batches:
        trunk(batch)
    for layer in layers:
        layer.eval()
