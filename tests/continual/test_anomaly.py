"""Adam-NSCL's published anomaly: its log keeps 5 of 4608 dimensions after task 1 and 1639 after task 9."""

from itertools import pairwise

import torch
from torch import nn

from nsrl.continual import OptimizerConfig, Task
from tests.continual.learning import CLASSES, Batches, build, learn

WIDTH, TASKS = 48, 16


def _task(seed: int) -> Batches:
    """Inputs whose variances fall over eight orders of magnitude, in another frame for every task."""
    generator = torch.Generator().manual_seed(seed)
    frame = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]
    inputs = torch.randn(96, WIDTH, generator=generator) * torch.logspace(0, -4, WIDTH) @ frame.T
    return Batches(inputs, torch.arange(96) % CLASSES)


def _free_dimensions(name: str, **options) -> list[int]:
    """Input directions that the first layer may still move in, after every task."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 16, bias=False), nn.ReLU(), nn.Linear(16, CLASSES, bias=False))
    strategy = build(name, model, OptimizerConfig(lr=1e-3), **options)
    free = []
    for index in range(TASKS):
        learn(strategy, Task(f"task {index}", index), _task(index), epochs=1)
        rank = strategy.features.constraint.protected_rank["0"] if name == "features" else WIDTH - strategy.kept["0"]
        free.append(WIDTH - rank)
    return free


def test_the_old_rule_frees_directions_as_more_is_to_be_protected():
    free = _free_dimensions("adam_nscl", multiple=10.0)
    assert free[0] <= 6
    assert free[-1] > 4 * free[0]


def test_ours_is_monotone():
    for energy in (0.9, 0.99, 0.999):
        free = _free_dimensions("features", energy=energy)
        assert all(later <= earlier for earlier, later in pairwise(free))
        assert free[-1] < free[0]
