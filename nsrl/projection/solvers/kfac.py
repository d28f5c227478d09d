"""Kronecker-factored curvature of a policy (Martens & Grosse 2015), as a preconditioner of conjugate gradients.

A linear layer's block of J^T J is a sum over states of (a a^T) x (g g^T), inputs a with output gradients g. The product
of the mean of a a^T and the sum of g g^T stands for it: wrong, but right about the scales, which differ by four orders
of magnitude between the directions of a small policy. Conjugate gradients on the exact products then need a fraction of
the iterations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsrl.projection.jacobians.matrix_free import LayerFactors

#: Damping is at least this share of the block's mean eigenvalue, so that factors without full rank have an inverse.
LEAST_DAMPING = 1e-6


class KroneckerPreconditioner:
    """v -> (F + damping + mu K)^-1 v, with Kronecker factors in place of F and K, for any mu.

    Both pairs of factors become diagonal in one pair of bases, so that their sum, which is no Kronecker product, is
    inverted as it stands.

    Args:
        rollout: factors of F.
        damping: added to F, split between the factors of a layer as in section 6.3 of the paper.
        buffer: factors of K, of the same layers; none for K = 0.
    """

    def __init__(self, rollout: Sequence[LayerFactors], damping: float, buffer: Sequence[LayerFactors] = ()):
        kept = {factors.weight: factors for factors in buffer}
        self._blocks = [_Block.of(factors, kept.get(factors.weight), damping) for factors in rollout]

    def __call__(self, vector: Tensor, multiplier: float = 0.0) -> Tensor:
        """The product with a vector (P,); columns of no layer are left as they are."""
        out = vector.clone()
        for block in self._blocks:
            block.write(out, block.divide(block.read(vector), multiplier))
        return out


@dataclass(frozen=True)
class _Block:
    """G V A + mu G' V A' for matrices V (d_out, d): G = (Q^T Q)^-1, G' = Q^-1 diag(q) Q^-T, and so A, A' by P and p."""

    weight: int
    bias: int | None
    inputs: Tensor
    outputs: Tensor
    shares: Tensor

    @classmethod
    def of(cls, first: LayerFactors, second: LayerFactors | None, damping: float) -> _Block:
        inputs, outputs = first.inputs.double(), first.outputs.double()
        means = [max(float(factor.diagonal().mean()), 1e-30) for factor in (inputs, outputs)]
        root = max(damping, LEAST_DAMPING * means[0] * means[1]) ** 0.5
        balance = (means[0] / means[1]) ** 0.5
        left, p = _whiten(_add(inputs, root * balance), None if second is None else second.inputs.double())
        right, q = _whiten(_add(outputs, root / balance), None if second is None else second.outputs.double())
        like = first.inputs
        return cls(first.weight, first.bias, left.to(like), right.to(like), torch.outer(q, p).to(like))

    def read(self, vector: Tensor) -> Tensor:
        """The layer's part of a flat vector as (d_out, d)."""
        rows, columns = self.shares.shape
        columns -= self.bias is not None
        weight = vector[self.weight : self.weight + rows * columns].view(rows, columns)
        return weight if self.bias is None else torch.cat([weight, vector[self.bias : self.bias + rows, None]], 1)

    def write(self, vector: Tensor, values: Tensor) -> None:
        """The reverse, in place."""
        rows = len(values)
        weight = values if self.bias is None else values[:, :-1]
        vector[self.weight : self.weight + weight.numel()] = weight.flatten()
        if self.bias is not None:
            vector[self.bias : self.bias + rows] = values[:, -1]

    def divide(self, values: Tensor, multiplier: float) -> Tensor:
        """The inverse's product with a matrix."""
        turned = self.outputs @ values @ self.inputs.T
        return self.outputs.T @ (turned / (1.0 + multiplier * self.shares)) @ self.inputs


def _add(matrix: Tensor, value: float) -> Tensor:
    return matrix + value * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def _whiten(first: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor]:
    """P with P first P^T = I and P second P^T = diag(p)."""
    inverse = torch.linalg.inv(torch.linalg.cholesky(first))
    if second is None:
        return inverse, first.new_zeros(len(first))
    values, vectors = torch.linalg.eigh(inverse @ second @ inverse.T)
    return vectors.T @ inverse, values.clamp_min(0.0)
