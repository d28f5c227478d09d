"""Randomised Nystrom preconditioning (Frangella, Tropp & Udell 2023, arXiv 2110.02820) and conjugate gradients.

K is only ever multiplied with. A Gaussian sketch finds its leading eigenvalues; with them out of the way the condition
number of what conjugate gradients see is O(1), whatever that of K, once the sketch is about twice the effective
dimension (their theorem 1.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nsrl.projection.jacobians.factored import Jacobian
from nsrl.projection.jacobians.matrix_free import Product
from nsrl.projection.solvers.conjugate_gradients import batched_conjugate_gradients
from nsrl.projection.solvers.solver import Solver
from nsrl.projection.solvers.spectrum import tolerance

#: Lambda of a hard projection, as a share of the largest eigenvalue: conjugate gradients need one.
RELATIVE_DAMPING = 1e-12


@dataclass(frozen=True)
class Sketch:
    """The Nystrom approximation U diag(s) U^T of K, below K in the order of positive semi-definite matrices.

    Attributes:
        values: s, descending, shape (l,), float64.
        vectors: U, orthonormal columns, shape (k, l), float64.
    """

    values: Tensor
    vectors: Tensor

    def preconditioned(self, rows: Tensor, damping: float) -> Tensor:
        """P^{-1} times rows (k, c): the inverse of the approximation + damping, up to a factor (their equation 5.3)."""
        inside = self.vectors.T @ rows
        least = self.values[-1] if self.values.numel() else 0.0
        weights = (least + damping) / (self.values + damping) - 1.0
        return rows + self.vectors @ (weights.unsqueeze(1) * inside)

    def effective_dimension(self, damping: float) -> float:
        """Sum s / (s + damping) over the sketch: at most that of K."""
        return float((self.values / (self.values + damping)).sum())


def nystrom(
    product: Product,
    rows: int,
    damping: float | Callable[[float], float],
    *,
    size: int = 16,
    largest: int | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Sketch:
    """Sketch K, doubling until the smallest eigenvalue in the sketch is at most the damping.

    Their section 5.4 stops at ten times the damping. A small sketch underestimates its last eigenvalues by about that.

    Args:
        product: K times a float64 matrix (k, c).
        rows: k.
        damping: lambda, or a function that makes it of the largest eigenvalue found.
        size: columns of the first sketch.
        largest: columns to stop at; default k.
        device: of the vectors.
        seed: of the Gaussian test matrix.

    Raises:
        ValueError: a product with NaN or infinite entries.
    """
    largest = min(rows, largest or rows)
    generator = torch.Generator().manual_seed(seed)
    test, image = (torch.zeros(rows, 0, dtype=torch.float64, device=device) for _ in range(2))
    while True:
        count = min(largest, max(size, 2 * test.shape[1])) - test.shape[1]
        fresh = torch.randn(rows, count, generator=generator, dtype=torch.float64).to(device)
        for _ in range(2):
            fresh = torch.linalg.qr(fresh - test @ (test.T @ fresh))[0]
        test, image = torch.cat([test, fresh], 1), torch.cat([image, product(fresh)], 1)
        sketch = _approximation(test, image)
        if test.shape[1] >= largest or not sketch.values.numel():
            return sketch
        wanted = damping(float(sketch.values[0])) if callable(damping) else damping
        if float(sketch.values[-1]) <= wanted:
            return sketch


def _approximation(test: Tensor, image: Tensor) -> Sketch:
    """(K T) (T^T K T)^+ (K T)^T with the shift that keeps its square root real (their algorithm 2.1)."""
    if not bool(torch.isfinite(image).all()):
        raise ValueError("a product with J has NaN or infinite entries; the model's outputs have diverged")
    shift = torch.finfo(torch.float64).eps * float(image.norm())
    image = image + shift * test
    inner, basis = torch.linalg.eigh(0.5 * (test.T @ image + image.T @ test))
    # The shift lifts what is zero to `shift`; below half of it there is only round-off.
    kept = inner > 0.5 * shift
    root = (image @ basis[:, kept]) / inner[kept].sqrt()
    vectors, singular, _ = torch.linalg.svd(root, full_matrices=False)
    return Sketch((singular.square() - shift).clamp_min(0.0), vectors)


class NystromSolver(Solver):
    """Conjugate gradients behind a randomised preconditioner; K is never formed.

    Args:
        jacobian: as for `Solver`.
        damping: lambda; 0 is replaced by `RELATIVE_DAMPING` of the largest eigenvalue, as the certificate states.
        passes: as for `Solver`.
        largest: columns that the sketch may have.
        iterations: of conjugate gradients, a pass.

    Attributes:
        iterations_made: of all solves together.
    """

    def __init__(
        self,
        jacobian: Jacobian,
        damping: float = 0.0,
        passes: int = 2,
        largest: int | None = None,
        iterations: int = 1000,
    ):
        super().__init__(jacobian, damping, passes)
        self.iterations, self.iterations_made = iterations, 0
        self._is_hard = damping == 0.0
        wanted = (lambda top: RELATIVE_DAMPING * top) if self._is_hard else (lambda top: damping)
        self.sketch = nystrom(self._gram, jacobian.shape[0], wanted, largest=largest, device=self.device)
        top = float(self.sketch.values[0]) if self.sketch.values.numel() else 1.0
        self.damping = wanted(top)

    @property
    def method(self) -> str:
        """As in `Certificate`."""
        return "nystrom"

    @property
    def rank(self) -> int:
        """Eigenvalues above round-off in the sketch: a lower bound."""
        values = self.sketch.values
        return int((values > tolerance(self.jacobian.shape[0], self.dtype) * values[:1]).sum())

    @property
    def effective_dimension(self) -> float:
        """Of the sketch: a lower bound."""
        return self.sketch.effective_dimension(self.damping)

    @property
    def _softness(self) -> float:
        return 0.0 if self._is_hard else self.damping

    def _inverse(self, rows: Tensor) -> Tensor:
        solution, made = batched_conjugate_gradients(
            lambda columns: self._gram(columns) + self.damping * columns,
            rows,
            precondition=lambda columns: self.sketch.preconditioned(columns, self.damping),
            iterations=self.iterations,
        )
        self.iterations_made += made
        return solution

    def _gram(self, rows: Tensor) -> Tensor:
        return torch.stack([self._seen(self._pulled(column)) for column in rows.T], 1)
