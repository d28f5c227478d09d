"""Layer features as a constraint: the one kind whose null space is exact for a step of any size.

A linear layer y = W x + b leaves its outputs on the retained inputs alone when (dW, db) vanishes on their span, with a
constant 1 appended to x for the bias. When every layer does, all of the network's outputs stay, by induction over the
layers, however far the weights move (Adam-NSCL, arXiv 2103.07113, lemma 1; GPM, arXiv 2103.09762).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nsrl.projection.constraints.constraint import Constraint, Eigenspace
from nsrl.projection.constraints.feature_moments import LayerMoments, Subspace
from nsrl.projection.constraints.filters import Hard
from nsrl.projection.jacobians.blocks import Range, overlap
from nsrl.projection.jacobians.calls import LayerCalls
from nsrl.projection.jacobians.capture import refuse_sample_mixing
from nsrl.projection.jacobians.columns import LayerColumns, parameter_columns
from nsrl.projection.jacobians.fallback import Forward
from nsrl.projection.jacobians.layers import is_convolution, is_transposed_linear, patches
from nsrl.projection.jacobians.state import differentiable


class FeatureConstraint(Constraint):
    """F = blockdiag(I (x) C_l), C_l the uncentred second moment of the inputs of layer l: 1/2 mean |dW x|^2.

    Covers Linear, Conv1d/2d/3d with any groups, and transformers' Conv1D. Small control policies have features of full
    rank, hence an empty null space: use a budget, or a `JacobianConstraint`. Norm scales, embeddings, free parameters
    and parameters that other code uses too are `uncovered`: freeze them, or nothing is exact.

    A task at hand lives in its moments (d^2 numbers a layer). `consolidate` turns it into directions of a protected
    subspace and forgets the moments. New directions come from what is left of the next task's moment on the complement,
    and protected ones are never dropped, rotated away or weighed against new data, so the protected subspace grows
    until `reset`; `project` removes it fully under every filter. It is stored as a basis or through its complement,
    whichever is thinner, and no projector is ever formed. Protected directions share one eigenvalue, their mean.

    Exact means to the resolution of a float64 moment: directions with less than about 1e-13 of a layer's feature energy
    cannot be told from round-off and are free.

    Args:
        module: whose layers are to be covered.
        parameters: names of the parameters that own columns; default all trainable ones.
        passes: projection passes.
    """

    def __init__(self, module: nn.Module, parameters: Iterable[str] | None = None, passes: int = 2):
        super().__init__(parameter_columns(module, parameters), passes)
        self._layers: dict[str, list[LayerMoments]] = {}
        owners = _owners(module)
        for name, layer in module.named_modules():
            owned = {local: full for local, full in owners.get(layer, {}).items() if full in self.columns}
            weight, bias = (self.columns.get(owned.get(local, "")) for local in ("weight", "bias"))
            if (weight or bias) and _is_linear(layer):
                self._layers[name] = _moments_of(name, layer, weight, bias)
        self._begun = False

    def update(
        self,
        module: nn.Module,
        inputs: Any,
        forward: Forward | None = None,
        mask: Tensor | None = None,
        verify: bool = True,
    ) -> None:
        """Add the features of a batch of retained inputs to the task at hand.

        Parameters that act outside their own layer become uncovered at the first batch; at later ones they could only
        lose what is protected, and are refused.

        Args:
            module: the module of the constructor.
            inputs: what it is called with.
            forward: function (module, inputs) -> outputs; default `module(inputs)`.
            mask: True for real positions, shape (N,) or (N, T); padding is left out of the moments.
            verify: look for such parameters, by a backward pass. Without it there is none, and `forward` may end
                behind the last layer: for further batches through the same modules.

        Raises:
            JacobianError: batch normalisation or dropout in train mode.
            ValueError: a mask that does not fit a layer's input, features that are NaN or infinite, outputs without
                gradients, or parameters that act outside their own layer on this batch and did not on the first.
        """
        refuse_sample_mixing(module)
        modules, named = dict(module.named_modules()), dict(module.named_parameters())
        call = forward or (lambda module, inputs: module(inputs))
        if not verify:
            with torch.no_grad(), self._recorded(modules, mask):
                call(module, inputs)
            return
        calls = LayerCalls(
            {
                name: (modules[name], [named[full] for full in _held(parts, self.columns)])
                for name, parts in self._layers.items()
            }
        )
        with differentiable(module):
            with calls.recorded(), self._recorded(modules, mask):
                outputs = call(module, inputs)
            self._uncover(calls.unaccounted(outputs))

    @contextmanager
    def _recorded(self, modules: Mapping[str, nn.Module], mask: Tensor | None) -> Iterator[None]:
        """Within the block the inputs of the layers go into their moments."""
        with ExitStack() as stack:
            for name, parts in self._layers.items():
                record = _recorder(name, parts, mask)
                stack.callback(modules[name].register_forward_pre_hook(record, with_kwargs=True).remove)
            yield

    def consolidate(self, filter: Hard | None = None) -> dict[str, int]:
        """Protect the task at hand for good; returns the number of new directions by layer.

        Args:
            filter: which directions of what earlier tasks left; default all above round-off. `Hard(energy=0.97)` is
                GPM's rule: it counts the share that is protected already.
        """
        self._refuse_empty()
        return {part.layer.name: part.consolidate(filter or Hard()) for part in self._parts()}

    def reset(self) -> None:
        """Forget everything, the protected subspaces too."""
        for part in self._parts():
            part.protected = Subspace.empty(part.layer.width_in, part.protected.basis())
            part.held, part.moment, part.count, part.eigen = 0.0, None, 0, None

    def merged(self, other: FeatureConstraint) -> FeatureConstraint:
        """Both tasks at hand as one, and both protected subspaces: the sum of streams that ran side by side.

        Raises:
            ValueError: they are over other layers.
        """
        if self.columns != other.columns or self._layers.keys() != other._layers.keys():
            raise ValueError("only constraints over the same layers can be merged")
        result = copy.deepcopy(self)
        for part, theirs in zip(result._parts(), other._parts(), strict=True):
            left, singular, _ = torch.linalg.svd(
                part.protected.without(theirs.protected.basis().T).T, full_matrices=False
            )
            part.protected = part.protected.extended(left[:, singular > 1e-12])
            part.held += theirs.held
            part.eigen = None
            if theirs.moment is not None:
                part.moment = theirs.moment + (0.0 if part.moment is None else part.moment)
                part.count += theirs.count
        return result

    @property
    def moments(self) -> dict[str, LayerMoments]:
        """Second moments by layer, or by group of a layer: the ones held, not copies."""
        return {part.layer.name: part for part in self._parts()}

    @property
    def uncovered(self) -> tuple[str, ...]:
        """Parameters without features: norm scales, embeddings, free parameters, tied weights."""
        held = [c for part in self._parts() for c in (part.layer.weight, part.layer.bias) if c is not None]
        return tuple(
            name for name, (start, stop) in self.columns.items() if not any(a >= start and b <= stop for a, b in held)
        )

    @property
    def protected_rank(self) -> dict[str, int]:
        """Dimension of the protected subspace by layer."""
        return {part.layer.name: part.protected.rank for part in self._parts()}

    @property
    def protected_spans(self) -> tuple[tuple[LayerColumns, Subspace], ...]:
        """Where every layer lies in the flat vector, and its protected subspace."""
        return tuple((part.layer, part.protected) for part in self._parts())

    @property
    def eigenspaces(self) -> tuple[Eigenspace, ...]:
        """One a layer: protected directions, then those of the task at hand by descending value, times d_out."""
        self._refuse_empty()
        spaces = []
        for part in self._parts():
            values, mask = part.values(part.held + part.held_now())
            spaces.append(Eigenspace(part.layer.name, values, part.layer.dimension, part.layer.width_out, mask))
        return tuple(spaces)

    def components(self, vector: Tensor) -> Tensor:
        """[W Q, W V], flat, (r,), for the part W of v in every layer, Q the protected and V the other directions."""
        pieces = []
        for part in self._parts():
            matrix = part.layer.matrix(vector)
            pieces.append(torch.cat([part.protected.coordinates(matrix), matrix @ part.residual()[1]], 1).flatten())
        return torch.cat(pieces)

    def combine(self, components: Tensor) -> Tensor:
        """C [Q, V]^T in every layer, zero elsewhere, flat, (P,)."""
        out = components.new_zeros(self.width)
        start = 0
        for part in self._parts():
            vectors = part.residual()[1]
            shape = part.layer.width_out, part.protected.rank + vectors.shape[1]
            inside, rest = (
                components[start : start + shape[0] * shape[1]]
                .view(shape)
                .split([part.protected.rank, vectors.shape[1]], 1)
            )
            part.layer.write(part.protected.combine(inside) + rest @ vectors.T, out)
            start += shape[0] * shape[1]
        return out

    def nbytes(self) -> int:
        """Protected subspaces; with a task at hand its moments and eigenvectors too."""
        tensors = [t for part in self._parts() for t in (part.moment, *(part.eigen or ())) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors) + sum(p.protected.nbytes() for p in self._parts())

    def _parts(self) -> list[LayerMoments]:
        return [part for parts in self._layers.values() for part in parts]

    def _refuse_empty(self) -> None:
        if not any(part.protected.rank or part.moment is not None for part in self._parts()):
            raise ValueError("the constraint holds no features yet; call update with retained inputs first")

    def _uncover(self, outside: list[str]) -> None:
        """Drop layers whose parameters reach the outputs by another way than through the layer."""
        if outside and self._begun:
            raise ValueError(
                f"the parameters of {', '.join(outside)} are used outside their own layer on this batch, but not on "
                "the first, so its features do not protect them; leave them out (parameters=...) and freeze them"
            )
        self._begun = True
        for name in outside:
            del self._layers[name]


def _owners(module: nn.Module) -> dict[nn.Module, dict[str, str]]:
    """Layers with {local: full name} of the parameters that no other module has."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    holders: dict[nn.Parameter, list[nn.Module]] = {}
    for layer in module.modules():
        for parameter in layer.parameters(recurse=False):
            holders.setdefault(parameter, []).append(layer)
    return {
        layer: {local: names[p] for local, p in layer._parameters.items() if p is not None and len(holders[p]) == 1}
        for layer in module.modules()
    }


def _is_linear(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear or is_convolution(layer) or is_transposed_linear(layer)


def _moments_of(name: str, layer: nn.Module, weight: Range | None, bias: Range | None) -> list[LayerMoments]:
    """One a group; a group owns consecutive rows of the weight and consecutive entries of the bias."""
    matrix = layer.weight
    assert isinstance(matrix, Tensor)
    transposed = is_transposed_linear(layer)
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    width = (matrix.shape[1] if transposed else matrix.shape[0]) // groups
    parts = []
    for group in range(groups):
        columns = LayerColumns(
            name if groups == 1 else f"{name}[{group}]",
            width,
            _part(weight, group, groups),
            _part(bias, group, groups),
            transposed,
        )
        parts.append(LayerMoments(columns, Subspace.empty(columns.width_in, matrix)))
    return parts


def _held(parts: list[LayerMoments], columns: Mapping[str, Range]) -> list[str]:
    """Names of the parameters that the layer's features protect."""
    ends = [ends for part in parts for ends in (part.layer.weight, part.layer.bias) if ends is not None]
    return [name for name, owned in columns.items() if any(overlap(owned, ends) for ends in ends)]


def _part(columns: Range | None, index: int, count: int) -> Range | None:
    if columns is None:
        return None
    size = (columns[1] - columns[0]) // count
    return columns[0] + index * size, columns[0] + (index + 1) * size


def _recorder(name: str, parts: list[LayerMoments], mask: Tensor | None) -> Callable[..., None]:
    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = next(iter((*args, *kwargs.values()))).detach()
        if isinstance(layer, _ConvNd):
            batch = inputs if inputs.dim() == len(layer.kernel_size) + 2 else inputs.unsqueeze(0)
            features = patches(layer, batch)
        else:
            features = inputs.unsqueeze(-2)
        rows = _real(features, mask, name)
        for group, part in enumerate(parts):
            part.add(rows[:, group])

    return record


def _real(features: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """Rows (M, groups, d) of features (..., groups, d) without the padding."""
    lead = features.shape[:-2]
    if mask is None:
        return features.reshape(-1, *features.shape[-2:])
    mask = mask.bool().to(features.device)
    if lead[: mask.dim()] == mask.shape:
        return features[mask].flatten(0, -3)
    if len(lead) == 1 and lead[0] == mask.numel():
        return features[mask.flatten()]
    if len(lead) < mask.dim() and lead[:1] == mask.shape[:1]:  # pooled over positions
        return features[mask.flatten(1).any(1)]
    raise ValueError(f"{name}: its input has positions {tuple(lead)}, which a mask {tuple(mask.shape)} does not fit")
