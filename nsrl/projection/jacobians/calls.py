"""Calls of layers, recorded, and whether they account for all that the outputs owe to the layers' parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nsrl.projection.jacobians.capture import gradients
from nsrl.projection.jacobians.fallback import flat
from nsrl.projection.jacobians.verification import TOLERANCES

#: Errors in a precision of two or three digits, as `TOLERANCES`.
COARSE = (0.1, 1e-2)


@dataclass
class _Layer:
    """A layer, those of its parameters that are looked after, and its calls: arguments and output."""

    module: nn.Module
    parameters: Sequence[nn.Parameter]
    called: bool = False
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = field(default_factory=list)


class LayerCalls:
    """Records what some layers are called with while a module runs.

    Args:
        layers: by name, each with the parameters that are looked after.
    """

    def __init__(self, layers: Mapping[str, tuple[nn.Module, Sequence[nn.Parameter]]]):
        self._layers = {name: _Layer(module, parameters) for name, (module, parameters) in layers.items()}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Within the block calls are recorded."""
        with ExitStack() as stack:
            for layer in self._layers.values():
                # Ahead of the user's hooks: what they make of the output is no longer the layer's.
                handle = layer.module.register_forward_hook(_recorder(layer), prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def unaccounted(self, outputs: Any) -> list[str]:
        """Names of the layers whose parameters act on the outputs by other ways than the recorded calls.

        By one random product: the gradient in a parameter has to be the sum of what it is through each call, for the
        gradient in that call's output. Whoever reads a layer's weight, or calls it under other weights, adds to it.

        Args:
            outputs: of the run, in their graph: a tensor or a (nested) container of such.

        Raises:
            ValueError: outputs without gradients, of which nothing can be told.
            JacobianError: autograd cannot differentiate them.
        """
        leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not leaves:
            if any(layer.called for layer in self._layers.values()):
                raise ValueError(
                    "the outputs carry no gradients, so it cannot be seen whether parameters act outside their own "
                    "layers; let forward return what the module computes, without torch.no_grad or detach"
                )
            return []
        generator = torch.Generator().manual_seed(0)
        total = torch.stack([(leaf * _normal(leaf, generator)).sum() for leaf in leaves]).sum()
        parameters = [parameter for layer in self._layers.values() for parameter in layer.parameters]
        ends = [output for layer in self._layers.values() for _, _, output in layer.calls]
        found = iter(gradients(total, [*parameters, *ends], torch.ones_like(total)) if parameters else ())
        whole = {parameter: next(found) for parameter in parameters}
        slopes = {id(output): next(found) for output in ends}
        norms = {p: 0.0 if grad is None else float(flat(grad).norm()) for p, grad in whole.items()}
        largest = max(norms.values(), default=0.0)
        return [name for name, layer in self._layers.items() if not _accounted(layer, whole, slopes, norms, largest)]


def _recorder(layer: _Layer) -> Any:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        layer.called = True
        if not output.requires_grad:  # a part that is to have no gradients
            return None
        constant = pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        layer.calls.append((*constant, output))
        # The clone keeps an in-place activation from overwriting the output that is differentiated.
        return output.clone()

    return record


def _accounted(
    layer: _Layer,
    whole: Mapping[nn.Parameter, Tensor | None],
    slopes: Mapping[int, Tensor | None],
    norms: Mapping[nn.Parameter, float],
    largest: float,
) -> bool:
    wanted = list(layer.parameters)
    found = [whole[parameter] for parameter in wanted]
    missing = [torch.zeros_like(p) if grad is None else grad for p, grad in zip(wanted, found, strict=True)]
    for args, kwargs, output in layer.calls:
        slope = slopes[id(output)]
        if slope is not None:
            again = type(layer.module).forward(layer.module, *args, **kwargs)
            through = torch.autograd.grad(again, wanted, slope, allow_unused=True)
            missing = [rest if part is None else rest - part for rest, part in zip(missing, through, strict=True)]
    for parameter, rest in zip(wanted, missing, strict=True):
        share, floor = TOLERANCES.get(parameter.dtype, COARSE)
        if not float(rest.norm()) <= share * norms[parameter] + floor * largest:  # NaN, too
            return False
    return True


def _normal(leaf: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)
