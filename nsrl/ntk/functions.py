"""A module's outputs at fixed inputs as a function of its flat trainable parameters, and its derivatives."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.utils import _pytree as pytree

from nsrl.errors import NsrlError
from nsrl.projection.jacobians.capture import refuse_sample_mixing
from nsrl.projection.jacobians.fallback import BoundForward, Forward, flat
from nsrl.projection.jacobians.state import differentiable, own_state
from nsrl.projection.jacobians.verification import TOLERANCES

#: Relative error of a gradient in a precision of two or three digits.
HALF = 0.1


class ParameterFunction:
    """w -> f(inputs; w), shape (N, O), for flat parameters w (P,) in `named_parameters()` order.

    The module is only read: its parameters stay as they are.

    Args:
        module: in eval mode.
        forward: function (module, inputs) -> outputs (N, O); default `module(inputs)`.
        names: the parameters that make up w; default the trainable ones.

    Attributes:
        origin: the module's own w, a copy.

    Raises:
        JacobianError: batch normalisation or dropout in train mode.
        NsrlError: no trainable parameters; at the first derivative, a module that its parameters cannot be put into.
    """

    def __init__(self, module: nn.Module, forward: Forward | None = None, names: tuple[str, ...] | None = None):
        refuse_sample_mixing(module)
        self._bound = BoundForward(module, forward or (lambda module, inputs: module(inputs)))
        parameters = dict(module.named_parameters())
        self.names = tuple(n for n, p in parameters.items() if p.requires_grad) if names is None else names
        if not self.names:
            raise NsrlError("the model has no trainable parameter, so there is nothing to linearise in")
        self._shapes = [parameters[name].shape for name in self.names]
        self.origin = torch.cat([parameters[name].detach().flatten() for name in self.names])
        self._verified = False

    def __call__(self, vector: Tensor, inputs: Any) -> Tensor:
        """Outputs (N, O) at the parameters `vector` (P,); differentiable in both."""
        pieces = vector.split([shape.numel() for shape in self._shapes])
        values = {
            f"module.{name}": piece.view(shape)
            for name, piece, shape in zip(self.names, pieces, self._shapes, strict=True)
        }
        with own_state(self._bound):
            return functional_call(self._bound, values, (inputs,))

    def first_order(self, inputs: Any, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and J v at the origin, both (N, O), in one forward-mode pass."""
        self._verify(inputs)
        outputs, change, *_ = jvp(lambda w: self(w, inputs), (self.origin,), (direction,))
        return outputs, change

    def second_order(self, inputs: Any, u: Tensor, v: Tensor) -> Tensor:
        """D^2 f [u, v] at the origin, shape (N, O).

        As the gradient in r of <u, Hess <r, f> v>, which is linear in r: reverse mode all the way, which
        every layer supports, where forward mode on top of forward mode has gaps.
        """
        with torch.no_grad():
            rows = torch.ones_like(self(self.origin, inputs))
        rows.requires_grad_(True)
        product = self._hessian_product(inputs, rows, v)
        if product is None:
            return torch.zeros_like(rows)
        (curvature,) = torch.autograd.grad(product @ u, rows, allow_unused=True)
        return torch.zeros_like(rows) if curvature is None else curvature

    def hessian_product(self, inputs: Any, rows: Tensor, v: Tensor) -> Tensor:
        """Hessian of <rows, f> at the origin, times v; rows (N, O), v (P,): shape (P,)."""
        product = self._hessian_product(inputs, rows, v)
        return torch.zeros_like(v) if product is None else product.detach()

    def _hessian_product(self, inputs: Any, rows: Tensor, v: Tensor) -> Tensor | None:
        """The product in the graph of `rows`, if these ask for one; None for a model linear in its parameters."""
        self._verify(inputs)
        point = self.origin.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad((rows * self(point, inputs)).sum(), point, create_graph=True)
        if not gradient.requires_grad:
            return None
        return torch.autograd.grad(gradient @ v, point, allow_unused=True, create_graph=rows.requires_grad)[0]

    def _verify(self, inputs: Any) -> None:
        """Hold the gradient in w against that of the module itself, once.

        `functional_call` swaps what is registered: a module that keeps a parameter in a list or a dictionary too would
        go on using its own, and every derivative would lack that part.
        """
        if self._verified:
            return
        module = self._bound.module
        named = dict(module.named_parameters())
        parameters = [named[name] for name in self.names]
        trained = [parameter.requires_grad for parameter in parameters]
        point = self.origin.clone().requires_grad_(True)
        with differentiable(module):
            try:
                for parameter in parameters:
                    parameter.requires_grad_(True)
                outputs = self._bound(inputs)
                rows = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs)
                expected = torch.autograd.grad(outputs, parameters, rows, allow_unused=True)
            finally:
                for parameter, before in zip(parameters, trained, strict=True):
                    parameter.requires_grad_(before)
            (ours,) = torch.autograd.grad(self(point, inputs), point, rows, allow_unused=True, materialize_grads=True)
        whole = torch.cat(
            [
                torch.zeros_like(p).flatten() if grad is None else flat(grad)
                for p, grad in zip(parameters, expected, strict=True)
            ]
        )
        share, _ = TOLERANCES.get(whole.dtype, (HALF, 0.0))
        if not float((ours - whole).norm()) <= share * float(whole.norm()):  # NaN, too
            raise NsrlError(
                "the module's gradient is another one with its parameters put in from outside: it is random, or holds "
                "one where it is not registered (a list, a dictionary, a view taken once); read it from its layer"
            )
        self._verified = True


class LinearizedModel(nn.Module):
    """First-order Taylor expansion of a model in its parameters, as a module to train, evaluate and differentiate.

    Attributes:
        displacement: d = w - w0, the only parameter, shape (P,) in the model's `named_parameters()` order (the columns
            of `nsrl.projection.jacobian`); zero at first, where the two models agree.
    """

    displacement: nn.Parameter

    def __init__(self, model: nn.Module, forward: Forward | None = None):
        super().__init__()
        names = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        frozen = copy.deepcopy(model).requires_grad_(False)
        self._function = ParameterFunction(frozen, forward, names)
        self.displacement = nn.Parameter(torch.zeros_like(self._function.origin))

    def forward(self, inputs: Any) -> Tensor:
        """Outputs (N, O), affine in the displacement, by one Jacobian-vector product."""
        outputs, change = self._function.first_order(inputs, self.displacement)
        return outputs + change


def linearize(model: nn.Module, *, forward: Forward | None = None) -> LinearizedModel:
    """The model's first-order expansion at its present parameters, of which it keeps a copy.

    Args:
        model: in eval mode. Its layers must support forward-mode differentiation (flash attention does not).
        forward: function (model, inputs) -> outputs (N, O); default `model(inputs)`.

    Raises:
        JacobianError: batch normalisation or dropout in train mode.
        NsrlError: no trainable parameters.
    """
    return LinearizedModel(model, forward)


def count_samples(inputs: Any) -> int:
    """Number of samples of the inputs.

    Raises:
        NsrlError: no samples, leaves that are no tensors, or leaves with different numbers of samples.
    """
    leaves = pytree.tree_leaves(inputs)
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            what = "a number" if isinstance(leaf, Tensor) else type(leaf).__name__
            raise NsrlError(f"the inputs must be tensors with the samples first, not {what}; use torch.as_tensor")
    counts = sorted({leaf.shape[0] for leaf in leaves})
    if len(counts) > 1:
        raise NsrlError(f"the parts of the inputs have different numbers of samples: {', '.join(map(str, counts))}")
    if not counts or counts[0] == 0:
        raise NsrlError("the inputs have no samples; a kernel needs at least one")
    return counts[0]


def take_samples(inputs: Any, start: int, stop: int) -> Any:
    """The samples from start to stop, in the same container."""
    return pytree.tree_map(lambda leaf: leaf[start:stop], inputs)


def refuse_mismatch(x1: Any, x2: Any) -> None:
    """Raise unless the two sets of inputs differ in their number of samples only.

    Raises:
        NsrlError: also for inputs without samples.
    """
    count_samples(x1), count_samples(x2)
    (ours, our_tree), (theirs, their_tree) = pytree.tree_flatten(x1), pytree.tree_flatten(x2)
    if our_tree != their_tree:
        raise NsrlError("x1 and x2 are different containers; both must be what the model is called with")
    for mine, yours in zip(ours, theirs, strict=True):
        if mine.shape[1:] != yours.shape[1:] or mine.dtype != yours.dtype:
            raise NsrlError(
                f"x1 has samples of shape {tuple(mine.shape[1:])} ({mine.dtype}), x2 of {tuple(yours.shape[1:])} "
                f"({yours.dtype}); both must be what the model is called with"
            )
