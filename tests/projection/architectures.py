"""The architecture matrix: every odd way to use a parameter."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.projection.builders import Net, mlp, normal


def vectors(samples: int, seed: int) -> Tensor:
    return normal(samples, 4, seed=seed)


def images(samples: int, seed: int) -> Tensor:
    return normal(samples, 3, 7, 7, seed=seed)


def sequences(samples: int, seed: int) -> Tensor:
    return normal(samples, 3, 4, seed=seed)


def tokens(samples: int, seed: int) -> Tensor:
    return torch.randint(0, 6, (samples, 3), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Architecture:
    """A module builder, its inputs, and the number of parameters that may need materialised columns."""

    name: str
    build: Callable[[], nn.Module]
    dense: int
    inputs: Callable[[int, int], Any] = field(default=vectors)

    def __str__(self) -> str:
        return self.name


def frozen(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    return module


def tied(weight: bool = True, bias: bool = False) -> nn.Module:
    module = mlp(4, 4, 4, 3)
    if weight:
        module[2].weight = module[0].weight
    if bias:
        module[2].bias = module[0].bias
    return module


def convolution(layer: nn.Conv2d) -> nn.Module:
    with torch.no_grad():
        width = layer(torch.zeros(1, 3, 7, 7)).numel()
    return nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(width, 2))


def evaluated_batch_norm() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))
    module[1].running_mean.copy_(normal(5, seed=3))
    module[1].running_var.copy_(normal(5, seed=4).abs() + 0.5)
    return module.eval()


def hooked_by_user() -> nn.Module:
    module = mlp(4, 3, 2)
    module[0].register_forward_hook(lambda layer, args, output: 2.0 * output)
    return module


def shared_twice(net: Net, x: Tensor) -> Tensor:
    return net.b(torch.tanh(net.a(torch.tanh(net.a(x)))))


def shared_with_positions(net: Net, x: Tensor) -> Tensor:
    return net.b(torch.tanh(net.a(x)).mean(1)) + net.a(x[:, 0])[:, :2]


def free_parameters(net: Net, x: Tensor) -> Tensor:
    return torch.tanh(x @ net.w) * net.g + net.a(x)


ARCHITECTURES = [
    Architecture("single linear", lambda: nn.Linear(4, 3), 0),
    Architecture("mlp tanh", lambda: mlp(4, 6, 5, 3), 0),
    Architecture("mlp relu", lambda: mlp(4, 6, 5, 3, activation=nn.ReLU), 0),
    Architecture("mlp in-place relu", lambda: mlp(4, 6, 5, 3, activation=lambda: nn.ReLU(inplace=True)), 0),
    Architecture("in-place relu on the output", lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True)), 0),
    Architecture("no bias", lambda: mlp(4, 6, 3, bias=False), 0),
    Architecture("frozen weight", lambda: frozen(mlp(4, 6, 3), "0.weight"), 0),
    Architecture("frozen bias", lambda: frozen(mlp(4, 6, 3), "2.bias"), 0),
    Architecture("frozen layer", lambda: frozen(mlp(4, 6, 5, 3), "2.weight", "2.bias"), 0),
    Architecture("frozen first layer", lambda: frozen(mlp(4, 6, 3), "0.weight", "0.bias"), 0),
    Architecture("unused layer", lambda: Net(lambda net, x: net.a(x), a=nn.Linear(4, 2), b=nn.Linear(4, 2)), 0),
    Architecture("one linear used twice", lambda: Net(shared_twice, a=nn.Linear(4, 4), b=nn.Linear(4, 2)), 0),
    Architecture(
        "one linear used with and without positions",
        lambda: Net(shared_with_positions, a=nn.Linear(4, 4), b=nn.Linear(4, 2)), 0, sequences,
    ),
    Architecture(
        "weight used outside its layer",
        lambda: Net(lambda net, x: net.a(x) + F.linear(x.sin(), net.a.weight), a=nn.Linear(4, 3)), 1,
    ),
    Architecture(
        "bias used outside its layer", lambda: Net(lambda net, x: net.a(x) + net.a.bias**2, a=nn.Linear(4, 3)), 1
    ),
    Architecture(
        "weight transposed back", lambda: Net(lambda net, x: torch.tanh(net.a(x)) @ net.a.weight, a=nn.Linear(4, 3)),
        1,
    ),
    Architecture("tied weights", lambda: tied(), 1),
    Architecture("tied weights and biases", lambda: tied(bias=True), 2),
    Architecture("layer called by keyword", lambda: Net(lambda net, x: net.a(input=x), a=nn.Linear(4, 3)), 2),
    Architecture(
        "layer called both ways", lambda: Net(lambda net, x: net.a(input=x) + net.a(x.sin()), a=nn.Linear(4, 3)), 2
    ),
    Architecture("output changed by a hook of the user", hooked_by_user, 2),
    Architecture("weight norm", lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)), 3),
    Architecture("layer norm", lambda: nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(inplace=True), nn.Linear(6, 2)), 2),
    Architecture("batch norm in eval mode", evaluated_batch_norm, 2),
    Architecture("free parameters", lambda: Net(
        free_parameters, a=nn.Linear(4, 3), w=nn.Parameter(normal(4, 3)), g=nn.Parameter(normal(3))), 2),
    Architecture("positions, factored", lambda: Net(
        lambda net, x: net.b(torch.tanh(net.a(x))).mean(1), a=nn.Linear(4, 30), b=nn.Linear(30, 20)), 0, sequences),
    Architecture("positions, materialised", lambda: Net(
        lambda net, x: net.b(torch.tanh(net.a(x))).mean(1), a=nn.Linear(4, 2), b=nn.Linear(2, 2)), 0, sequences),
    Architecture("two axes of positions", lambda: Net(
        lambda net, x: net.b(torch.tanh(net.a(x))).mean((1, 2)), a=nn.Linear(7, 3), b=nn.Linear(3, 2)), 0, images),
    Architecture("positions before samples", lambda: Net(
        lambda net, x: net.a(x.transpose(0, 1)).sum(0), a=nn.Linear(4, 3)), 2, sequences),
    Architecture("positions folded into samples", lambda: Net(
        lambda net, x: net.a(x.reshape(-1, 4)).view(-1, 3, 3).sum(1), a=nn.Linear(4, 3)), 2, sequences),
    Architecture("a layer that sees no sample", lambda: Net(
        lambda net, x: net.a(x) + net.b(x.new_ones(1, 2)), a=nn.Linear(4, 3), b=nn.Linear(2, 3)), 2),
    Architecture("embedding", lambda: Net(
        lambda net, x: net.a(net.e(x)).sum(1), e=nn.Embedding(6, 4), a=nn.Linear(4, 2)), 1, tokens),
    Architecture("embedding with padding", lambda: Net(
        lambda net, x: net.a(net.e(x)).sum(1), e=nn.Embedding(6, 4, padding_idx=1), a=nn.Linear(4, 2)), 1, tokens),
    Architecture("embedding tied to the head", lambda: Net(
        lambda net, x: F.linear(torch.tanh(net.e(x)).mean(1), net.e.weight), e=nn.Embedding(6, 4)), 1, tokens),
    Architecture("attention", lambda: Net(
        lambda net, x: net.b(net.a(x, x, x, need_weights=False)[0].mean(1)),
        a=nn.MultiheadAttention(4, 2, batch_first=True), b=nn.Linear(4, 2)), 4, sequences),
    Architecture("two-argument layer", lambda: Net(
        lambda net, x: net.a(x) + net.b(x, x.sin()), a=nn.Linear(4, 2), b=nn.Bilinear(4, 4, 2)), 2),
    Architecture("conv", lambda: convolution(nn.Conv2d(3, 4, 3)), 0, images),
    Architecture("conv stride", lambda: convolution(nn.Conv2d(3, 4, 3, stride=2)), 0, images),
    Architecture("conv padding", lambda: convolution(nn.Conv2d(3, 4, (3, 2), padding=(2, 1))), 0, images),
    Architecture("conv dilation", lambda: convolution(nn.Conv2d(3, 4, 2, dilation=(2, 3))), 0, images),
    Architecture("conv no bias", lambda: convolution(nn.Conv2d(3, 4, 3, stride=(1, 2), bias=False)), 0, images),
    Architecture("conv groups", lambda: convolution(nn.Conv2d(3, 6, 3, groups=3)), 2, images),
    Architecture("conv circular padding", lambda: convolution(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")), 2, images),
    Architecture("conv used twice", lambda: Net(
        lambda net, x: net.b(net.a(torch.tanh(net.a(x))).flatten(1)),
        a=nn.Conv2d(3, 3, 3), b=nn.Linear(27, 2)), 0, images),
    Architecture("conv and group norm", lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(36, 2)), 2, images),
    Architecture("conv1d", lambda: nn.Sequential(nn.Conv1d(3, 4, 2), nn.Flatten(), nn.Linear(12, 2)), 2, sequences),
    Architecture("transposed conv", lambda: nn.Sequential(
        nn.ConvTranspose2d(3, 2, 2), nn.Flatten(), nn.Linear(128, 2)), 2, images),
]  # fmt: skip
