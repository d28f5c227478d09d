"""Generated tasks whose truth is known: teachers that see orthogonal subspaces, and pieces of one curve."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nsrl.continual.benchmarks.benchmark import Benchmark, Examples, TaskData, split_examples
from nsrl.continual.benchmarks.digits import domain_scenario, domain_task
from nsrl.continual.config import BenchmarkSettings
from nsrl.continual.tasks import Task
from nsrl.errors import NsrlError

EXAMPLES = 800
#: Of the inputs; of the subspace that only one task's inputs lie in; of the one that all tasks' inputs lie in.
DIMENSION, OWN, SHARED = 60, 4, 4
TEACHER_CLASSES, TEACHER_HIDDEN = 4, 8
#: Encoding of the curve's argument: bumps a unit, and their width as a share of the distance between two.
BUMPS, BUMP_WIDTH = 12, 1.0


def teacher_student(settings: BenchmarkSettings, seed: int) -> Benchmark:
    """Classify low-dimensional inputs as a random network does, another one in every task; 5 tasks.

    Every task's inputs lie in four directions of its own and four that all tasks share, all orthogonal: after t tasks
    they span exactly 4 + 4 t of 60 dimensions, so that the first layer's null space is known.
    """
    count = settings.tasks or 5
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for index, basis in enumerate(task_subspaces(count, seed)):
        inner = torch.randn(EXAMPLES, OWN + SHARED, generator=generator)
        first = torch.randn(OWN + SHARED, TEACHER_HIDDEN, generator=generator) / math.sqrt(OWN + SHARED)
        second = torch.randn(TEACHER_HIDDEN, TEACHER_CLASSES, generator=generator)
        logits = torch.tanh(inner @ first) @ second
        # without the mean, a random network may leave out a class
        labels = (logits - logits.mean(0)).argmax(1)
        splits = split_examples(Examples(inner @ basis.T, labels), settings.validation, settings.test, seed + index)
        tasks.append(domain_task(f"teacher {index}", index, settings, splits))
    return Benchmark("teacher_student", domain_scenario(settings), tuple(tasks), TEACHER_CLASSES)


def task_subspaces(tasks: int, seed: int) -> Tensor:
    """Orthonormal bases of the tasks' inputs, own directions before shared ones; shape (tasks, 60, 8).

    Raises:
        NsrlError: so many do not fit.
    """
    most = (DIMENSION - SHARED) // OWN
    if tasks > most:
        raise NsrlError(f"teacher_student has room for {most} tasks, not {tasks}; lower benchmark.tasks")
    generator = torch.Generator().manual_seed(seed)
    orthonormal = torch.linalg.qr(torch.randn(DIMENSION, DIMENSION, generator=generator, dtype=torch.float64)).Q
    shared, *own = orthonormal[:, : SHARED + tasks * OWN].float().split([SHARED] + [OWN] * tasks, dim=1)
    return torch.stack([torch.cat([basis, shared], 1) for basis in own])


def regression(settings: BenchmarkSettings, seed: int) -> Benchmark:
    """A random curve learnt piece by piece, from left to right; one output, mean squared error; 5 tasks.

    y(x) is a sum of four sines with unit variance, x in [t, t + 1) in task t; the network sees x as Gaussian bumps.

    Raises:
        NsrlError: a scenario other than "domain".
    """
    if settings.scenario not in (None, "domain"):
        raise NsrlError(f"regression has one output for all tasks; its scenario is domain, not {settings.scenario}")
    count = settings.tasks or 5
    generator = torch.Generator().manual_seed(seed)
    frequencies = 2.0 * math.pi * (0.3 + 1.2 * torch.rand(4, generator=generator))
    phases = 2.0 * math.pi * torch.rand(4, generator=generator)
    tasks = []
    for index in range(count):
        x = index + torch.rand(EXAMPLES, 1, generator=generator)
        y = torch.sin(x * frequencies + phases).sum(1, keepdim=True) / math.sqrt(2.0)
        splits = split_examples(Examples(encode(x, count), y), settings.validation, settings.test, seed + index)
        tasks.append(TaskData(Task(f"{index} to {index + 1}", index), splits))
    return Benchmark("regression", "domain", tuple(tasks), 1, regression=True)


def encode(x: Tensor, tasks: int) -> Tensor:
    """Numbers in [0, tasks] as the heights of bumps along the line; shapes (N, 1) to (N, 12 tasks)."""
    centres = (torch.arange(tasks * BUMPS) + 0.5) / BUMPS
    return torch.exp(-0.5 * ((x - centres) * BUMPS / BUMP_WIDTH).square())
