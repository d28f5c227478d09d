"""A pass through a network, forward and backward: by hand through linear layers and ReLU, else by autograd.

On batches of ten most of a step is autograd's bookkeeping, not arithmetic; by hand it takes a third of the time and
gives the same gradients but for round-off. By hand the gradient of a weight can also be made with other rows than the
layer's inputs: a projection of the gradient is then one of a few rows, not of the whole weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsrl.continual.heads import ABSENT, MultiHead, model_outputs
from nsrl.projection.hooks import is_hooked

#: What stands in for a layer's inputs (N, d_in) in the gradient of its weight.
Rows = Callable[[nn.Linear, Tensor], Tensor]


class Pass(Protocol):
    """A forward pass that can go backward once.

    Attributes:
        outputs: detached, (N, O).
    """

    outputs: Tensor

    def backward(self, slope: Tensor) -> None:
        """Add to the parameters' gradients, given the loss's gradient in the outputs, (N, O)."""
        ...


class GraphPass:
    """By autograd.

    Args:
        outputs: with their graph, (N, O).
    """

    def __init__(self, outputs: Tensor):
        self._graph = outputs
        self.outputs = outputs.detach()

    def backward(self, slope: Tensor) -> None:
        """See `Pass`."""
        self._graph.backward(slope)


@dataclass(frozen=True)
class Stage:
    """A linear layer, and whether a ReLU is behind it."""

    layer: nn.Linear
    relu: bool


@dataclass(frozen=True)
class Chain:
    """A network of linear layers, one behind the other.

    Attributes:
        stages: of the trunk, or of the whole network.
        heads: output layers of a `MultiHead`; empty for a network that has one.
        flatten: whether inputs are flattened first.
    """

    stages: tuple[Stage, ...]
    heads: tuple[nn.Linear, ...] = ()
    flatten: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> Chain | None:
        """A model as a chain; None where it has anything else in it, a hook, or a parameter in two places."""
        if type(model) not in (MultiHead, nn.Sequential) or is_hooked(model):
            return None
        outputs = list(model.heads) if isinstance(model, MultiHead) else []
        heads = tuple(head for head in outputs if type(head) is nn.Linear)
        modules = _flat(model.trunk if isinstance(model, MultiHead) else model)
        flatten = bool(modules) and type(modules[0]) is nn.Flatten
        stages: list[Stage] = []
        for module in modules[int(flatten) :]:
            if type(module) is nn.Linear:
                stages.append(Stage(module, relu=False))
            elif type(module) is nn.ReLU and stages and not stages[-1].relu:
                stages[-1] = Stage(stages[-1].layer, relu=True)
            else:
                return None
        owned = [p for layer in (*(stage.layer for stage in stages), *heads) for p in layer.parameters()]
        if not stages or len(heads) < len(outputs) or len(owned) > len(set(owned)):
            return None
        if flatten and (modules[0].start_dim, modules[0].end_dim) != (1, -1):
            return None
        return cls(tuple(stages), heads, flatten)

    def run(self, inputs: Tensor, head: int | Tensor | None, rows: Rows | None = None) -> ChainPass:
        """Forward; see `ChainPass`."""
        return ChainPass(self, inputs, head, rows)


class ChainPass:
    """By hand.

    Args:
        chain: the network.
        inputs: (N, ...).
        head: one for all, one a sample (N,), or None, as in `model_outputs`; it has to exist.
        rows: what stands in for a layer's inputs in the gradient of its weight; None: the inputs.
    """

    @torch.no_grad()
    def __init__(self, chain: Chain, inputs: Tensor, head: int | Tensor | None, rows: Rows | None = None):
        self._chain, self._head, self._rows = chain, head, rows
        values = inputs.flatten(1) if chain.flatten else inputs
        self._values = [values]
        for stage in chain.stages:
            values = F.linear(values, stage.layer.weight, stage.layer.bias)
            if stage.relu:
                values = values.relu_()
            self._values.append(values)
        self._members: list[tuple[int, Tensor]] = []
        if isinstance(head, Tensor):
            values = self._headed(values, head)
        elif head is not None:
            values = F.linear(values, chain.heads[head].weight, chain.heads[head].bias)
        self.outputs = values

    @torch.no_grad()
    def backward(self, slope: Tensor) -> None:
        """See `Pass`."""
        stages, values = self._chain.stages, self._values
        if isinstance(self._head, Tensor):
            below = torch.zeros_like(values[-1])
            for index, members in self._members:
                layer = self._chain.heads[index]
                piece = slope[members, : layer.out_features]
                self._add(layer, piece, values[-1][members])
                below[members] = piece @ layer.weight
            slope = below
        elif self._head is not None:
            layer = self._chain.heads[self._head]
            self._add(layer, slope, values[-1])
            slope = slope @ layer.weight
        for number in reversed(range(len(stages))):
            if stages[number].relu:
                slope = torch.ops.aten.threshold_backward(slope, values[number + 1], 0.0)
            layer = stages[number].layer
            self._add(layer, slope, values[number])
            if number:
                slope = slope @ layer.weight

    def _headed(self, features: Tensor, head: Tensor) -> Tensor:
        """Outputs of a head a sample, as wide as the widest head."""
        heads = self._chain.heads
        outputs = features.new_full((len(features), max(layer.out_features for layer in heads)), ABSENT)
        for index in sorted(set(head.tolist())):
            members = (head == index).nonzero().squeeze(1)
            self._members.append((index, members))
            layer = heads[index]
            outputs[members, : layer.out_features] = F.linear(features[members], layer.weight, layer.bias)
        return outputs

    def _add(self, layer: nn.Linear, slope: Tensor, inputs: Tensor) -> None:
        if layer.weight.requires_grad:
            rows = inputs if self._rows is None else self._rows(layer, inputs)
            _accumulate(layer.weight, slope.T @ rows)
        if layer.bias is not None and layer.bias.requires_grad:
            _accumulate(layer.bias, slope.sum(0))


def run(model: nn.Module, chain: Chain | None, inputs: Tensor, head: int | Tensor | None) -> Pass:
    """A pass through a model.

    Args:
        model: any.
        chain: what it is, if it is one.
        inputs: samples first.
        head: one for all, one a sample, (N,), or None.

    Raises:
        NsrlError: as `model_outputs`.
    """
    if chain is None or not fits(chain, inputs, head):
        return GraphPass(model_outputs(model, inputs, head))
    return chain.run(inputs, head)


def fits(chain: Chain, inputs: Tensor, head: int | Tensor | None) -> bool:
    """Whether a chain passes these inputs as the model itself would: not under autocast, and with heads it has."""
    if torch.is_autocast_enabled(inputs.device.type) or inputs.requires_grad or inputs.ndim < 2:
        return False
    if not chain.flatten and inputs.ndim > 2:
        return False
    if head is None or not chain.heads:
        return head is None and not chain.heads
    low, high = (head, head) if isinstance(head, int) else map(int, torch.aminmax(head))
    return 0 <= low and high < len(chain.heads)


def _accumulate(parameter: Tensor, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)


def _flat(module: nn.Module) -> list[nn.Module]:
    if type(module) is nn.Sequential:
        return [leaf for child in module for leaf in _flat(child)]
    return [] if type(module) is nn.Identity else [module]
