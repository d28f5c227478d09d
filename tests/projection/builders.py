"""Small networks, Jacobians made of a given matrix, and `torch.func.jacrev` as the independent oracle."""

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils._pytree import tree_map

from nsrl.projection import FactoredJacobian, FlatParameters, StepHooks
from nsrl.projection.jacobians.blocks import DenseBlock


class Net(nn.Module):
    """Named submodules and parameters with a free-form forward: `Net(lambda net, x: net.a(x), a=nn.Linear(4, 3))`."""

    def __init__(self, function: Callable[["Net", Any], Tensor], **members: nn.Module | nn.Parameter):
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, inputs: Any) -> Tensor:
        return self.function(self, inputs)


class _Bound(nn.Module):
    def __init__(self, module: nn.Module, forward: Callable[[nn.Module, Any], Tensor]):
        super().__init__()
        self.module = module
        self.function = forward

    def forward(self, inputs: Any) -> Tensor:
        return self.function(self.module, inputs)


def jacrev_matrix(
    module: nn.Module,
    inputs: Any,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    names: Iterable[str] | None = None,
) -> Tensor:
    """The whole-batch Jacobian (N * O, P) by `torch.func.jacrev` over `functional_call`: no hooks and no factors."""
    bound = _Bound(module, forward or (lambda module, inputs: module(inputs)))
    wanted = {
        name: p
        for name, p in bound.named_parameters()
        if p.requires_grad and (names is None or name.removeprefix("module.") in names)
    }
    # Not functional_call's own tie_weights: it leaves a submodule that is registered under two names (as every SB3
    # policy's features extractor is) with the substituted tensor in place of its parameter.
    slots = {
        name: [
            f"{prefix}.{local}"
            for prefix, child in bound.named_modules()
            for local, q in child._parameters.items()
            if q is p
        ]
        for name, p in wanted.items()
    }

    def call(values: dict[str, Tensor]) -> Tensor:
        placed = {slot: values[name] for name in values for slot in slots[name]}
        return functional_call(bound, placed, (inputs,), tie_weights=False)

    inputs = copied(inputs)
    pieces = jacrev(call)({name: p.detach() for name, p in wanted.items()})
    return torch.cat(
        [pieces[name].reshape(*pieces[name].shape[:2], p.numel()) for name, p in wanted.items()], 2
    ).flatten(0, 1)


def rows_matrix(module: nn.Module, inputs: Any, forward: Callable[[nn.Module, Any], Tensor] | None = None) -> Tensor:
    """The whole-batch Jacobian (N * O, P) by one plain backward pass an output, where `jacrev` cannot follow."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    outputs = (forward or (lambda module, inputs: module(inputs)))(module, copied(inputs))
    rows = []
    for output in outputs.flatten():
        grads = torch.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    torch.zeros_like(p).flatten() if g is None else g.to_dense().flatten()
                    for p, g in zip(parameters, grads, strict=True)
                ]
            )
        )
    return torch.stack(rows).detach()


def copied(inputs: Any) -> Any:
    """The same numbers elsewhere: some modules overwrite what they are given."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)


def single(inputs: Any) -> Any:
    """Floating-point numbers as float32."""
    return tree_map(lambda leaf: leaf.float() if leaf.is_floating_point() else leaf, inputs)


def matrix_jacobian(matrix: Tensor) -> FactoredJacobian:
    """A Jacobian object with the given matrix: one dense block, one row a sample."""
    rows, columns = matrix.shape
    block = DenseBlock(matrix.reshape(rows, 1, columns), (0, columns))
    return FactoredJacobian([block], (rows, columns), 1, ("weight",), matrix.new_zeros(rows, 1))


class Products:
    """A Jacobian of which nothing is known but its products."""

    def __init__(self, matrix: Tensor):
        self.matrix = matrix
        self.shape = (matrix.shape[0], matrix.shape[1])

    def matvec(self, vector: Tensor) -> Tensor:
        return self.matrix @ vector.to(self.matrix)

    def rmatvec(self, rows: Tensor) -> Tensor:
        return self.matrix.T @ rows.to(self.matrix)

    def gram(self) -> Tensor:
        return self.matrix.double() @ self.matrix.double().T

    def scaled(self, scale: Tensor) -> tuple["Products", Tensor]:
        return Products(self.matrix * scale.to(self.matrix)), scale.to(self.matrix)


def matrix_of_condition(rows: int, columns: int, condition: float, seed: int = 0) -> Tensor:
    """A float64 matrix with log-spaced singular values from 1 to 1 / condition."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, rank, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, rank, generator=generator, dtype=torch.float64))[0]
    return left * torch.logspace(0.0, -math.log10(condition), rank, dtype=torch.float64) @ right.T


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Seeded standard normal numbers, drawn in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def mlp(*sizes: int, activation: Callable[[], nn.Module] = nn.Tanh, bias: bool = True) -> nn.Sequential:
    """A fully connected network without activation behind the last layer."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(sizes):
        layers += [nn.Linear(width_in, width_out, bias=bias), activation()]
    return nn.Sequential(*layers[:-1])


def project_way(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], project: Callable[[Tensor], Tensor]
) -> StepHooks:
    """From now on the whole way since this call is replaced by its projection, after every step."""
    flat = FlatParameters(parameters)
    start = flat.read()
    return StepHooks(optimizer, after=lambda: flat.write(start + project(flat.read() - start)))
