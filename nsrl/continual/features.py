"""Protected layer features: what every layer has seen of learnt tasks does not change its outputs any more.

The way of the weights since the last task's end is projected as a whole, W_ref + (W - W_ref)(I - Q Q^T): an exact
retraction, so nothing drifts however many steps are made in between and whatever the optimizer did in them. The
protected span only grows.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nsrl.continual.heads import model_outputs
from nsrl.continual.tasks import Loader, Task
from nsrl.errors import NsrlError
from nsrl.projection import FeatureConstraint, Hard, Projected
from nsrl.projection.optimizer import FlatParameters
from nsrl.reading.tensors import like
from nsrl.reading.values import mapping, whole


@dataclass(frozen=True)
class FeatureOptions:
    """Which features are protected, and how often the weights are brought back.

    Attributes:
        energy: share of every layer's feature energy that is protected, in (0, 1]; 1 protects all directions above
            round-off and keeps outputs exactly, but leaves nothing free in a layer that has seen more samples than it
            has inputs.
        project_every: steps from one projection of the whole way to the next; also at the task's end.
    """

    energy: float = 0.99
    project_every: int = 10

    def __post_init__(self) -> None:
        if not 0.0 < self.energy <= 1.0:
            raise NsrlError(f"energy is a share in (0, 1], not {self.energy}")
        if self.project_every < 1:
            raise NsrlError(f"project_every must be at least 1 step, not {self.project_every}")


class ProtectedFeatures:
    """Keeps the weights in the null space of the features of learnt tasks.

    Args:
        model: any module with linear layers or convolutions.
        options: energy and interval.
        freeze: freeze trainable parameters that no layer covers (norm scales, embeddings) when the first task is taken
            in, with a warning that names them; else they only get the warning.

    Attributes:
        constraint: the features; `constraint.protected_rank` by layer.
        last: certificate of the latest projection.
    """

    def __init__(self, model: nn.Module, options: FeatureOptions, freeze: bool = True):
        self.model = model
        self.options = options
        self.freeze = freeze
        self.constraint = FeatureConstraint(model)
        self.last: Projected | None = None
        self._reference: Tensor | None = None
        self._steps = 0
        self._begun = False
        self._pending = False

    @property
    def flat(self) -> FlatParameters:
        """The parameters of the constraint's columns as one vector."""
        named = dict(self.model.named_parameters())
        return FlatParameters([named[name] for name in self.constraint.columns])

    def retain(self, task: Task, loader: Loader) -> None:
        """Project once more, then protect the features of a task that was learnt.

        Raises:
            NsrlError: the loader is empty.
        """
        self.enforce()
        empty = True
        for batch in loader:
            empty = empty and not len(batch[0])
            self.constraint.update(self.model, batch[0], lambda m, inputs: model_outputs(m, inputs, task.head))
        if empty:
            raise NsrlError("the loader is empty: a task needs at least one sample")
        self.constraint.consolidate(Hard() if self.options.energy == 1.0 else Hard(energy=self.options.energy))
        if not self._begun:
            self._report_uncovered()
        self._begun = True
        self.restart()

    def restart(self) -> None:
        """Count the way from the present weights."""
        self._reference = self.flat.read()

    def tick(self) -> None:
        """Count a step; project every `project_every` of them."""
        self._steps += 1
        self._pending = True
        if self._steps % self.options.project_every == 0:
            self.enforce()

    def enforce(self) -> None:
        """Project the way since the reference."""
        if self._begun and self._reference is not None:
            flat = self.flat
            done = self.constraint.project(flat.read() - self._reference)
            flat.write(self._reference + done.displacement)
            if self._pending:
                # without a step in between there is round-off to project, whose certificate says nothing
                self.last, self._pending = done, False

    def certificate(self) -> dict[str, float]:
        """Kept share (least over the layers), leakage and rank of the latest projection."""
        if self.last is None:
            return {}
        return {"kept_share": self.last.kept_share, "leakage": self.last.leakage, "rank": float(self.last.rank)}

    def progress(self) -> dict[str, Any]:
        """Where the way began, and the steps since."""
        return {"steps": self._steps, "start": self._reference}

    def resume(self, progress: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            Unreadable: a file that was changed.
        """
        mapping(progress, "progress", ["steps", "start"])
        start = progress["start"]
        self._reference = None if start is None else like(start, self.flat.read(), "start")
        self._steps = whole(progress["steps"], "steps")

    def nbytes(self) -> int:
        """Protected spans."""
        return self.constraint.nbytes()

    def _report_uncovered(self) -> None:
        named = dict(self.model.named_parameters())
        free = [name for name in self.constraint.uncovered if named[name].requires_grad]
        if not free:
            return
        consequence = "frozen from now on" if self.freeze else "free to move, only the KL budget minds them"
        warnings.warn(f"{', '.join(free)}: no layer features cover these parameters; {consequence}", stacklevel=4)
        if self.freeze:
            for name in free:
                named[name].requires_grad_(False)
