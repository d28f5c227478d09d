"""Random functions: the simplest tangent kernel, constant by construction (Jacot et al. 2018, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nsrl.errors import NsrlError

#: Maps inputs (n, d) to the values of P functions, (n, P).
Functions = Callable[[Tensor], Tensor]


def random_function_kernel(functions: Functions, x1: Tensor, x2: Tensor | None = None) -> Tensor:
    """K(x, x') = 1/P sum_p f_p(x) f_p(x'), shape (n1, n2), float64.

    By the law of large numbers it tends to the covariance E[f(x) f(x')] of the functions, with error P^(-1/2).

    Raises:
        NsrlError: unless the functions' values are a matrix (n, P) with P > 0.
    """
    ours = _values(functions, x1)
    theirs = ours if x2 is None else _values(functions, x2)
    return ours @ theirs.T / ours.shape[1]


def fourier_functions(inputs: int, count: int, bandwidth: float = 1.0, *, seed: int = 0) -> Functions:
    """Random functions sqrt(2) cos(w . x + b) whose kernel tends to exp(-|x - x'|^2 / (2 bandwidth^2)).

    Source: Rahimi and Recht, Random features for large-scale kernel machines, 2007.
    """
    generator = torch.Generator().manual_seed(seed)
    frequencies = torch.randn(inputs, count, generator=generator, dtype=torch.float64) / bandwidth
    phases = 2 * math.pi * torch.rand(count, generator=generator, dtype=torch.float64)
    return lambda x: math.sqrt(2.0) * torch.cos(x.double() @ frequencies + phases)


class RandomFunctionModel(nn.Module):
    """f(x) = P^(-1/2) sum_p theta_p f_p(x), linear in theta: its tangent kernel is `random_function_kernel`, always."""

    def __init__(self, functions: Functions, count: int):
        super().__init__()
        self.functions = functions
        self.readout = nn.Linear(count, 1, bias=False, dtype=torch.float64)
        nn.init.normal_(self.readout.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, d) to (N, 1)."""
        return self.readout(self.functions(inputs) / math.sqrt(self.readout.in_features))


def _values(functions: Functions, inputs: Tensor) -> Tensor:
    values = functions(inputs).double()
    if values.dim() != 2 or values.shape[0] != inputs.shape[0] or not values.numel():
        raise NsrlError(f"the functions' values must have shape ({inputs.shape[0]}, P), not {tuple(values.shape)}")
    return values
