"""Products of a network's Jacobian with vectors: one pass forwards (J v), one pass backwards (J^T u).

Small policies spend their time in bookkeeping, not in arithmetic. A chain of linear layers therefore differentiates
itself by the chain rule, in matrix products only; every other network goes through autograd with the identity
J v = d(v . J^T u) / du, which asks for no forward mode and no per-sample factors. On 2048 states of a 64 x 64 policy
with two to six outputs, one product J^T J v takes 1.7 to 2.1 ms the first way and 1.9 to 2.3 ms the second, after a
forward pass, and 1.8 to 9 ms with `nsrl.projection`'s factors, which take 2 to 13 ms to capture: they pay where a Gram
matrix is wanted, not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsrl.projection.roots import Root

#: States that Kronecker factors are made of, at least, where there are as many: they only have to be roughly right.
FACTOR_STATES = 512

#: Layers with more inputs or outputs have none: inverting a factor of 2048 takes seconds, one of an image gigabytes.
WIDEST = 1024


@dataclass(frozen=True)
class Activation:
    """An elementwise activation whose derivative is a function of what it returned.

    Attributes:
        apply: in place.
        slope: a vector times the derivative, from the vector and what `apply` returned: autograd's own kernels.
        slope_into: the same, written into a third tensor, which may be the vector.
    """

    apply: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    slope_into: Callable[[Tensor, Tensor, Tensor], object]


def _tanh(values: Tensor) -> Tensor:
    """In place; NumPy's is vectorised, torch's takes five times as long on the CPU and half of a forward pass."""
    if values.device.type != "cpu":
        return values.tanh_()
    array = values.numpy()
    np.tanh(array, out=array)
    return values


# looked up once: that takes as long as a small batch's product
_TANH_INTO = torch.ops.aten.tanh_backward.grad_input
_RELU_INTO = torch.ops.aten.threshold_backward.grad_input

ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.Tanh: Activation(
        _tanh,
        lambda vector, out: torch.ops.aten.tanh_backward(vector, out),
        lambda vector, out, into: _TANH_INTO(vector, out, grad_input=into),
    ),
    nn.ReLU: Activation(
        torch.relu_,
        lambda vector, out: torch.ops.aten.threshold_backward(vector, out, 0),
        lambda vector, out, into: _RELU_INTO(vector, out, 0, grad_input=into),
    ),
}


class Passes(Protocol):
    """A network at one batch: its outputs and both products with their Jacobian in some parameters.

    Attributes:
        outputs: shape (N, O), detached.
    """

    outputs: Tensor

    @property
    def columns(self) -> int:
        """P."""
        ...

    def push(self, vector: Tensor) -> Tensor:
        """J v, shape (N, O), for v of shape (P,)."""
        ...

    def pull(self, cotangents: Tensor) -> Tensor:
        """J^T u, shape (P,), for u of shape (N, O)."""
        ...

    def pieces(self, cotangents: Tensor) -> list[Tensor]:
        """J^T u as one tensor a parameter."""
        ...

    def factors(self, root: Root) -> list[LayerFactors]:
        """Kronecker factors of (S J)^T S J for a root S, of the layers known to be linear and not too wide."""
        ...


@dataclass(frozen=True)
class Stage:
    """A linear layer of a chain and the activation behind it.

    Attributes:
        layer: the linear layer.
        weight, bias: positions of its parameters among those to differentiate in; None for constants.
        activation: None for the identity.
    """

    layer: nn.Linear
    weight: int | None
    bias: int | None
    activation: Activation | None = None


class LayerPasses:
    """Passes through a chain of linear layers, each with or without an activation behind it.

    Args:
        stages: a chain as `linear_chain` makes it.
        inputs: shape (N, d_in).
        parameters: those to differentiate in, in the order of the columns.
    """

    def __init__(self, stages: Sequence[Stage], inputs: Tensor, parameters: Sequence[nn.Parameter]):
        self._stages = stages
        self._parameters = parameters
        self._values = [inputs]  # before, between and behind the stages
        with torch.no_grad():
            for stage in stages:
                inputs = F.linear(inputs, stage.layer.weight, stage.layer.bias)
                if stage.activation is not None:
                    inputs = stage.activation.apply(inputs)
                self._values.append(inputs)
        self.outputs = inputs

    @property
    def columns(self) -> int:
        """See `Passes`."""
        return sum(parameter.numel() for parameter in self._parameters)

    @torch.no_grad()
    def push(self, vector: Tensor) -> Tensor:
        """J v, (N, O); see `Passes`."""
        pieces = vector.split([parameter.numel() for parameter in self._parameters])
        moved: Tensor | None = None
        for stage, inputs, out in zip(self._stages, self._values, self._values[1:], strict=False):
            weight = stage.layer.weight
            change = inputs.new_zeros(1, len(weight)) if moved is None else moved @ weight.T
            if stage.weight is not None:
                change = torch.addmm(change, inputs, pieces[stage.weight].view_as(weight).T)
            if stage.bias is not None:
                change = change + pieces[stage.bias]
            moved = change if stage.activation is None else stage.activation.slope(change.expand_as(out), out)
        assert moved is not None
        return moved.expand_as(self.outputs)

    def pull(self, cotangents: Tensor) -> Tensor:
        """J^T u, (P,); see `Passes`."""
        return torch.cat([piece.flatten() for piece in self.pieces(cotangents)])

    @torch.no_grad()
    def pieces(self, cotangents: Tensor, into: Sequence[Tensor] | None = None) -> list[Tensor]:
        """See `Passes`; written into tensors of the parameters' shapes, one each, where these are given."""
        pieces = list(into or [cotangents] * len(self._parameters))
        for number in reversed(range(len(self._stages))):
            stage = self._stages[number]
            if stage.activation is not None:
                cotangents = stage.activation.slope(cotangents, self._values[number + 1])
            if stage.weight is not None:
                out = None if into is None else into[stage.weight]
                pieces[stage.weight] = torch.mm(cotangents.T, self._values[number], out=out)
            if stage.bias is not None:
                out = None if into is None else into[stage.bias]
                pieces[stage.bias] = torch.sum(cotangents, 0, out=out)
            if number > 0:
                cotangents = cotangents @ stage.layer.weight
        return pieces

    @torch.no_grad()
    def factors(self, root: Root) -> list[LayerFactors]:
        """See `Passes`."""
        starts = [0, *accumulate(parameter.numel() for parameter in self._parameters)]
        every = max(1, root.shape[0] // FACTOR_STATES)
        cotangents = math.sqrt(every) * root.sampled(every).transpose(0, 1)
        found = []
        for number in reversed(range(len(self._stages))):
            stage = self._stages[number]
            if stage.activation is not None:
                out = self._values[number + 1][::every]
                cotangents = stage.activation.slope(cotangents, out.expand_as(cotangents))
            if stage.weight is not None and max(stage.layer.weight.shape) <= WIDEST:
                inputs, rows = self._values[number][::every], cotangents.flatten(0, 1)
                if stage.bias is not None:
                    inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
                bias = None if stage.bias is None else starts[stage.bias]
                found.append(LayerFactors(inputs.T @ inputs / len(inputs), rows.T @ rows, starts[stage.weight], bias))
            if number > 0:
                cotangents = cotangents @ stage.layer.weight
        return found


class GraphPasses:
    """Passes through any network, by autograd.

    Args:
        outputs: shape (N, O), with their graph.
        parameters: those to differentiate in, in the order of the columns; those that the outputs do not depend on at
            this batch (experts that none of its samples goes to) have zero columns.
    """

    def __init__(self, outputs: Tensor, parameters: Sequence[nn.Parameter]):
        self.outputs = outputs.detach()
        self._graph = outputs
        self._parameters = list(parameters)
        self._dual: Tensor | None = None
        self._pulled: list[tuple[int, Tensor]] = []

    @property
    def columns(self) -> int:
        """See `Passes`."""
        return sum(parameter.numel() for parameter in self._parameters)

    def push(self, vector: Tensor) -> Tensor:
        """J v, (N, O); see `Passes`."""
        if self._dual is None:
            self._dual = torch.zeros_like(self.outputs, requires_grad=True)
            pulled = torch.autograd.grad(
                self._graph, self._parameters, self._dual, create_graph=True, allow_unused=True
            )
            self._pulled = [(index, piece) for index, piece in enumerate(pulled) if piece is not None]
        pieces = vector.split([parameter.numel() for parameter in self._parameters])
        shaped = [pieces[index].view_as(piece) for index, piece in self._pulled]
        return torch.autograd.grad([piece for _, piece in self._pulled], self._dual, shaped, retain_graph=True)[0]

    def pull(self, cotangents: Tensor) -> Tensor:
        """J^T u, (P,); see `Passes`."""
        return torch.cat([piece.flatten() for piece in self.pieces(cotangents)])

    def pieces(self, cotangents: Tensor) -> list[Tensor]:
        """See `Passes`."""
        grads = torch.autograd.grad(self._graph, self._parameters, cotangents, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(self._parameters, grads, strict=True)]

    def factors(self, root: Root) -> list[LayerFactors]:
        """None: what is inside is not known."""
        return []


def is_plain(module: nn.Module) -> bool:
    """Whether a call of the module is that of its class: no hooks (old-style weight norms, masks), no forward set."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def linear_chain(modules: Sequence[nn.Module], parameters: Sequence[nn.Parameter]) -> tuple[Stage, ...] | None:
    """Modules as the stages of `LayerPasses`, or None where they are something else or lack some of the parameters."""
    position: dict[Tensor | None, int] = {parameter: index for index, parameter in enumerate(parameters)}
    stages: list[Stage] = []
    owned = [parameter for module in modules for parameter in module.parameters()]
    if len(owned) > len(set(owned)):  # tied layers: their parameters move more than one stage
        return None
    for module in modules:
        if not is_plain(module):
            return None
        if type(module) is nn.Linear and isinstance(module.weight, nn.Parameter):
            stages.append(Stage(module, position.pop(module.weight, None), position.pop(module.bias, None)))
        elif type(module) in ACTIVATIONS and stages and stages[-1].activation is None:
            stages[-1] = replace(stages[-1], activation=ACTIVATIONS[type(module)])
        else:
            return None
    return tuple(stages) if stages and not position else None


@dataclass(frozen=True)
class LayerFactors:
    """The two factors of a linear layer's block of J^T J.

    Attributes:
        inputs: mean of a a^T, with a 1 at the end of a where there is a bias, shape (d, d).
        outputs: sum of g g^T, shape (d_out, d_out).
        weight: column at which the weight begins.
        bias: column at which the bias begins; None without one.
    """

    inputs: Tensor
    outputs: Tensor
    weight: int
    bias: int | None

    def shifted(self, column: Callable[[int], int]) -> LayerFactors:
        """The same block among other columns, given where each is there."""
        return replace(self, weight=column(self.weight), bias=None if self.bias is None else column(self.bias))

    def restricted(self, free: Tensor) -> LayerFactors:
        """The block of the entries that may move, 1 or 0 in a flat vector (P,); whole rows and columns of the layer."""
        rows, columns = len(self.outputs), len(self.inputs)
        columns -= self.bias is not None
        moving = free[self.weight : self.weight + rows * columns].view(rows, columns) > 0.0
        left, right = moving.any(1), moving.any(0)
        if self.bias is not None:
            biased = free[self.bias : self.bias + rows] > 0.0
            right = torch.cat([right, biased.any()[None]])
        left, right = left.to(self.outputs), right.to(self.inputs)
        return replace(
            self, inputs=self.inputs * torch.outer(right, right), outputs=self.outputs * torch.outer(left, left)
        )


@dataclass(frozen=True)
class Embedding:
    """The protected parameters among those that the rollout moves (log_std is not protected with preserve="mode").

    Attributes:
        columns: which entries of the rollout's flat vector are protected, shape (P,), bool.
    """

    columns: Tensor

    @classmethod
    def of(cls, protected: Sequence[nn.Parameter], moved: Sequence[nn.Parameter]) -> Embedding:
        """The embedding of some parameters in a list of them."""
        kept = set(protected)
        return cls(torch.cat([torch.full((p.numel(),), p in kept, device=p.device) for p in moved]))

    def jacobian(self, inner: Products) -> Products:
        """A Jacobian over the protected parameters as one over all that are moved."""
        return _Embedded(inner, self.columns)

    def projector(self, inner: Product) -> Product:
        """A projector of the protected parameters that leaves the others alone."""

        def project(vector: Tensor) -> Tensor:
            projected = vector.clone()
            projected[self.columns] = inner(vector[self.columns])
            return projected

        return project


@dataclass(frozen=True)
class _Embedded:
    inner: Products
    columns: Tensor

    def matvec(self, vector: Tensor) -> Tensor:
        return self.inner.matvec(vector[self.columns])

    def rmatvec(self, rows: Tensor) -> Tensor:
        pulled = self.inner.rmatvec(rows)
        out = pulled.new_zeros(len(self.columns))
        out[self.columns] = pulled
        return out

    def factors(self) -> list[LayerFactors]:
        places = self.columns.nonzero().flatten().tolist()
        return [factors.shifted(places.__getitem__) for factors in self.inner.factors()]


Product = Callable[[Tensor], Tensor]


class Products(Protocol):
    """A Jacobian as conjugate gradients need it."""

    def matvec(self, vector: Tensor) -> Tensor:
        """J v, shape (k,), for v of shape (P,)."""
        ...

    def rmatvec(self, rows: Tensor) -> Tensor:
        """J^T u, shape (P,), for u of shape (k,)."""
        ...

    def factors(self) -> list[LayerFactors]:
        """Kronecker factors of the blocks of J^T J that are known; none of the others."""
        ...


class PolicyJacobian:
    """Whitened Jacobian of a policy's outputs at one batch: J^T J is the Fisher information, a mean over states.

    A product with J^T J is two passes through the network and positive semi-definite by construction.

    Args:
        passes: through the actor, on N states.
        root: S, shape (N, R, O): S^T S / N is the Fisher information of a state's outputs, times its weight.
        log_std: columns, as start and stop, of a state-independent log standard deviation, which the network does
            not reach and whose Fisher information is 2; None without.
    """

    def __init__(self, passes: Passes, root: Root, log_std: tuple[int, int] | None = None):
        self._passes = passes
        self._root = root.divided(math.sqrt(len(passes.outputs)))
        self._log_std = log_std

    @property
    def shape(self) -> tuple[int, int]:
        """(N R + entries of log_std, P)."""
        n, r, _ = self._root.shape
        extra = 0 if self._log_std is None else self._log_std[1] - self._log_std[0]
        return n * r + extra, self._passes.columns + extra

    def matvec(self, vector: Tensor) -> Tensor:
        """J v for v of shape (P,): shape (N R + entries of log_std,)."""
        if self._log_std is None:
            return self._root.apply(self._passes.push(vector)).flatten()
        start, stop = self._log_std
        moved = self._passes.push(torch.cat([vector[:start], vector[stop:]]))
        rows = self._root.apply(moved).flatten()
        return torch.cat([rows, math.sqrt(2.0) * vector[start:stop]])

    def rmatvec(self, rows: Tensor) -> Tensor:
        """J^T u for such rows u: shape (P,)."""
        n, r, _ = self._root.shape
        cotangents = self._root.transpose(rows[: n * r].view(n, r))
        pulled = self._passes.pull(cotangents)
        if self._log_std is None:
            return pulled
        start = self._log_std[0]
        return torch.cat([pulled[:start], math.sqrt(2.0) * rows[n * r :], pulled[start:]])

    def factors(self) -> list[LayerFactors]:
        """Kronecker factors of the blocks of J^T J: of linear layers in a chain, and of log_std."""
        found = self._passes.factors(self._root)
        if self._log_std is None:
            return found
        start, stop = self._log_std
        moved = [factors.shifted(lambda column: column + (stop - start if column >= start else 0)) for factors in found]
        outputs = self._passes.outputs
        identity = torch.eye(stop - start, dtype=outputs.dtype, device=outputs.device)
        return [*moved, LayerFactors(identity[:1, :1], 2.0 * identity, start, None)]
