"""How far two right answers may lie apart: bounds from the number format, the size and the condition of a problem.

No number here comes from a run. Notation: u is the unit round-off of the format (half of `torch.finfo(dtype).eps`).

* Adding n numbers is off by at most n u times the sum of their sizes, in any order (Higham, Accuracy and Stability of
  Numerical Algorithms, 2nd ed., section 4.2), and, as roundings go up and down, by a multiple of sqrt(n) u with a
  probability near one (Higham & Mary 2019, SIAM J. Sci. Comput. 41). So is an entry of a product of matrices, relative
  to |A| |B|. Libraries that add in blocks, in vectors or with fused operations are nearer.
* The solution of a system by a backward stable method is off by a multiple of that times the condition, relative to its
  size (section 7.1). Normal equations have the square of the condition.
* exp, log and tanh are off by a few u, and not by the same few on every processor: sleef, MKL and the scalar library
  differ in the last bits.
* A training run doubles a difference every few steps: nothing but properties can be asked of its end.

`SAFETY` stands for the constants that these bounds leave out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Constants of the bounds, which are small whole numbers, and the depth of a network of a few layers.
SAFETY = 16.0
#: Width, in log lambda, at which `nsrl.projection.budget.model.solve_damping` stops to halve. Where in it the answer
#: lies is up to rounding. A fraction s / (s + lambda) moves by at most a quarter of it, what is left of a KL by twice
#: it.
ROOT = 1e-7


def unit(dtype: torch.dtype) -> float:
    """The unit round-off u."""
    return 0.5 * torch.finfo(dtype).eps


def relative(dtype: torch.dtype, terms: int = 1, condition: float = 1.0) -> float:
    """Largest error that rounding explains, as a share of the largest entry.

    Args:
        dtype: the least precise number format that a result went through.
        terms: numbers that were added up for an entry, all factors of a product of matrices together.
        condition: of the system that was solved; its square for normal equations.
    """
    return SAFETY * math.sqrt(terms) * unit(dtype) * condition


def assert_near(
    actual: Tensor,
    expected: Tensor,
    *,
    terms: int = 1,
    condition: float = 1.0,
    dtype: torch.dtype | None = None,
    scale: float | None = None,
) -> None:
    """Equal up to rounding.

    Args:
        actual, expected: of one shape.
        terms, condition: as for `relative`.
        dtype: as for `relative`; by default the less precise one of the two.
        scale: size of what was added up, where it cancels; by default the largest entry.
    """
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape
    if not actual.numel():
        return
    formats = [dtype] if dtype is not None else [actual.dtype, expected.dtype]
    share = relative(max(formats, key=unit), terms, condition)
    actual, expected = actual.double(), expected.double()
    size = float(expected.abs().max()) if scale is None else scale
    error = float((actual - expected).abs().max())
    assert error <= share * size, f"off by {error:.2e}, which is {error / max(size, 1e-300):.1e} of {size:.2e}"


def kl_excess(kl: float, outputs: Tensor, *, terms: int, spread: float = 1.0) -> float:
    """How much a KL divergence changes when a network's outputs are rounded otherwise.

    With d the change of the outputs, KL changes by (p - q).d + O(d^2), at most sqrt(2 KL) |d| + |d|^2 / 2 for a
    softmax (Pinsker) and a Gaussian of deviation `spread`. Two evaluations of one network in single precision are
    such a change, of `relative(outputs.dtype, terms)` times the largest output.

    Args:
        kl: the divergence, nats.
        outputs: logits or means.
        terms: width of the network, all layers together.
        spread: smallest standard deviation of a Gaussian; 1 for logits.
    """
    change = relative(outputs.dtype, terms) * max(float(outputs.abs().max()), 1.0) / spread
    return math.sqrt(2.0 * kl) * change + 0.5 * change**2
