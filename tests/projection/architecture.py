"""One entry of the architecture matrix, and the inputs that its entries share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.projection.builders import jacrev_matrix, normal, rows_matrix


def vectors(samples: int, seed: int) -> Tensor:
    return normal(samples, 4, seed=seed)


def images(samples: int, seed: int) -> Tensor:
    return normal(samples, 3, 7, 7, seed=seed)


def volumes(samples: int, seed: int) -> Tensor:
    return normal(samples, 2, 3, 2, 2, seed=seed)


def sequences(samples: int, seed: int) -> Tensor:
    return normal(samples, 3, 4, seed=seed)


def tokens(samples: int, seed: int) -> Tensor:
    return torch.randint(0, 6, (samples, 3), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Architecture:
    """A module builder, its inputs, and the number of parameters that may need materialised columns.

    Attributes:
        rows: the oracle is one backward pass a row, because `torch.func.jacrev` cannot follow the module.
    """

    name: str
    build: Callable[[], nn.Module]
    dense: int
    inputs: Callable[[int, int], Any] = field(default=vectors)
    rows: bool = False

    def __str__(self) -> str:
        return self.name

    def oracle(self, module: nn.Module, inputs: Any) -> Tensor:
        """The Jacobian (N * O, P) without any of nsrl's code."""
        return rows_matrix(module, inputs) if self.rows else jacrev_matrix(module, inputs)


def frozen(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    return module
