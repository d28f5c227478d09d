"""Small tasks and a loop: what the tests of the strategies share."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nsrl.continual import MultiHead, OptimizerConfig, Strategy, Task, build_strategy

CLASSES = 3
ADAM = OptimizerConfig(lr=5e-3)


class Batches:
    """A loader of fixed batches."""

    def __init__(self, inputs: Tensor, targets: Tensor, size: int = 32):
        self.inputs, self.targets, self.size = inputs, targets, size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.inputs.split(self.size), self.targets.split(self.size), strict=True)


def blobs(seed: int, samples: int = 96, rank: int | None = None) -> Batches:
    """Three well separated classes in twelve dimensions, in another frame for every seed."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(samples) % CLASSES
    centres = 3.0 * torch.linalg.qr(torch.randn(12, 12, generator=generator))[0][:CLASSES]
    inputs = centres[targets] + 0.4 * torch.randn(samples, 12, generator=generator)
    if rank is not None:
        frame = torch.linalg.qr(torch.randn(12, rank, generator=generator))[0]
        inputs = inputs @ frame @ frame.T
    return Batches(inputs, targets)


def network(width: int = 24) -> nn.Module:
    return nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES))


def multi_head(tasks: int = 2) -> MultiHead:
    return MultiHead(nn.Sequential(nn.Linear(12, 24), nn.ReLU()), 24, [CLASSES] * tasks)


def build(name: str, model: nn.Module | None = None, optimizer: OptimizerConfig = ADAM, **options) -> Strategy:
    return build_strategy(name, network() if model is None else model, optimizer, **options)


def learn(strategy: Strategy, task: Task, loader: Batches, epochs: int = 15) -> None:
    strategy.before_task(task, loader)
    for _ in range(epochs):
        for inputs, targets in loader:
            strategy.step((inputs, targets, task.index))
    strategy.after_task(task, loader)


def accuracy(model: nn.Module, loader: Batches) -> float:
    with torch.no_grad():
        return float((model(loader.inputs).argmax(-1) == loader.targets).double().mean())
