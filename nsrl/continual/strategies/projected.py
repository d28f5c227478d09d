"""The frame of the projecting strategies: what an optimizer did in a step is projected, not what it was given.

For plain SGD, with or without momentum, projecting the step is projecting the gradient; for Adam it is what keeps
the step in the null space at all.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from nsrl.continual.heads import MultiHead
from nsrl.continual.optimizers import OptimizerConfig, is_plain_sgd
from nsrl.continual.passes import Pass, Rows, fits
from nsrl.continual.strategies.base import Strategy
from nsrl.continual.tasks import Loader, Task
from nsrl.projection.optimizer import FlatParameters, StepHooks
from nsrl.reading.values import finite, mapping, whole

#: Steps between two certificates: they cost several times the projection itself.
CERTIFIED_EVERY = 100


class ProjectedStrategy(Strategy):
    """Subclasses map the displacement of a step to the one that is made.

    Args:
        model, optimizer: as `Strategy`.

    Attributes:
        certificate: "kept_share" and "leakage" of the latest certified step.
    """

    def __init__(self, model: nn.Module, optimizer: OptimizerConfig | None = None):
        super().__init__(model, optimizer)
        self.certificate: dict[str, float] = {}
        self._steps = 0
        self._projected = False
        self._rows: Rows | None = None

    def diagnostics(self) -> dict[str, float]:
        """As `Strategy`, with "kept_share", "leakage" and "rank"."""
        if not self.tasks:
            return {}
        return {**super().diagnostics(), **self.certificate, "rank": float(self.rank())}

    def progress(self) -> dict[str, Any]:
        """Steps so far, every so many of which are certified, and the latest certificate."""
        return {"steps": self._steps, "certificate": self.certificate}

    def resume(self, progress: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            Unreadable: a file that was changed.
        """
        mapping(progress, "progress", ["steps", "certificate"], ())
        certificate = mapping(progress["certificate"], "certificate")
        self._steps = whole(progress["steps"], "steps")
        self.certificate = {key: finite(value, key) for key, value in certificate.items()}

    def rank(self) -> int:
        """Number of protected parameter directions."""
        raise NotImplementedError

    def _pass(self, inputs: Tensor, head: int | Tensor | None) -> Pass:
        if self._projects_gradient and self._chain is not None and fits(self._chain, inputs, head):
            self._projected = True
            return self._chain.run(inputs, head, self._rows)
        self._projected = False
        return super()._pass(inputs, head)

    @property
    def _projects_gradient(self) -> bool:
        """Whether this step's gradient is projected instead of its displacement; certificates are of displacements."""
        return self._rows is not None and self._steps % CERTIFIED_EVERY != 0

    # -- for subclasses ---------------------------------------------------------------------------------------------

    def _project(self, displacement: Tensor) -> Tensor:
        """The displacement to make instead."""
        raise NotImplementedError

    def _projected_rows(self) -> Rows | None:
        """Where the projection is one of layer inputs: what stands in for them in a gradient; None: it is not."""
        return None

    def _certify(self, displacement: Tensor) -> dict[str, float]:
        """Certificate of a displacement's projection."""
        return {}

    @property
    def projected_parameters(self) -> FlatParameters:
        """The parameters whose displacement `_project` sees."""
        return self.flat

    def _begin(self, task: Task, loader: Loader) -> None:
        if not self.tasks:
            return
        flat = self.projected_parameters
        start = torch.zeros(0)
        # A step of plain SGD is a multiple of the gradient.
        self._rows = self._projected_rows() if is_plain_sgd(self.optimizer) and not self.config.weight_decay else None

        def before() -> None:
            nonlocal start
            if not self._projected:
                start = flat.read()

        def after() -> None:
            if self._projected:
                self._steps += 1
                return
            way = flat.read() - start
            if self._steps % CERTIFIED_EVERY == 0:
                self.certificate = self._certify(way)
            self._steps += 1
            flat.write(start + self._project(way).to(way))

        StepHooks(self.optimizer, before, after)


def freeze_uncovered(model: nn.Module, covered: set[str], quiet: set[str] | None = None) -> None:
    """Freeze for good the trainable parameters that a method does not cover, but for heads still to be trained.

    Args:
        model: whose parameters.
        covered: names that are protected.
        quiet: names that the method's paper freezes too: no warning.

    Warns:
        UserWarning: with the names.
    """
    heads = set()
    if isinstance(model, MultiHead):
        heads = {f"heads.{name}" for name, _ in model.heads.named_parameters()}
    frozen = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in covered and name not in heads:
            parameter.requires_grad_(False)
            frozen.append(name)
    loud = [name for name in frozen if name not in (quiet or set())]
    if loud:
        warnings.warn(
            f"{', '.join(loud)}: no constraint covers these parameters; they are frozen after the first task",
            stacklevel=3,
        )
