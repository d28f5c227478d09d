"""Gradient projection memory and its soft form: bases of every layer's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nsrl.continual.heads import model_outputs
from nsrl.continual.memory import Memory
from nsrl.continual.optimizers import OptimizerConfig
from nsrl.continual.passes import Rows
from nsrl.continual.strategies.bases import AsGiven, BasisConstraint, LayerBasis
from nsrl.continual.strategies.projected import ProjectedStrategy, freeze_uncovered
from nsrl.continual.tasks import Loader, Task
from nsrl.errors import NsrlError
from nsrl.projection import FeatureConstraint, parameter_columns
from nsrl.projection.constraints.feature_moments import LayerMoments
from nsrl.projection.optimizer import FlatParameters


@dataclass(frozen=True)
class GPMOptions:
    """What the bases are made of.

    Attributes:
        samples_per_task: inputs of a task whose features are decomposed (the paper: 125, permuted MNIST 300).
        energy: share of the features' squared norm that the basis holds, in every layer, or one a layer (the paper on
            permuted MNIST: 0.95, 0.99, 0.99).
        energy_growth: added to `energy` for every later task (the paper: 0.003 on CIFAR-100).
        seed: of the choice of inputs.
    """

    samples_per_task: int = 300
    energy: float | Sequence[float] = 0.97
    energy_growth: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not all(0.0 < energy <= 1.0 for energy in self.energies) or self.energy_growth < 0.0 or not self.energies:
            raise NsrlError(f"energy must lie in (0, 1] and grow by >= 0, not {self.energy} and {self.energy_growth}")

    @property
    def energies(self) -> list[float]:
        """One for all layers, or one a layer."""
        return [self.energy] if isinstance(self.energy, int | float) else list(self.energy)


@dataclass(frozen=True)
class SGPOptions(GPMOptions):
    """As GPM's.

    Attributes:
        alpha: scale of the importances; infinity is GPM.
    """

    alpha: float = 10.0


class GPM(ProjectedStrategy):
    """Saha et al. 2021 (arXiv 2103.09762): no step in the span of what every layer has seen.

    After a task the basis grows by the leading left singular vectors of what its features leave outside it, until it
    holds `energy` of them. As in the paper biases and norm scales are trained with the first task and frozen then.

    Args:
        model, optimizer: as `Strategy`.
        options: inputs and energy.
    """

    name = "gpm"

    def __init__(self, model: nn.Module, optimizer: OptimizerConfig | None = None, options: GPMOptions | None = None):
        super().__init__(model, optimizer)
        self.options = options or GPMOptions()
        self.constraint: BasisConstraint | None = None

    def memory_bytes(self) -> int:
        """Bases and importances."""
        return 0 if self.constraint is None else self.constraint.nbytes()

    def rank(self) -> int:
        """Directions with an importance above zero."""
        return 0 if self.constraint is None else sum(space.rank for space in self.constraint.eigenspaces)

    @property
    def bases(self) -> dict[str, Tensor]:
        """Basis of every layer, shape (d_in, r)."""
        return {} if self.constraint is None else {part.layer.name: part.basis for part in self.constraint.layers}

    @property
    def importances(self) -> dict[str, Tensor]:
        """Importance of every basis direction, shape (r,)."""
        return {} if self.constraint is None else {part.layer.name: part.removed for part in self.constraint.layers}

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

    def _end(self, task: Task, loader: Loader) -> None:
        memory = Memory(self.options.samples_per_task, self.options.seed)
        memory.add(task, loader)
        features = weight_features(self.model)
        features.update(self.model, memory.inputs, forward=lambda m, inputs: model_outputs(m, inputs, task.head))
        covered = features.covered
        if self.constraint is None:
            biases = {name for name, _ in self.model.named_parameters() if name.endswith("bias")}
            freeze_uncovered(self.model, set(covered), quiet=biases)
        old = {} if self.constraint is None else {part.layer.name: part for part in self.constraint.layers}
        lost = old.keys() - {part.layer.name for part in features._parts()}
        if lost:
            raise NsrlError(
                f"the weights of {', '.join(sorted(lost))} are used outside their own layer in task {task.name!r}, but "
                "not in earlier ones, so its features do not protect them; freeze them before the first task"
            )
        parts = list(features._parts())
        energies = self.options.energies * (len(parts) if len(self.options.energies) == 1 else 1)
        if len(energies) != len(parts):
            raise NsrlError(
                f"energy has {len(energies)} numbers, but the model has {len(parts)} layers in use: "
                f"{', '.join(part.layer.name for part in parts)}; give one number, or one a layer"
            )
        growth = self.options.energy_growth * len(self.tasks)
        layers = [
            self._grown(old.get(part.layer.name), part, min(1.0, energy + growth))
            for part, energy in zip(parts, energies, strict=True)
            if part.moment is not None or part.layer.name in old
        ]
        self.constraint = BasisConstraint(features.columns, layers)

    def _grown(self, old: LayerBasis | None, part: LayerMoments, energy: float) -> LayerBasis:
        """The basis of a layer with the task's directions, and the importances brought up to date."""
        if part.moment is None:
            assert old is not None
            return replace(old, layer=part.layer)  # freezing others has moved its columns
        moment = part.moment
        size = part.layer.width_in
        basis = moment.new_zeros(size, 0) if old is None else old.basis
        rest = moment - basis @ (basis.T @ moment)
        rest = rest - (rest @ basis) @ basis.T
        values, vectors = torch.linalg.eigh((rest + rest.T) / 2)
        values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
        total = float(moment.trace())
        held = total - float(values.sum())
        count = 0 if held >= energy * total else 1 + int((held + values.cumsum(0) < energy * total).sum())
        count = min(count, size - basis.shape[1])
        new = orthonormal(basis, vectors[:, :count])
        along = ((moment @ basis) * basis).sum(0).clamp_min(0.0)
        strengths = torch.cat([along, values[:count]]).sqrt()
        before = strengths.new_zeros(0) if old is None else old.removed
        return LayerBasis(part.layer, torch.cat([basis, new], 1), self._importances(strengths, before))

    def _importances(self, strengths: Tensor, before: Tensor) -> Tensor:
        return torch.ones_like(strengths)


class SGP(GPM):
    """Saha & Roy 2023 (arXiv 2302.01386): as GPM, but a direction is removed by its importance only.

    With sigma_i the norm of the task's features along basis direction i, its importance is
    (alpha + 1) sigma_i / (alpha sigma_i + max sigma), added to what earlier tasks gave it and at most 1.

    Args:
        model, optimizer: as `Strategy`.
        options: with `alpha`.
    """

    name = "sgp"

    def __init__(self, model: nn.Module, optimizer: OptimizerConfig | None = None, options: SGPOptions | None = None):
        super().__init__(model, optimizer, options or SGPOptions())

    def _importances(self, strengths: Tensor, before: Tensor) -> Tensor:
        assert isinstance(self.options, SGPOptions)
        largest = float(strengths.max()) if strengths.numel() else 0.0
        if largest == 0.0:
            return torch.cat([before, torch.zeros_like(strengths[len(before) :])])
        alpha = self.options.alpha
        importance = (alpha + 1.0) * strengths / (alpha * strengths + largest)
        importance[: len(before)] += before
        return importance.clamp_max(1.0)


def weight_features(model: nn.Module) -> FeatureConstraint:
    """Moments of the inputs of every linear layer and convolution, for their weights without the biases."""
    weights = [
        name
        for name in parameter_columns(model)
        if name.rpartition(".")[2] == "weight" and dict(model.named_parameters())[name].ndim > 1
    ]
    return FeatureConstraint(model, weights)


def orthonormal(basis: Tensor, vectors: Tensor) -> Tensor:
    """Vectors (d, q) made orthogonal to a basis (d, r) and to each other, twice for round-off."""
    for _ in range(2):
        vectors = torch.linalg.qr(vectors - basis @ (basis.T @ vectors))[0] if vectors.shape[1] else vectors
    return vectors
