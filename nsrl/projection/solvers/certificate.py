"""The certificate of a solve: what was done, and how well, measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Certificate:
    """How a system with K = J J^T was solved, and what the answer is worth.

    Attributes:
        method: "dual/cholesky", "dual/eigh", "primal", "nystrom" or "krylov".
        residual: |K y + damping y - b| / |b|, measured after the last pass (of several right-hand sides, the largest).
        rank: numerical rank of J. A lower bound where the method does not see the whole spectrum: nystrom, krylov,
            and a damped dual/cholesky of a rank-deficient K.
        effective_dimension: sum s / (s + damping) over the eigenvalues of K, with the same reservation.
        damping: lambda, as it was used.
        dtype: of the factors of J. Factorisations and vectors of length k are float64 always.
        passes: refinement passes made (Krylov dimension for "krylov").
        seconds: wall time.
    """

    method: str
    residual: float
    rank: int
    effective_dimension: float
    damping: float
    dtype: torch.dtype
    passes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.method}: residual {self.residual:.1e}, rank {self.rank}, effective dimension "
            f"{self.effective_dimension:.1f} at lambda {self.damping:.3g}, {str(self.dtype).removeprefix('torch.')} "
            f"factors, {self.passes} passes, {self.seconds:.3g} s"
        )
