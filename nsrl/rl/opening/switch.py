"""The switch: how a policy's inputs tell the new task from the old one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

#: Change of an input between the tasks that counts as one, in units of the policy's inputs.
LEAST_CHANGE = 1e-6


@dataclass(frozen=True)
class Switch:
    """A linear function of a policy's features that is 0 on the old task and 1 on the new one's average.

    Attributes:
        columns: indices of the features that it reads, (C,).
        weights: its weights, (C,), float64.
        origin: what these features are on the old task, (C,), float64.
        flicker: largest distance from 1 among the new task's states.
    """

    columns: Tensor
    weights: Tensor
    origin: Tensor
    flicker: float

    @classmethod
    def between(cls, before: Tensor, after: Tensor) -> Switch | None:
        """The switch between two tasks; None where no feature tells them apart.

        Args:
            before: features of old states, (N, F).
            after: of new ones, (M, F).
        """
        columns = free_inputs(before, after)
        if len(columns) == 0:
            return None
        origin = before[0, columns].double()
        moved = after[:, columns].double() - origin
        mean = moved.mean(0)
        if float(mean.square().sum()) == 0.0:
            return None
        weights = mean / mean.square().sum()
        return cls(columns, weights, origin, float((moved @ weights - 1.0).abs().max()))

    @property
    def offset(self) -> float:
        """What the weights make of the old task's features."""
        return float(self.weights @ self.origin)


def free_inputs(before: Tensor, after: Tensor) -> Tensor:
    """Indices of the features, of (N, F) and (M, F), that are constant on the old task and other on the new one."""
    change = (after - before[:1]).square().mean(0).sqrt()
    return ((before == before[:1]).all(0) & (change > LEAST_CHANGE)).nonzero().flatten()
