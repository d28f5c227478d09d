"""What a recorded path did to the queries."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nsrl.errors import NsrlError


@dataclass(frozen=True)
class StepRecord:
    """One step of the optimizer.

    Attributes:
        displacement: |D_k|, the norm of the realised displacement.
        change: |f(w_{k+1}) - f(w_k)| on the queries.
        residual: |f(w_{k+1}) - f(w_k) - J(w_k) D_k|, what the first-order term leaves out: O(|D_k|^2).
    """

    displacement: float
    change: float
    residual: float


@dataclass(frozen=True)
class PathResult:
    """What a path did to the queries; predicted = initial + steps + outside, and steps = contributions + rest.

    Attributes:
        initial: f(x; w_0), shape (N, O).
        final: f(x; w_N), evaluated, (N, O).
        predicted: f(x; w_N), rebuilt from the path, (N, O).
        steps: change by the optimizer's own steps, (N, O).
        outside: change by whatever moved the parameters between steps (a projection, a restoration), (N, O).
        totals: for each weighting its sum over the path, (N, ..., M).
        rest: the part of `steps` that belongs to no recorded sample: Adam's and momentum's memory of earlier batches,
            weight decay, other losses, an unknown optimizer; (N, O). All of `steps` where no samples were recorded.
        certificate: |final - predicted| / |final - initial| of every query, (N,); 0 where nothing moved.
        history: one record a step, when asked for.
    """

    initial: Tensor
    final: Tensor
    predicted: Tensor
    steps: Tensor
    outside: Tensor
    totals: dict[str, Tensor]
    rest: Tensor
    certificate: Tensor
    history: tuple[StepRecord, ...]

    @property
    def contributions(self) -> Tensor:
        """How much each sample moved each output of each query, (N, O, M).

        Raises:
            NsrlError: no samples were recorded.
        """
        if "contribution" not in self.totals:
            raise NsrlError("no contributions were recorded: give the recorder the number of samples")
        return self.totals["contribution"]
