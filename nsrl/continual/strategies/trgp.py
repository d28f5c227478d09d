"""Trust-region gradient projection: gradient projection memory that reuses the weights of related tasks, scaled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nsrl.continual.optimizers import OptimizerConfig
from nsrl.continual.passes import GraphPass, Pass, Rows
from nsrl.continual.strategies.bases import LayerBasis
from nsrl.continual.strategies.gpm import GPM, GPMOptions, orthonormal
from nsrl.continual.tasks import Loader, Task
from nsrl.errors import NsrlError
from nsrl.projection.constraints.feature_moments import LayerMoments
from nsrl.reading.tensors import like
from nsrl.reading.values import items, mapping


@dataclass(frozen=True)
class TRGPOptions(GPMOptions):
    """As GPM's.

    Attributes:
        trust: least share of the new task's gradient in the span of an old task's inputs for that task to be reused.
        related: most old tasks that a layer reuses.
    """

    trust: float = 0.5
    related: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.trust <= 1.0 or self.related < 1:
            raise NsrlError(f"trust is a share in [0, 1] and related at least 1, not {self.trust} and {self.related}")


@dataclass(frozen=True)
class Reuse:
    """What a layer takes over from an old task.

    Attributes:
        weight: name of the layer's weight.
        basis: U, inputs of the old task, shape (d_in, r), float32.
        frozen: W U, which no later step changes, shape (d_out, r).
        scale: Q, shape (r, r); the layer computes with W + W U (Q - 1) U^T.
    """

    weight: str
    basis: Tensor
    frozen: Tensor
    scale: nn.Parameter

    def change(self) -> Tensor:
        """W U (Q - 1) U^T, (d_out, d_in)."""
        return (self.frozen @ self.scale - self.frozen) @ self.basis.T


class TRGP(GPM):
    """Lin et al. 2022 (arXiv 2202.02931): as GPM, with scaled weight projections onto the inputs of related tasks.

    A task's inputs in a layer are the directions, old and new, that hold `energy` of them; what is new is protected
    from then on. Before a task the old ones that its gradient lies in most are chosen, and beside the weights, which
    move outside all old inputs, a matrix is learnt for each that mixes what the weights do on that task's inputs. The
    matrices belong to the task: at test time its identity has to be known (`recalled`), in every scenario.

    Args:
        model, optimizer: as `Strategy`.
        options: with `trust` and `related`.
    """

    name = "trgp"

    def __init__(self, model: nn.Module, optimizer: OptimizerConfig | None = None, options: TRGPOptions | None = None):
        super().__init__(model, optimizer, options or TRGPOptions())
        self.spans: dict[tuple[int, str], Tensor] = {}
        self.reused: dict[int, list[Reuse]] = {}

    def memory_bytes(self) -> int:
        """Bases, which of their directions are a task's, and the matrices."""
        tensors = [*self.spans.values(), *(reuse.scale for found in self.reused.values() for reuse in found)]
        return super().memory_bytes() + sum(t.numel() * t.element_size() for t in tensors)

    def progress(self) -> dict[str, Any]:
        """As `GPM`, and the matrices of the task at hand."""
        mine = [] if self.task is None else self.reused.get(self.task.index, [])
        return {**super().progress(), "scales": [reuse.scale.detach() for reuse in mine]}

    def resume(self, progress: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            Unreadable: a file that was changed.
        """
        mapping(progress, "progress", ["steps", "certificate", "scales"], ())
        mine = [] if self.task is None else self.reused.get(self.task.index, [])
        found = items(progress["scales"], "scales", len(mine))
        for reuse, scale in zip(mine, found, strict=True):
            reuse.scale.data = like(scale, reuse.scale.detach(), "a scale")
        super().resume({key: progress[key] for key in ("steps", "certificate")})

    @contextmanager
    def recalled(self, task: Task) -> Iterator[None]:
        """The model with the matrices of a task, for as long as the block runs."""
        found = self.reused.get(task.index, [])
        named = dict(self.model.named_parameters())
        before = {reuse.weight: named[reuse.weight].detach().clone() for reuse in found}
        with torch.no_grad():
            for reuse in found:
                named[reuse.weight].add_(reuse.change().view_as(named[reuse.weight]))
        try:
            yield
        finally:
            for name, weight in before.items():
                named[name].data.copy_(weight)

    def _begin(self, task: Task, loader: Loader) -> None:
        if self.tasks:
            self.reused[task.index] = self._related(task, loader)
            scales = [reuse.scale for reuse in self.reused[task.index]]
            if scales:
                self.optimizer.add_param_group({"params": scales, "lr": self.config.lr})
        super()._begin(task, loader)

    def _end(self, task: Task, loader: Loader) -> None:
        with self.recalled(task):
            super()._end(task, loader)

    def _projected_rows(self) -> Rows | None:
        return None  # the weights that a step computes with are not those that it moves

    def _pass(self, inputs: Tensor, head: int | Tensor | None) -> Pass:
        found = self.reused.get(self.task.index, []) if self.task is not None else []
        if not found:
            return super()._pass(inputs, head)
        named = dict(self.model.named_parameters())
        weights: dict[str, Tensor] = {}
        for reuse in found:
            weight = weights.get(reuse.weight, named[reuse.weight])
            weights[reuse.weight] = weight + reuse.change().view_as(weight)
        return GraphPass(functional_call(self.model, weights, (inputs,) if head is None else (inputs, head)))

    def _related(self, task: Task, loader: Loader) -> list[Reuse]:
        """For every layer the old tasks in whose inputs most of the new task's gradient lies."""
        assert isinstance(self.options, TRGPOptions) and self.constraint is not None
        inputs, targets = next(iter(loader))[:2]
        self.model.zero_grad()
        self._backward(inputs, targets, task.head)
        named, found = dict(self.model.named_parameters()), []
        for part in self.constraint.layers:
            name = self._weight_of(part)
            gradient = None if name is None else named[name].grad
            if name is None or gradient is None:
                continue
            matrix = gradient.flatten(1).double()
            within = (matrix @ part.basis).square().sum(0)
            shares = {
                index: float(within[span].sum().sqrt()) / max(float(matrix.norm()), 1e-30)
                for (index, layer), span in self.spans.items()
                if layer == part.layer.name and len(span)
            }
            chosen = [index for index, share in shares.items() if share >= self.options.trust]
            for index in sorted(chosen, key=lambda index: -shares[index])[: self.options.related]:
                basis = part.basis[:, self.spans[index, part.layer.name]]
                frozen = named[name].detach().flatten(1).double() @ basis
                scale = torch.eye(basis.shape[1], dtype=gradient.dtype, device=gradient.device)
                found.append(Reuse(name, basis.to(gradient), frozen.to(gradient), nn.Parameter(scale)))
        self.model.zero_grad()
        return found

    def _weight_of(self, part: LayerBasis) -> str | None:
        """Name of the weight that is all of a layer's columns; None for a group of a convolution, say."""
        assert self.constraint is not None
        names = {columns: name for name, columns in self.constraint.columns.items()}
        return None if part.layer.transposed or part.layer.weight is None else names.get(part.layer.weight)

    def _grown(self, old: LayerBasis | None, part: LayerMoments, energy: float) -> LayerBasis:
        if part.moment is None or self.task is None:
            return super()._grown(old, part, energy)
        moment, size = part.moment, part.layer.width_in
        basis = moment.new_zeros(size, 0) if old is None else old.basis
        rest = moment - basis @ (basis.T @ moment)
        rest = rest - (rest @ basis) @ basis.T
        values, vectors = torch.linalg.eigh((rest + rest.T) / 2)
        values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
        along = ((moment @ basis) * basis).sum(0).clamp_min(0.0)
        strengths = torch.cat([along, values[: size - basis.shape[1]]])
        order = strengths.argsort(descending=True, stable=True)
        wanted = energy * float(moment.trace())
        count = min(len(order), 1 + int((strengths[order].cumsum(0) < wanted).sum()))
        chosen = order[:count].sort().values
        # the residual's directions come by falling strength, so that those chosen are its first ones
        new = orthonormal(basis, vectors[:, : int((chosen >= basis.shape[1]).sum())])
        self.spans[self.task.index, part.layer.name] = chosen
        whole = torch.cat([basis, new], 1)
        return LayerBasis(part.layer, whole, torch.ones(whole.shape[1], dtype=whole.dtype, device=whole.device))
