"""Dark experience replay: a reservoir of samples with the outputs that the model gave when they came by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsrl.continual.heads import ABSENT
from nsrl.continual.objectives import objective_of
from nsrl.continual.optimizers import OptimizerConfig
from nsrl.continual.reservoir import Reservoir
from nsrl.continual.strategies.base import Strategy, joined_heads
from nsrl.errors import NsrlError


@dataclass(frozen=True)
class DEROptions:
    """What is kept and how much of it is used.

    Attributes:
        buffer_size: samples in the reservoir, of all tasks together.
        batch_samples: drawn from it at every step.
        alpha: weight of the mean squared difference between the outputs and those that were stored.
        seed: of both.
    """

    buffer_size: int = 1000
    batch_samples: int = 64
    alpha: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.buffer_size < 1 or self.batch_samples < 1:
            raise NsrlError(
                f"buffer_size and batch_samples must be at least 1, not {self.buffer_size} and {self.batch_samples}"
            )
        if not self.alpha >= 0.0:
            raise NsrlError(f"alpha must not be negative, but it is {self.alpha}")


@dataclass(frozen=True)
class DERPlusPlusOptions(DEROptions):
    """As DER's.

    Attributes:
        beta: weight of the labels' loss on a second draw.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta >= 0.0:
            raise NsrlError(f"beta must not be negative, but it is {self.beta}")


class DER(Strategy):
    """Buzzega et al. 2020 (arXiv 2004.07211): the loss, and alpha times the squared way of the outputs on a reservoir.

    The outputs are those of the step in which a sample came by, not those of the end of its task: nothing has to know
    where a task ends. As in the authors' code the square is the mean over samples and outputs.

    Args:
        model, optimizer: as `Strategy`.
        options: reservoir and weight.
    """

    name = "der"

    def __init__(self, model: nn.Module, optimizer: OptimizerConfig | None = None, options: DEROptions | None = None):
        super().__init__(model, optimizer)
        self.options = options or DEROptions()
        self.reservoir = Reservoir(self.options.buffer_size, self.options.seed)

    def memory_bytes(self) -> int:
        """Inputs, labels and outputs of the reservoir."""
        return self.reservoir.nbytes()

    def progress(self) -> dict[str, Any]:
        """The reservoir."""
        return self.reservoir.progress()

    def resume(self, progress: dict[str, Any]) -> None:
        """Go on with the reservoir."""
        self.reservoir.resume(progress)

    def _draws(self) -> list[Tensor]:
        """Indices for each of the terms in `_penalty`."""
        return [self.reservoir.draw(self.options.batch_samples)]

    def _slopes(self, outputs: list[Tensor], draws: list[Tensor]) -> list[Tensor]:
        """Gradient of what the reservoir adds to the loss, in the outputs of each draw."""
        then, now = self.reservoir.outputs.index_select(0, draws[0]), outputs[0]
        there = then > 0.5 * ABSENT
        # a head may be narrower than the widest one: its missing columns are no outputs
        gaps = torch.where(there, now - then, 0.0)
        return [gaps.mul_(2.0 * self.options.alpha / there.sum())]

    def _backward(self, inputs: Tensor, targets: Tensor, head: int | None) -> float:
        draws = self._draws() if len(self.reservoir) else []
        old = torch.cat(draws) if draws else torch.zeros(0, dtype=torch.long, device=inputs.device)
        if draws:
            heads = joined_heads(head, len(inputs), self.reservoir.heads_of(old))
            together = torch.cat([inputs, self.reservoir.inputs.index_select(0, old)])
            passed = self._pass(together, heads)
        else:
            passed = self._pass(inputs, head)
        new, *kept = passed.outputs.split([len(inputs), *map(len, draws)])
        objective = objective_of(targets)
        objective.check(new, targets)
        loss, slope = objective.loss_and_slope(new, targets)
        width = slope.shape[1]
        slopes = [self._sized(piece, width, 0.0) for piece in self._slopes(self._fitted(kept), draws)] if draws else []
        passed.backward(torch.cat([slope, *slopes]))
        self.reservoir.offer(inputs, targets, new, head)
        return float(loss)

    def _fitted(self, outputs: list[Tensor]) -> list[Tensor]:
        """Outputs with as many columns as those in the reservoir."""
        width = self.reservoir.outputs.shape[1]
        return [self._sized(out, width, ABSENT) for out in outputs]

    @staticmethod
    def _sized(outputs: Tensor, width: int, value: float) -> Tensor:
        """(n, width): columns cut off, or filled."""
        gap = width - outputs.shape[1]
        return F.pad(outputs, (0, gap), value=value) if gap > 0 else outputs[:, :width]


class DERPlusPlus(DER):
    """As DER, and beta times the labels' loss on a second, independent draw.

    Args:
        model, optimizer: as `Strategy`.
        options: with `beta`.
    """

    name = "derpp"

    def __init__(
        self, model: nn.Module, optimizer: OptimizerConfig | None = None, options: DERPlusPlusOptions | None = None
    ):
        super().__init__(model, optimizer, options or DERPlusPlusOptions())

    def _draws(self) -> list[Tensor]:
        return [*super()._draws(), self.reservoir.draw(self.options.batch_samples)]

    def _slopes(self, outputs: list[Tensor], draws: list[Tensor]) -> list[Tensor]:
        assert isinstance(self.options, DERPlusPlusOptions)
        targets = self.reservoir.targets.index_select(0, draws[1])
        _, labels = objective_of(targets).loss_and_slope(outputs[1], targets)
        return [*super()._slopes(outputs, draws), labels.mul_(self.options.beta)]
