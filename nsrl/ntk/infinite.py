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
#: Cosines beyond this one have lost digits of their angle, which is then taken from the vectors themselves.
NEAR = 0.99
#: Numbers that the pairs of vectors with such an angle may hold at a time.
CHUNK = 2**22


@dataclass(frozen=True)
class Covariance:
    """Of jointly Gaussian pairs (h, h'), one for every two inputs.

    Attributes:
        cross: E[h h'], (n1, n2).
        left, right: E[h^2], (n1, 1), and E[h'^2], (1, n2).
        angle: arc cosine of their correlation, (n1, n2), to all digits: the arc cosine of a correlation that is 1 up to
            round-off has half of them (Kahan 2006, "How futile are mindless assessments of roundoff", section 12).
    """

    cross: Tensor
    left: Tensor
    right: Tensor
    angle: Tensor


@dataclass(frozen=True)
class Moments:
    """What an activation phi makes of a `Covariance`.

    Attributes:
        products: E[phi phi'].
        slopes: E[phi_dot phi_dot'].
        left, right: E[phi^2], E[phi'^2].
        short, long: sqrt(left right) - products and sqrt(left right) + products, of which one is 0 where the angle is 0
            or pi.
    """

    products: Tensor
    slopes: Tensor
    left: Tensor
    right: Tensor
    short: Tensor
    long: Tensor


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

    def finite(
        self, inputs: int, width: int, outputs: int = 1, *, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> nn.Sequential:
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
        covariance = self._of_inputs(x1, x2)
        tangent = covariance.cross
        for _ in range(self.hidden_layers):
            found = moments(covariance)
            covariance = self._behind(found)
            tangent = covariance.cross + self.weight_variance * found.slopes * tangent
        return covariance.cross, tangent

    def _of_inputs(self, x1: Tensor, x2: Tensor) -> Covariance:
        """That of the first layer's outputs: an inner product of the inputs, with a constant for the bias."""
        vectors = [
            torch.cat(
                [
                    math.sqrt(self.weight_variance / x.shape[1]) * x,
                    x.new_full((len(x), 1), math.sqrt(self.bias_variance)),
                ],
                1,
            )
            for x in (x1, x2)
        ]
        left, right = (self._affine(x.square().mean(1)) for x in (x1, x2))
        return Covariance(self._affine(x1 @ x2.T / x1.shape[1]), left.unsqueeze(1), right, _angles(*vectors))

    def _behind(self, found: Moments) -> Covariance:
        """That of the next layer's outputs."""
        left, right = self._affine(found.left), self._affine(found.right)
        norms, means = (left * right).sqrt(), (found.left * found.right).sqrt()
        # sqrt(left right) -+ cross as sums of what is not negative: where one of them is small, it would be left of a
        # subtraction
        spread = self.weight_variance * self.bias_variance * (found.left.sqrt() - found.right.sqrt()).square()
        spread = spread / (norms + self._affine(means)).clamp_min(_TINY)
        short = spread + self.weight_variance * found.short
        long = spread + self.weight_variance * found.long + 2.0 * self.bias_variance
        return Covariance(self._affine(found.products), left, right, 2.0 * torch.atan2(short.sqrt(), long.sqrt()))

    def _affine(self, kernel: Tensor) -> Tensor:
        return self.weight_variance * kernel + self.bias_variance


class NTKLinear(nn.Module):
    """sqrt(weight_variance / width_in) W x + sqrt(bias_variance) b, with W and b held side by side in one `nn.Linear`.

    The scales act on the inputs, with a constant input for the bias, so that the core sees an ordinary linear layer
    and keeps it factored.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        weight_variance: float,
        bias_variance: float,
        dtype: torch.dtype = torch.float64,
    ):
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
        """Any shape, (...,), to the same shape."""
        return torch.erf(inputs)


def _angles(x1: Tensor, x2: Tensor) -> Tensor:
    """Angles between the rows of (n1, d) and (n2, d), shape (n1, n2), to all digits."""
    u, v = (x / x.norm(dim=1, keepdim=True).clamp_min(_TINY) for x in (x1, x2))
    cosines = (u @ v.T).clamp(-1.0, 1.0)
    angles = torch.arccos(cosines)
    near = (cosines.abs() > NEAR).nonzero()
    for rows, columns in (part.T for part in near.split(max(1, CHUNK // u.shape[1]))):
        ours, theirs = u[rows], v[columns]
        angles[rows, columns] = 2.0 * torch.atan2((ours - theirs).norm(dim=1), (ours + theirs).norm(dim=1))
    return angles


def _relu_moments(covariance: Covariance) -> Moments:
    # An input of zero has no angle; its products vanish whatever the angle.
    angle, norms = covariance.angle, (covariance.left * covariance.right).sqrt()
    products = norms * (angle.sin() + (math.pi - angle) * angle.cos()) / (2 * math.pi)
    short = norms / 2 * (2.0 * (angle / 2).sin().square() - _sine_less_cosine(angle) / math.pi)
    return Moments(
        products,
        (math.pi - angle) / (2 * math.pi),
        covariance.left / 2,
        covariance.right / 2,
        short,
        norms / 2 + products,
    )


def _sine_less_cosine(angle: Tensor) -> Tensor:
    """Sin a - a cos a, whose terms cancel for small a."""
    square, series = angle.square(), torch.zeros_like(angle)
    for n in range(6, 0, -1):
        series = square * series + (-1) ** (n + 1) * 2 * n / math.factorial(2 * n + 1)
    return torch.where(angle < 0.25, angle * square * series, angle.sin() - angle * angle.cos())


def _erf_moments(covariance: Covariance) -> Moments:
    cross, left, right = covariance.cross, covariance.left, covariance.right
    # (1 + 2 l) (1 + 2 r) - 4 k^2 with l r - k^2 from the angle, since large l r and k^2 are nearly equal
    apart = covariance.angle.sin().square()
    root = (1 + 2 * left + 2 * right + 4 * left * right * apart).sqrt()
    own_left, own_right = (torch.atan2(2 * own, (1 + 4 * own).sqrt()) for own in (left, right))
    both = torch.atan2(2 * cross, root)
    means = (own_left * own_right).sqrt()
    # sqrt(a b) - c as half of (a - c) + (b - c) less what the two means of a and b differ by; erf is odd, so what holds
    # for k > 0 holds for -k
    size = cross.abs()
    beyond = _beyond(size, left, right, apart, root) + _beyond(size, right, left, apart, root)
    small = ((beyond - (own_left.sqrt() - own_right.sqrt()).square()) / 2).clamp_min(0.0)
    short, long = (torch.where(sign * cross > 0.0, small, means - sign * both) for sign in (1.0, -1.0))
    products, slopes, own_left, own_right, short, long = (
        2 / math.pi * value for value in (both, 2 / root, own_left, own_right, short, long)
    )
    return Moments(products, slopes, own_left, own_right, short, long)


def _beyond(cross: Tensor, own: Tensor, other: Tensor, apart: Tensor, root: Tensor) -> Tensor:
    """Arc sine of 2 l / (1 + 2 l) less that of 2 k / sqrt((1 + 2 l) (1 + 2 r)), for k > 0.

    By the sine of a difference, in which what cancels has been taken out by hand: k^2 = l r (1 - sin^2).
    """
    rise = 2 * own * ((own - other) + other * apart * (1 + 2 * own))
    run = (own * root + cross * (1 + 4 * own).sqrt()) * ((1 + 2 * own) * (1 + 2 * other)).sqrt()
    return torch.arcsin((rise / run.clamp_min(_TINY)).clamp(-1.0, 1.0))


_TINY = torch.finfo(torch.float64).tiny
_MOMENTS: dict[str, Callable[[Covariance], Moments]] = {"relu": _relu_moments, "erf": _erf_moments}
