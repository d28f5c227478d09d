"""Adam-NSCL: Adam's steps in the approximate null space of every layer's feature covariance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nsrl.continual.heads import model_outputs
from nsrl.continual.optimizers import OptimizerConfig
from nsrl.continual.passes import Rows
from nsrl.continual.strategies.bases import AsGiven, BasisConstraint, LayerBasis
from nsrl.continual.strategies.ewc import fisher_diagonal
from nsrl.continual.strategies.gpm import weight_features
from nsrl.continual.strategies.projected import ProjectedStrategy, freeze_uncovered
from nsrl.continual.tasks import Loader, Task
from nsrl.projection import FeatureConstraint, SmallestMultiple, parameter_columns
from nsrl.projection.constraints.feature_moments import LayerMoments
from nsrl.projection.optimizer import FlatParameters


@dataclass(frozen=True)
class AdamNSCLOptions:
    """The rule of the paper, and by name what the official code does otherwise.

    Attributes:
        multiple: a; directions with a singular value of at most a times the smallest are the null space (paper: 10 for
            ten tasks, 30 for twenty).
        normalised_projector: divide the projector by its Frobenius norm, sqrt(kept directions): a hidden learning rate
            a layer.
        batch_mean_features: average the features over a batch before their outer product.
        norm_penalty: strength of an EWC penalty on biases and norm scales, which are trained on then; None freezes them
            after the first task.
        fisher_samples: of a task, for that penalty.
    """

    multiple: float = 10.0
    normalised_projector: bool = False
    batch_mean_features: bool = False
    norm_penalty: float | None = None
    fisher_samples: int = 500


@dataclass(frozen=True)
class OfficialAdamNSCLOptions(AdamNSCLOptions):
    """The official code's deviations as defaults; its EWC coefficient is 100."""

    normalised_projector: bool = True
    batch_mean_features: bool = True
    norm_penalty: float | None = 100.0


class AdamNSCL(ProjectedStrategy):
    """Wang et al. 2021 (arXiv 2103.07113): the covariance of all tasks, its singular values, the smallest kept.

    Every layer's uncentred covariance is a running mean over all data of all tasks. The rule is anchored to the
    smallest singular value: with fewer features than dimensions that is round-off, of which nearly nothing lies within
    a factor `multiple`, and with more data it rises and sets directions free that earlier tasks need (`kept` shows it).

    Args:
        model, optimizer: as `Strategy`; the paper uses Adam.
        options: a, and the official code's deviations.

    Attributes:
        kept: dimension of the null space of every layer, as of the last task.
    """

    name = "adam_nscl"

    def __init__(
        self, model: nn.Module, optimizer: OptimizerConfig | None = None, options: AdamNSCLOptions | None = None
    ):
        super().__init__(model, optimizer)
        self.options = options or AdamNSCLOptions()
        self.kept: dict[str, int] = {}
        self.constraint: BasisConstraint | None = None
        self._features: FeatureConstraint | None = None
        self._stiffness: Tensor | None = None
        self._pull: Tensor | None = None

    def memory_bytes(self) -> int:
        """Covariances, bases and the penalty's two vectors."""
        held = [part.moment for part in self._features._parts()] if self._features else []
        tensors = [t for t in (*held, self._stiffness, self._pull) if t is not None]
        bases = 0 if self.constraint is None else self.constraint.nbytes()
        return bases + sum(t.numel() * t.element_size() for t in tensors)

    def rank(self) -> int:
        """Directions that are removed."""
        return 0 if self.constraint is None else sum(space.rank for space in self.constraint.eigenspaces)

    @property
    def projected_parameters(self) -> FlatParameters:
        """The weights of linear layers and convolutions."""
        assert self.constraint is not None
        named = dict(self.model.named_parameters())
        return FlatParameters([named[name] for name in self.constraint.columns])

    def _project(self, displacement: Tensor) -> Tensor:
        assert self.constraint is not None
        return self.constraint.applied(displacement)

    def _projected_rows(self) -> Rows | None:
        assert self.constraint is not None
        return self.constraint.rows(self.model)

    def _certify(self, displacement: Tensor) -> dict[str, float]:
        assert self.constraint is not None
        done = self.constraint.project(displacement, AsGiven())
        return {"kept_share": done.kept_share, "leakage": done.leakage}

    def _backward(self, inputs: Tensor, targets: Tensor, head: int | None) -> float:
        loss = super()._backward(inputs, targets, head)
        if self._stiffness is not None and self._pull is not None and self.options.norm_penalty:
            free = self._free_parameters
            gradient = self.options.norm_penalty * (self._stiffness * free.read() - self._pull)
            for parameter, piece in zip(free.parameters, gradient.split(free.sizes), strict=True):
                if parameter.grad is not None:
                    parameter.grad += piece.view_as(parameter)
        return loss

    def _end(self, task: Task, loader: Loader) -> None:
        if self._features is None:
            self._features = weight_features(self.model)
            if self.options.batch_mean_features:
                _average_batches(self._features)
            if self.options.norm_penalty is None:
                biases = {name for name, _ in self.model.named_parameters() if name.endswith("bias")}
                freeze_uncovered(self.model, set(self._features.covered), quiet=biases)
        features = self._features
        for batch in loader:
            for part in features._parts():
                if isinstance(part, _BatchMeanMoments):
                    part.samples = len(batch[0])
            features.update(self.model, batch[0], forward=lambda m, inputs: model_outputs(m, inputs, task.head))
        self.constraint = BasisConstraint(
            features.columns, [self._basis(part) for part in features._parts() if part.moment is not None]
        )
        self.kept = {part.layer.name: part.layer.width_in - part.basis.shape[1] for part in self.constraint.layers}
        if self.options.norm_penalty is not None:
            self._penalise(task, loader)

    def _basis(self, part: LayerMoments) -> LayerBasis:
        assert part.moment is not None
        vectors, values, _ = torch.linalg.svd(part.moment / part.count)
        removed = SmallestMultiple(self.options.multiple).removed(values)
        chosen = removed.bool()
        kept = int((~chosen).sum())
        gain = max(kept, 1) ** -0.5 if self.options.normalised_projector else 1.0
        return LayerBasis(part.layer, vectors[:, chosen], removed[chosen], gain)

    @property
    def _free_names(self) -> list[str]:
        assert self._features is not None
        covered = set(self._features.covered)
        return [name for name in parameter_columns(self.model) if name not in covered]

    @property
    def _free_parameters(self) -> FlatParameters:
        named = dict(self.model.named_parameters())
        return FlatParameters([named[name] for name in self._free_names])

    def _penalise(self, task: Task, loader: Loader) -> None:
        columns = parameter_columns(self.model)
        whole = fisher_diagonal(self.model, task, loader, self.options.fisher_samples)
        free = self._free_parameters
        fisher = torch.cat([whole[slice(*columns[name])] for name in self._free_names]).to(free.read())
        self._stiffness = fisher if self._stiffness is None else self._stiffness + fisher
        self._pull = fisher * free.read() if self._pull is None else self._pull + fisher * free.read()


class OfficialAdamNSCL(AdamNSCL):
    """`AdamNSCL` with the deviations of the official code as defaults."""

    name = "adam_nscl_official"

    def __init__(
        self, model: nn.Module, optimizer: OptimizerConfig | None = None, options: AdamNSCLOptions | None = None
    ):
        super().__init__(model, optimizer, options or OfficialAdamNSCLOptions())


class _BatchMeanMoments(LayerMoments):
    """Moments of the features' mean over the samples of a batch (a convolution's: at every position)."""

    samples: int = 1

    def add(self, rows: Tensor) -> None:
        """The mean row of every position."""
        super().add(rows.view(self.samples, -1, rows.shape[-1]).mean(0))


def _average_batches(features: FeatureConstraint) -> None:
    for name, parts in features._layers.items():
        features._layers[name] = [_BatchMeanMoments(part.layer, part.protected) for part in parts]
