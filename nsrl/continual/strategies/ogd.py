"""Orthogonal gradient descent: no step along the gradients of what the model said of old samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsrl.continual.heads import model_outputs
from nsrl.continual.memory import Memory
from nsrl.continual.optimizers import OptimizerConfig
from nsrl.continual.strategies.projected import ProjectedStrategy
from nsrl.continual.tasks import Loader, Task
from nsrl.projection import FactoredJacobian, SpectralProjection, StackedJacobian, jacobian


@dataclass(frozen=True)
class OGDOptions:
    """What is stored.

    Attributes:
        samples_per_task: gradients stored of a task (the paper: 200).
        seed: of their choice.
    """

    samples_per_task: int = 100
    seed: int = 0


class OGD(ProjectedStrategy):
    """Farajtabar et al. 2019 (arXiv 1910.07104), variant "ground truth logit" (regression: every output).

    Every stored sample gives the gradient of its true class's logit at the weights when its task had been learnt; a
    step loses its components along all of them. The gradients stay factored and the projection goes through their Gram
    matrix, which is the same as Gram-Schmidt on vectors of the model's size, without storing any.

    Args:
        model, optimizer: as `Strategy`.
        options: number of gradients.
    """

    name = "ogd"

    def __init__(self, model: nn.Module, optimizer: OptimizerConfig | None = None, options: OGDOptions | None = None):
        super().__init__(model, optimizer)
        self.options = options or OGDOptions()
        self._parts: list[FactoredJacobian] = []
        self._projector: SpectralProjection | None = None

    def memory_bytes(self) -> int:
        """Factors of the stored gradients and the eigenvectors of their Gram matrix."""
        if self._projector is None:
            return 0
        vectors = self._projector.spectrum.vectors
        return sum(part.nbytes() for part in self._parts) + vectors.numel() * vectors.element_size()

    def rank(self) -> int:
        """Independent stored gradients."""
        return 0 if self._projector is None else self._projector.spectrum.rank

    def _project(self, displacement: Tensor) -> Tensor:
        assert self._projector is not None
        return self._projector.null(displacement)

    def _certify(self, displacement: Tensor) -> dict[str, float]:
        assert self._projector is not None
        kept = self._project(displacement)
        stack = self._projector.jacobian
        before, after = (float(stack.matvec(d).double().norm()) for d in (displacement, kept))
        norm = float(displacement.norm())
        return {
            "kept_share": float(kept.norm()) / norm if norm else 1.0,
            "leakage": after / before if before else 0.0,
        }

    def _end(self, task: Task, loader: Loader) -> None:
        memory = Memory(self.options.samples_per_task, self.options.seed)
        memory.add(task, loader)
        seed = None
        if not memory.targets.is_floating_point():
            targets = memory.targets

            def seed(outputs: Tensor) -> Tensor:
                return F.one_hot(targets, outputs.shape[1]).to(outputs).unsqueeze(1)

        def forward(module: nn.Module, inputs: Tensor) -> Tensor:
            return model_outputs(module, inputs, task.head)

        self._parts.append(jacobian(self.model, memory.inputs, forward=forward, seed=seed))
        stack = StackedJacobian(self._parts)
        zeros = torch.zeros(stack.shape[0], dtype=self._parts[0].outputs.dtype, device=self._parts[0].outputs.device)
        self._projector = SpectralProjection(stack, zeros, 0.0, passes=1)
