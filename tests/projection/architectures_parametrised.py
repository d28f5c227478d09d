"""Architectures whose weights are made of parameters, shared, scaled, stored in odd ways, or have no axis at all."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.projection.architecture import Architecture, frozen, images, sequences, tokens
from tests.projection.builders import Net, mlp, normal


def number(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value))


def weight_normed(layer: nn.Module, dim: int | None = 0) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own deprecation
        return nn.utils.weight_norm(layer, dim=dim)


def spectral_normed(layer: nn.Module, old: bool = False) -> nn.Module:
    return (nn.utils.spectral_norm if old else parametrizations.spectral_norm)(layer).eval()


def pruned(layer: nn.Linear) -> nn.Linear:
    prune.random_unstructured(layer, "weight", 0.4)
    return layer


def rezero(net: Net, x: Tensor) -> Tensor:
    for block, gain in zip(net.blocks, net.gains, strict=True):
        x = x + gain * torch.tanh(block(x))
    return net.head(x)


def cosine_logits(net: Net, x: Tensor) -> Tensor:
    """As CLIP has them."""
    return net.scale.exp() * F.normalize(net.a(x), dim=-1) @ F.normalize(net.classes, dim=-1).T


class Scale(nn.Module):
    def __init__(self, value: float):
        super().__init__()
        self.weight = number(value)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


class MaskedLinear(nn.Linear):
    """As in a masked autoencoder."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__(width_in, width_out)
        self.register_buffer("mask", (normal(width_out, width_in) > 0).float())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class GainedLinear(nn.Linear):
    """A linear layer with a parameter more."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__(width_in, width_out)
        self.gain = number(0.7)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * super().forward(x)


def symmetric() -> nn.Module:
    module = mlp(4, 4, 2)
    parametrize.register_parametrization(module[0], "weight", Symmetric())
    return module


def cached() -> nn.Module:
    module = Net(_cached, a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    parametrize.register_parametrization(module.a, "weight", Symmetric())
    return module


def _cached(net: Net, x: Tensor) -> Tensor:
    with parametrize.cached():
        return net.b(net.a(torch.tanh(net.a(x))))


def transposed_storage() -> nn.Module:
    module = mlp(4, 6, 3)
    module[0].weight = nn.Parameter(normal(4, 6).T)
    module[2].bias = nn.Parameter(normal(6)[::2])
    return module


def channels_last() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(100, 2)).to(memory_format=torch.channels_last)


def made_of_a_code(net: Net, x: Tensor) -> Tensor:
    """A hypernetwork: one code for all samples."""
    weight = net.make(torch.tanh(net.code)).view(2, 4)
    return F.linear(x, weight)


def prototypes(net: Net, x: Tensor) -> Tensor:
    """A layer that sees as many rows of a buffer as there are samples."""
    return torch.exp(-torch.cdist(net.a(x), net.a(net.anchors)))


def with_anchors(net: Net) -> Net:
    net.register_buffer("anchors", normal(4, 4, seed=9))
    return net


def spectral_convolution(net: Net, x: Tensor) -> Tensor:
    modes = torch.fft.rfft(x, dim=1) * torch.view_as_complex(net.filter)
    return net.a(torch.fft.irfft(modes, n=3, dim=1).flatten(1))


class Vision(nn.Module):
    """Patches, a class token and learnt positions."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 4, 3, stride=2)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(10, 4))
        self.block = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.positions
        return self.head(self.block(tokens)[:, 0])


def layer_scaled(net: Net, x: Tensor) -> Tensor:
    x = net.stem(x)
    return net.head((x + net.scale[:, None, None] * net.mix(F.gelu(net.depth(x)))).mean((2, 3)))


PARAMETRISED = [
    Architecture(
        "logit scale",
        lambda: Net(cosine_logits, a=nn.Linear(4, 3), classes=nn.Parameter(normal(5, 3)), scale=number(0.5)),
        2,
    ),
    Architecture(
        "temperature",
        lambda: Net(lambda net, x: (net.a(x) / net.t).log_softmax(-1), a=nn.Linear(4, 3), t=number(0.8)),
        1,
    ),
    Architecture(
        "rezero",
        lambda: Net(
            rezero,
            blocks=nn.ModuleList(nn.Linear(4, 4) for _ in range(3)),
            head=nn.Linear(4, 2),
            gains=nn.ParameterList(number(value) for value in (0.0, 0.1, -0.2)),
        ),
        3,
    ),
    Architecture("one number for all", lambda: Net(lambda net, x: (net.w * x).tanh(), w=number(0.3)), 1),
    Architecture("a layer of one number", lambda: nn.Sequential(nn.Linear(4, 3), Scale(0.4), nn.Linear(3, 2)), 1),
    Architecture(
        "one number where nothing can be batched",
        lambda: Net(
            lambda net, x: net.b(net.g * torch.stack([net.a(row) for row in x.unbind(0) if row.sum().item() < 1e9])),
            a=nn.Linear(4, 4),
            b=nn.Linear(4, 2),
            g=number(0.3),
        ),
        3,
    ),
    Architecture(
        "shift of one number", lambda: Net(lambda net, x: net.a(x) + net.b, a=nn.Linear(4, 3), b=number(0.3)), 1
    ),
    Architecture(
        "parameter without entries",
        lambda: Net(
            lambda net, x: net.a(torch.cat([x, net.e.expand(len(x), -1)], 1)),
            a=nn.Linear(4, 3),
            e=nn.Parameter(torch.zeros(0)),
            f=nn.Parameter(torch.zeros(0, 3)),
        ),
        2,
    ),
    Architecture(
        "parameters in a dictionary",
        lambda: Net(
            lambda net, x: x @ net.p["w"] * net.p["s"] + net.p["b"],
            p=nn.ParameterDict({"w": normal(4, 3), "s": torch.tensor(0.5), "b": normal(3)}),
        ),
        3,
    ),
    Architecture(
        "old weight norm", lambda: nn.Sequential(weight_normed(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)), 3
    ),
    Architecture(
        "old weight norm, one scale",
        lambda: nn.Sequential(
            weight_normed(nn.Linear(4, 3), None), nn.Tanh(), weight_normed(nn.Linear(3, 2, bias=False))
        ),
        5,
    ),
    Architecture(
        "old weight norm of a conv",
        lambda: nn.Sequential(weight_normed(nn.Conv2d(3, 2, 3, groups=1)), nn.Flatten(), nn.Linear(50, 2)),
        3,
        images,
    ),
    Architecture(
        "weight norm of a conv",
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 2, 3)), nn.Flatten(), nn.Linear(50, 2)),
        3,
        images,
    ),
    Architecture(
        "spectral norm", lambda: nn.Sequential(spectral_normed(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)), 2
    ),
    Architecture(
        "old spectral norm",
        lambda: nn.Sequential(spectral_normed(nn.Linear(4, 3), old=True), nn.Tanh(), nn.Linear(3, 2)),
        2,
    ),
    Architecture(
        "orthogonal",
        lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 2)),
        2,
        rows=True,
    ),
    Architecture("pruned", lambda: nn.Sequential(pruned(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)), 2),
    Architecture("symmetric weight", symmetric, 2),
    Architecture("parametrised and cached", cached, 2),
    Architecture("masked linear", lambda: nn.Sequential(MaskedLinear(4, 3), nn.ReLU(), MaskedLinear(3, 2)), 4),
    Architecture("linear with a gain", lambda: nn.Sequential(GainedLinear(4, 3), nn.Tanh(), nn.Linear(3, 2)), 3),
    Architecture(
        "low-rank update inside a weight",
        lambda: Net(
            lambda net, x: F.linear(x, net.w + net.up @ net.down),
            w=frozen(nn.Linear(4, 3), "weight").weight,
            up=nn.Parameter(normal(3, 2)),
            down=nn.Parameter(normal(2, 4, seed=1)),
        ),
        2,
    ),
    Architecture(
        "weights made from a code", lambda: Net(made_of_a_code, make=nn.Linear(3, 8), code=nn.Parameter(normal(3))), 3
    ),
    Architecture(
        "encoder tied to its decoder",
        lambda: Net(
            lambda net, x: F.linear(torch.tanh(net.a(x)), net.a.weight.T, net.b),
            a=nn.Linear(4, 3),
            b=nn.Parameter(normal(4)),
        ),
        2,
    ),
    Architecture("two layers share a weight, one its bias", lambda: _shared_weight(), 0),
    Architecture("conv tied to another", lambda: _tied_convolutions(), 2, images),
    Architecture("weight stored transposed", transposed_storage, 0),
    Architecture("conv stored channels last", channels_last, 0, images),
    Architecture(
        "broadcast parameters",
        lambda: Net(
            lambda net, x: net.a(x * net.row + net.column).sum(1),
            a=nn.Linear(4, 2),
            row=nn.Parameter(normal(1, 1, 4)),
            column=nn.Parameter(normal(3, 1)),
        ),
        2,
        sequences,
    ),
    Architecture(
        "part of a parameter",
        lambda: Net(
            lambda net, x: F.linear(x, net.w[1:4], net.w[0, :3]) + net.w[4].sum(), w=nn.Parameter(normal(5, 4))
        ),
        1,
    ),
    Architecture(
        "a layer that sees a buffer", lambda: with_anchors(Net(prototypes, a=nn.Linear(4, 3))), 2, rows=True
    ),  # jacrev of cdist is not what finite differences say (torch 2.13)
    Architecture(
        "complex view",
        lambda: Net(spectral_convolution, a=nn.Linear(12, 2), filter=nn.Parameter(normal(2, 4, 2))),
        1,
        sequences,
    ),
    Architecture(
        "three-way product",
        lambda: Net(lambda net, x: torch.einsum("ni,nj,ijk->nk", x, x, net.w), w=nn.Parameter(normal(4, 4, 2))),
        1,
    ),
    Architecture(
        "cp-decomposed",
        lambda: Net(
            lambda net, x: ((x @ net.u) * (x @ net.v)) @ net.w,
            u=nn.Parameter(normal(4, 3)),
            v=nn.Parameter(normal(4, 3, seed=1)),
            w=nn.Parameter(normal(3, 2)),
        ),
        3,
    ),
    Architecture(
        "learnt fourier features",
        lambda: Net(
            lambda net, x: net.a(torch.cat([(x @ net.b).sin(), (x @ net.b).cos()], 1)),
            a=nn.Linear(6, 2),
            b=nn.Parameter(normal(4, 3)),
        ),
        1,
    ),
    Architecture("vision transformer", lambda: Vision().eval(), 8, images),
    Architecture(
        "layer scale",
        lambda: Net(
            layer_scaled,
            stem=nn.Conv2d(3, 4, 3),
            depth=nn.Conv2d(4, 4, 3, padding=1, groups=4),
            mix=nn.Conv2d(4, 4, 1),
            scale=nn.Parameter(1e-2 * normal(4)),
            head=nn.Linear(4, 2),
        ),
        1,
        images,
    ),
    Architecture(
        "embedding and one number",
        lambda: Net(
            lambda net, x: net.a(net.e(x) * net.g).mean(1), e=nn.Embedding(6, 4), a=nn.Linear(4, 2), g=number(0.5)
        ),
        1,
        tokens,
    ),
    Architecture("shared by two names, one frozen", lambda: _two_names(), 0),
]


def _shared_weight() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 2))
    module[2].weight = module[0].weight
    return module


def _tied_convolutions() -> nn.Module:
    module = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Tanh(), nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(27, 2))
    module[2].weight = module[0].weight
    return module


def _two_names() -> nn.Module:
    layer = frozen(nn.Linear(4, 4), "bias")
    return Net(lambda net, x: net.c(torch.tanh(net.b(torch.tanh(net.a(x))))), a=layer, b=layer, c=nn.Linear(4, 2))
