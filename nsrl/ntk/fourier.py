"""Fourier features widen the spectrum of a tangent kernel, so that high frequencies are learnt (Tancik et al. 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nsrl.errors import NsrlError


class FourierFeatures(nn.Module):
    """x -> sqrt(2 / |a|^2) [a cos(2 pi B x), a sin(2 pi B x)]: put it in front of a network.

    A dot-product kernel, as the tangent kernel of a fully connected network is, becomes stationary behind it.

    Args:
        frequencies: B, (m, d), in cycles per unit of x.
        amplitudes: a, (m,); default all one.
    """

    frequencies: Tensor
    amplitudes: Tensor

    def __init__(self, frequencies: Tensor, amplitudes: Tensor | None = None):
        super().__init__()
        amplitudes = torch.ones(frequencies.shape[0]).to(frequencies) if amplitudes is None else amplitudes
        if frequencies.dim() != 2 or amplitudes.shape != frequencies.shape[:1]:
            raise NsrlError(
                "Fourier features need frequencies (m, d) and amplitudes (m,), not "
                f"{tuple(frequencies.shape)} and {tuple(amplitudes.shape)}"
            )
        self.register_buffer("frequencies", frequencies)
        self.register_buffer("amplitudes", amplitudes)

    @classmethod
    def random(
        cls, inputs: int, count: int, scale: float, *, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> FourierFeatures:
        """Frequencies drawn from a normal distribution of standard deviation `scale` (cycles per unit)."""
        generator = torch.Generator().manual_seed(seed)
        return cls(scale * torch.randn(count, inputs, generator=generator, dtype=torch.float64).to(dtype))

    @classmethod
    def decaying(cls, count: int, power: float, *, dtype: torch.dtype = torch.float64) -> FourierFeatures:
        """Frequencies 1 to `count` on the unit interval, with amplitudes j^(-power): small powers reach high."""
        frequencies = torch.arange(1, count + 1, dtype=dtype)
        return cls(frequencies.unsqueeze(1), frequencies**-power)

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, d) to (N, 2 m), every row of squared norm 2."""
        angles = 2 * math.pi * inputs @ self.frequencies.T
        features = torch.cat([self.amplitudes * angles.cos(), self.amplitudes * angles.sin()], -1)
        return math.sqrt(2.0) / self.amplitudes.norm() * features


def frequency_spectrum(kernel: Tensor) -> Tensor:
    """How fast each frequency is learnt: v^* K v for the unit waves v on a regular grid of one period.

    Args:
        kernel: (n, n), at the inputs 0, 1/n, ..., (n - 1)/n.

    Returns:
        Frequencies 0 to n // 2, shape (n // 2 + 1,), float64; the eigenvalues themselves for a stationary kernel.

    Raises:
        NsrlError: a kernel that is not square.
    """
    if kernel.dim() != 2 or kernel.shape[0] != kernel.shape[1]:
        raise NsrlError(f"a frequency spectrum needs the square kernel of one grid, not shape {tuple(kernel.shape)}")
    points = kernel.shape[0]
    transformed = torch.fft.ifft(torch.fft.fft(kernel.double(), dim=0), dim=1)
    return transformed.diagonal().real[: points // 2 + 1].contiguous()
