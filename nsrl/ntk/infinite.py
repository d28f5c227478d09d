"""Infinitely wide fully connected networks: their Gaussian process and neural tangent kernels, in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from nsrl.errors import NsrlError

Activation = Literal["relu", "erf"]
#: Maps a covariance (n1, n2) and the two variances (n1, 1), (1, n2) to E[phi phi'] and E[phi_dot phi_dot'].
Moments = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class InfiniteNetwork:
    """A fully connected network whose hidden widths go to infinity, in the NTK parametrisation (Jacot et al. 2018).

    Layer l computes sqrt(weight_variance / width) W phi(h) + sqrt(bias_variance) b with W, b standard normal (the first
    layer: phi = identity, width = number of inputs). Its outputs at initialisation are a Gaussian process with kernel
    `nngp` (Lee et al. 2018), its tangent kernel is the constant `ntk` (Jacot et al. 2018, Lee et al. 2019). Both are
    per output: the full kernel of O outputs is `torch.kron(kernel, torch.eye(O))`.

    Attributes:
        hidden_layers: number of hidden layers, 0 for a linear model.
        activation: "relu" (arc-cosine kernel of degree 1, Cho and Saul 2009) or "erf" (arcsine kernel, Williams 1997).
        weight_variance: of all weights, before the division by the width.
        bias_variance: of all biases.
    """

    hidden_layers: int = 1
    activation: Activation = "relu"
    weight_variance: float = 2.0
    bias_variance: float = 0.0

    def __post_init__(self) -> None:
        if self.activation not in _MOMENTS:
            raise NsrlError(
                f'activation must be "relu" or "erf", not {self.activation!r}; others have no closed form here'
            )
        if self.hidden_layers < 0 or self.weight_variance <= 0 or self.bias_variance < 0:
            raise NsrlError(
                "hidden_layers and bias_variance must not be negative and weight_variance must be positive, not "
                f"{self.hidden_layers}, {self.bias_variance} and {self.weight_variance}"
            )

    def nngp(self, x1: Tensor, x2: Tensor | None = None) -> Tensor:
        """Covariance of an output at initialisation, shape (n1, n2), float64; inputs (n, d)."""
        return self._kernels(x1, x2)[0]

    def ntk(self, x1: Tensor, x2: Tensor | None = None) -> Tensor:
        """Tangent kernel of an output, shape (n1, n2), float64; inputs (n, d)."""
        return self._kernels(x1, x2)[1]

    def finite(self, inputs: int, width: int, outputs: int = 1, *, seed: int = 0,
               dtype: torch.dtype = torch.float64) -> nn.Sequential:  # fmt: skip
        """A network of this kind with finite width, in the same parametrisation; its kernels tend to these."""
        generator = torch.Generator().manual_seed(seed)
        sizes = [inputs, *[width] * self.hidden_layers, outputs]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(sizes):
            layer = NTKLinear(width_in, width_out, self.weight_variance, self.bias_variance, dtype)
            with torch.no_grad():
                layer.linear.weight.normal_(generator=generator)
            layers += [layer, nn.ReLU() if self.activation == "relu" else Erf()]
        return nn.Sequential(*layers[:-1])

    def _kernels(self, x1: Tensor, x2: Tensor | None) -> tuple[Tensor, Tensor]:
        x1, x2 = x1.double(), (x1 if x2 is None else x2).double()
        if x1.dim() != 2 or x2.dim() != 2 or x1.shape[1] != x2.shape[1] or not (x1.numel() and x2.numel()):
            raise NsrlError(f"inputs must be (n, d) with the same d > 0, not {tuple(x1.shape)} and {tuple(x2.shape)}")
        moments = _MOMENTS[self.activation]

        def affine(kernel: Tensor) -> Tensor:
            return self.weight_variance * kernel + self.bias_variance

        kernel = affine(x1 @ x2.T / x1.shape[1])
        left = affine(x1.square().mean(1, keepdim=True))
        right = affine(x2.square().mean(1, keepdim=True)).T
        tangent = kernel
        for _ in range(self.hidden_layers):
            products, slopes = moments(kernel, left, right)
            kernel = affine(products)
            tangent = kernel + self.weight_variance * slopes * tangent
            left, right = affine(moments(left, left, left)[0]), affine(moments(right, right, right)[0])
        return kernel, tangent


class NTKLinear(nn.Module):
    """sqrt(weight_variance / width_in) W x + sqrt(bias_variance) b, with W and b held side by side in one `nn.Linear`.

    The scales act on the inputs, with a constant input for the bias, so that the core sees an ordinary linear layer
    and keeps it factored.
    """

    def __init__(self, width_in: int, width_out: int, weight_variance: float, bias_variance: float,
                 dtype: torch.dtype = torch.float64):  # fmt: skip
        super().__init__()
        self.weight_scale = math.sqrt(weight_variance / width_in)
        self.bias_scale = math.sqrt(bias_variance)
        self.linear = nn.Linear(width_in + (bias_variance > 0), width_out, bias=False, dtype=dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, width_in) to (N, width_out)."""
        scaled = self.weight_scale * inputs
        if self.bias_scale > 0:
            scaled = torch.cat([scaled, scaled.new_full((*scaled.shape[:-1], 1), self.bias_scale)], -1)
        return self.linear(scaled)


class Erf(nn.Module):
    """The error function, entry by entry."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Any shape to the same shape."""
        return torch.erf(inputs)


def _relu_moments(kernel: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    norms = (left * right).sqrt()
    # An input of zero has no angle; its products vanish whatever the angle.
    cosine = (kernel / norms.clamp_min(torch.finfo(kernel.dtype).tiny)).clamp(-1.0, 1.0)
    angle = torch.arccos(cosine)
    products = norms * (angle.sin() + (math.pi - angle) * cosine) / (2 * math.pi)
    return products, (math.pi - angle) / (2 * math.pi)


def _erf_moments(kernel: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    spread = (1 + 2 * left) * (1 + 2 * right)
    products = 2 / math.pi * torch.arcsin((2 * kernel / spread.sqrt()).clamp(-1.0, 1.0))
    return products, 4 / math.pi / (spread - 4 * kernel.square()).sqrt()


_MOMENTS: dict[str, Moments] = {"relu": _relu_moments, "erf": _erf_moments}
