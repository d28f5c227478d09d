"""A quadratic model of how far behaviour has moved on all inputs of learnt tasks, not only on those retained.

With d the way since the last task's end, the KL of the outputs on a task's inputs is about 1/2 d^T F d, F the Fisher
information. Per layer F is taken for S (x) A: A the second moment of the layer's inputs, S that of the whitened
gradients of the outputs in what it gives (Kronecker factors, arXiv 1503.05671; Ritter et al., arXiv 1805.07810, for
sequences of tasks). The sum over T tasks is taken for (S_1 + ... + S_T) (x) (A_1 + ... + A_T) / T, exact where one of
the factors is the same in all of them. Whatever was seen counts, thousands of inputs, and what is held does not grow
with the tasks.

The model enters by implicit steps, which no stiffness makes unstable: behind n steps of learning rate eta the way d
becomes the minimiser of |d' - d|^2 / (2 n eta) + w/2 d'^T F d', that is, (1 + n eta w F)^{-1} d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsrl.continual.heads import model_outputs
from nsrl.continual.objectives import objective_of
from nsrl.continual.tasks import Loader, Task
from nsrl.projection import KroneckerConstraint, jacobian, parameter_columns
from nsrl.projection.jacobians.columns import LayerColumns
from nsrl.projection.jacobians.factored import FactoredJacobian

#: Inputs that are linearised at a time.
CHUNK = 500
#: Parameters of a layer whose gradient costs little next to a step's overhead; that of a larger one is kept for LAG
#: steps.
SMALL, LAG = 20_000, 10


@dataclass
class LayerCurvature:
    """What is held of one layer.

    Attributes:
        names: of its weight and its bias, None where there is none.
        layer: where they lie in the flat vector of the trainable parameters of then.
        inputs: sum of A over the tasks, the triangle of (d_in, d_in), float32.
        grads: sum of S over the tasks, the triangle of (d_out, d_out), float32.
        tasks: how many.
    """

    names: tuple[str | None, str | None]
    layer: LayerColumns
    inputs: Tensor
    grads: Tensor
    tasks: int


@dataclass(frozen=True)
class Eigenbasis:
    """A layer's model, decomposed: eigenvalues (d_out, d_in) and the bases of both sides, float32."""

    values: Tensor
    grads: Tensor
    inputs: Tensor


class Curvature:
    """The model, and the steps that mind it.

    Args:
        model: any module; what its linear layers and convolutions do not own is not minded.
        samples: inputs of a task that its factors are averaged over.

    Attributes:
        layers: by name.
    """

    def __init__(self, model: nn.Module, samples: int):
        self.model = model
        self.samples = samples
        self.layers: dict[str, LayerCurvature] = {}
        self._bases: dict[str, Eigenbasis] = {}
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        self._gradients: dict[str, Tensor] = {}
        self._age = 0
        self._start: dict[str, Tensor] = {}

    def add(self, task: Task, loader: Loader, share: float = 1.0) -> None:
        """Take in a task that was learnt, and count the way from here.

        Args:
            task: as learnt.
            loader: its batches.
            share: factor on its KL: the share of its inputs that nothing else minds.
        """
        constraint = KroneckerConstraint(parameter_columns(self.model), passes=1)
        left = self.samples
        for batch in loader:
            inputs, targets = batch[0][:left], batch[1][:left]
            left -= len(inputs)
            for piece, labels in zip(inputs.split(CHUNK), targets.split(CHUNK), strict=True):
                constraint.update(self._linearised(piece, labels, task.head, check=left == self.samples - len(inputs)))
            if left <= 0:
                break
        seen = self.samples - max(left, 0)
        for factors in constraint.held:
            self._merge(factors.layer, factors.inputs / factors.count, factors.grads * (share / seen))
        self._bases, self._moments = {}, {}
        self.restart()

    def restart(self) -> None:
        """Count the way from the present weights."""
        named = dict(self.model.named_parameters())
        owned = [name for part in self.layers.values() for name in part.names if name is not None]
        self._start = {name: named[name].detach().clone() for name in owned}
        self._gradients, self._age = {}, 0

    @torch.no_grad()
    def relax(self, optimizer: torch.optim.Optimizer, lengths: Sequence[float], weight: float) -> None:
        """An implicit step for some steps of plain SGD, with or without momentum.

        Args:
            optimizer: whose parameters.
            lengths: the sum of its learning rates over these steps, by parameter group (see `step_length`).
            weight: w, of the sum of the tasks' KL.
        """
        rates = {
            id(p): length
            for group, length in zip(optimizer.param_groups, lengths, strict=True)
            for p in group["params"]
        }
        for name, owned in self._owned(rates):
            basis, way = self._basis(name), self._way(name)
            # what an implicit step takes away, so that a direction without curvature keeps its last bit
            stiff = rates[id(owned[0])] * weight * basis.values
            components = basis.grads.T @ way @ basis.inputs
            taken = basis.grads @ components.mul_(stiff.div_(1.0 + stiff)) @ basis.inputs.T
            for p, piece in zip(owned, self._pieces(owned, taken), strict=True):
                p.sub_(piece)

    @torch.no_grad()
    def add_gradient(self, optimizer: torch.optim.Optimizer, weight: float) -> None:
        """Add w F d to the gradients: for optimizers whose steps are no multiples of the gradient, as Adam's.

        A large layer's is computed anew every so many steps only: d hardly changes in between.

        Args:
            optimizer: whose parameters' gradients.
            weight: w, of the sum of the tasks' KL.
        """
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for name, owned in self._owned(rates):
            if name not in self._gradients or self._age % (1 if self._start_size(name) < SMALL else LAG) == 0:
                part, way = self.layers[name], self._way(name)
                grads, inputs = self._matrices(name)
                self._gradients[name] = (grads @ way @ inputs).div_(part.tasks)
            for p, piece in zip(owned, self._pieces(owned, self._gradients[name]), strict=True):
                if p.grad is None:
                    p.grad = weight * piece
                else:
                    p.grad.add_(piece, alpha=weight)
        self._age += 1

    def nbytes(self) -> int:
        """Factors, and the weights that the way is counted from."""
        tensors = [t for part in self.layers.values() for t in (part.inputs, part.grads)]
        return sum(t.numel() * t.element_size() for t in (*tensors, *self._start.values()))

    def modelled(self) -> float:
        """1/2 d^T F d of the way d since the last task's end: the modelled sum of the tasks' KL."""
        total = 0.0
        for name in self.layers:
            basis = self._basis(name)
            components = basis.grads.T @ self._way(name) @ basis.inputs
            total += 0.5 * float((components.square() * basis.values).sum())
        return total

    def _linearised(self, inputs: Tensor, targets: Tensor, head: int | None, check: bool) -> FactoredJacobian:
        def forward(module: nn.Module, batch: Tensor) -> Tensor:
            return model_outputs(module, batch, head)

        def seeds(outputs: Tensor) -> Tensor:
            return objective_of(targets).metric(outputs).seeds(outputs)

        return jacobian(self.model, inputs, forward=forward, seed=seeds, check=check)

    def _merge(self, layer: LayerColumns, inputs: Tensor, grads: Tensor) -> None:
        if layer.transposed:
            return
        names = {columns: name for name, columns in parameter_columns(self.model).items()}
        if layer.weight not in names:  # a group of a convolution, say: a part of a parameter
            return
        mine = names[layer.weight], names.get(layer.bias) if layer.bias is not None else None
        a, s = (_triangle(moment).float() for moment in (inputs, grads))
        old = self.layers.get(layer.name)
        if old is not None and old.names == mine:
            old.inputs, old.grads, old.tasks = old.inputs + a, old.grads + s, old.tasks + 1
        else:
            self.layers[layer.name] = LayerCurvature(mine, layer, a, s, 1)

    def _owned(self, rates: dict[int, float]) -> list[tuple[str, list[nn.Parameter]]]:
        """Layers all of whose parameters are learnt, and these."""
        named = dict(self.model.named_parameters())
        found = []
        for name, part in self.layers.items():
            owned = [named[key] for key in part.names if key is not None]
            if all(id(p) in rates for p in owned):
                found.append((name, owned))
        return found

    def _way(self, name: str) -> Tensor:
        """The way of a layer, (d_out, d_in), the bias in the last column."""
        named = dict(self.model.named_parameters())
        keys = [key for key in self.layers[name].names if key is not None]
        ways = [(named[key].detach() - self._start[key]).view(len(named[key]), -1) for key in keys]
        return ways[0] if len(ways) == 1 else torch.cat(ways, 1)

    @staticmethod
    def _pieces(owned: list[nn.Parameter], matrix: Tensor) -> list[Tensor]:
        """A layer's matrix as its parameters have it."""
        widths = [p.numel() // len(p) for p in owned]
        return [piece.reshape(p.shape) for p, piece in zip(owned, matrix.split(widths, 1), strict=True)]

    def _start_size(self, name: str) -> int:
        return sum(self._start[key].numel() for key in self.layers[name].names if key is not None)

    def _matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """S and A of a layer, float32."""
        if name not in self._moments:
            part = self.layers[name]
            self._moments[name] = _square(part.grads).float(), _square(part.inputs).float()
        return self._moments[name]

    def _basis(self, name: str) -> Eigenbasis:
        if name not in self._bases:
            part = self.layers[name]
            inputs, a = torch.linalg.eigh(_square(part.inputs))
            grads, s = torch.linalg.eigh(_square(part.grads))
            values = torch.outer(grads.clamp_min(0.0), inputs.clamp_min(0.0)) / part.tasks
            self._bases[name] = Eigenbasis(values.float(), s.float(), a.float())
        return self._bases[name]


def step_length(group: dict[str, Any]) -> float:
    """How far a constant gradient moves the parameters of a group of SGD in a step, once momentum has built up."""
    momentum = group.get("momentum", 0.0)
    return group["lr"] * ((1.0 - group.get("dampening", 0.0)) / (1.0 - momentum) if momentum else 1.0)


def _triangle(matrix: Tensor) -> Tensor:
    """The lower triangle of a symmetric matrix, flat."""
    return matrix[tuple(torch.tril_indices(*matrix.shape, device=matrix.device))]


def _square(triangle: Tensor) -> Tensor:
    """The symmetric matrix, float64, of its flat lower triangle."""
    size = int((2 * len(triangle)) ** 0.5)
    matrix = triangle.new_zeros(size, size, dtype=torch.float64)
    rows, columns = torch.tril_indices(size, size, device=triangle.device)
    matrix[rows, columns] = triangle.double()
    matrix[columns, rows] = triangle.double()
    return matrix
