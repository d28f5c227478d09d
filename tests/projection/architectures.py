"""The architecture matrix: every odd way to use a parameter."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.projection.architecture import Architecture, frozen, images, sequences, tokens, volumes
from tests.projection.architectures_layers import LAYERS
from tests.projection.architectures_parametrised import PARAMETRISED
from tests.projection.architectures_routed import ROUTED
from tests.projection.builders import Net, mlp, normal


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


def evaluated_batch_norm_2d() -> nn.Module:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(100, 2))
    module[1].running_mean.copy_(normal(4, seed=3))
    module[1].running_var.copy_(normal(4, seed=4).abs() + 0.5)
    return module.eval()


CAUSAL = torch.ones(3, 3, dtype=torch.bool).triu(1)


def attend(layer: nn.MultiheadAttention, x: Tensor, **options) -> Tensor:
    return layer(x, x, x, need_weights=False, **options)[0]


class SelfAttention(nn.Module):
    """A pre-norm block around torch's fused attention, two heads of width 2."""

    def __init__(self):
        super().__init__()
        self.before, self.behind = nn.LayerNorm(4), nn.LayerNorm(4)
        self.qkv, self.out, self.head = nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in self.qkv(self.before(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(self.behind(x + self.out(mixed))[:, -1])


class LanguageModel(nn.Module):
    """Tokens to next-token logits, the head tied to the embedding."""

    def __init__(self, bias: bool = False):
        super().__init__()
        self.table, self.mix, self.norm = nn.Embedding(6, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.head = nn.Linear(4, 6, bias=bias)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.mix(self.table(x))).mean(1)))


class Conv1D(nn.Module):
    """As in the transformers library: a linear layer whose weight is stored as (inputs, outputs)."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / 2), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


def transposed_tie() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Conv1D(4, 4), nn.Linear(4, 2))
    module[2].weight = module[0].weight
    return module


class Adapter(nn.Module):
    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(rows, 1)), nn.Parameter(torch.randn(1, columns))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.left @ self.right


def parametrised() -> nn.Module:
    module = mlp(4, 5, 2)
    nn.utils.parametrize.register_parametrization(module[0], "weight", Adapter(5, 4))
    return frozen(module, "0.parametrizations.weight.original", "0.bias", "2.weight", "2.bias")


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
        lambda: Net(shared_with_positions, a=nn.Linear(4, 4), b=nn.Linear(4, 2)),
        0,
        sequences,
    ),
    Architecture(
        "weight used outside its layer",
        lambda: Net(lambda net, x: net.a(x) + F.linear(x.sin(), net.a.weight), a=nn.Linear(4, 3)),
        1,
    ),
    Architecture(
        "bias used outside its layer", lambda: Net(lambda net, x: net.a(x) + net.a.bias**2, a=nn.Linear(4, 3)), 1
    ),
    Architecture(
        "weight transposed back",
        lambda: Net(lambda net, x: torch.tanh(net.a(x)) @ net.a.weight, a=nn.Linear(4, 3)),
        1,
    ),
    Architecture("tied weights", lambda: tied(), 0),
    Architecture("tied weights and biases", lambda: tied(bias=True), 0),
    Architecture("layer called by keyword", lambda: Net(lambda net, x: net.a(input=x), a=nn.Linear(4, 3)), 0),
    Architecture(
        "layer called both ways", lambda: Net(lambda net, x: net.a(input=x) + net.a(x.sin()), a=nn.Linear(4, 3)), 0
    ),
    Architecture("output changed by a hook of the user", hooked_by_user, 0),
    Architecture(
        "weight norm",
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)),
        3,
    ),
    Architecture(
        "layer norm", lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(inplace=True), nn.Linear(6, 2)), 2
    ),
    Architecture("batch norm in eval mode", evaluated_batch_norm, 2),
    Architecture(
        "free parameters",
        lambda: Net(free_parameters, a=nn.Linear(4, 3), w=nn.Parameter(normal(4, 3)), g=nn.Parameter(normal(3))),
        2,
    ),
    Architecture(
        "positions, factored",
        lambda: Net(lambda net, x: net.b(torch.tanh(net.a(x))).mean(1), a=nn.Linear(4, 30), b=nn.Linear(30, 20)),
        0,
        sequences,
    ),
    Architecture(
        "positions, materialised",
        lambda: Net(lambda net, x: net.b(torch.tanh(net.a(x))).mean(1), a=nn.Linear(4, 2), b=nn.Linear(2, 2)),
        0,
        sequences,
    ),
    Architecture(
        "two axes of positions",
        lambda: Net(lambda net, x: net.b(torch.tanh(net.a(x))).mean((1, 2)), a=nn.Linear(7, 3), b=nn.Linear(3, 2)),
        0,
        images,
    ),
    Architecture(
        "positions before samples",
        lambda: Net(lambda net, x: net.a(x.transpose(0, 1)).sum(0), a=nn.Linear(4, 3)),
        2,
        sequences,
    ),
    Architecture(
        "positions folded into samples",
        lambda: Net(lambda net, x: net.a(x.reshape(-1, 4)).view(-1, 3, 3).sum(1), a=nn.Linear(4, 3)),
        2,
        sequences,
    ),
    Architecture(
        "a layer that sees no sample",
        lambda: Net(lambda net, x: net.a(x) + net.b(x.new_ones(1, 2)), a=nn.Linear(4, 3), b=nn.Linear(2, 3)),
        2,
    ),
    Architecture(
        "embedding",
        lambda: Net(lambda net, x: net.a(net.e(x)).sum(1), e=nn.Embedding(6, 4), a=nn.Linear(4, 2)),
        0,
        tokens,
    ),
    Architecture(
        "embedding with padding",
        lambda: Net(lambda net, x: net.a(net.e(x)).sum(1), e=nn.Embedding(6, 4, padding_idx=1), a=nn.Linear(4, 2)),
        0,
        tokens,
    ),
    Architecture(
        "embedding tied to the head",
        lambda: Net(lambda net, x: F.linear(torch.tanh(net.e(x)).mean(1), net.e.weight), e=nn.Embedding(6, 4)),
        1,
        tokens,
    ),
    Architecture(
        "attention",
        lambda: Net(
            lambda net, x: net.b(net.a(x, x, x, need_weights=False)[0].mean(1)),
            a=nn.MultiheadAttention(4, 2, batch_first=True),
            b=nn.Linear(4, 2),
        ),
        0,
        sequences,
    ),
    Architecture(
        "two-argument layer",
        lambda: Net(lambda net, x: net.a(x) + net.b(x, x.sin()), a=nn.Linear(4, 2), b=nn.Bilinear(4, 4, 2)),
        2,
    ),
    Architecture("conv", lambda: convolution(nn.Conv2d(3, 4, 3)), 0, images),
    Architecture("conv stride", lambda: convolution(nn.Conv2d(3, 4, 3, stride=2)), 0, images),
    Architecture("conv padding", lambda: convolution(nn.Conv2d(3, 4, (3, 2), padding=(2, 1))), 0, images),
    Architecture("conv dilation", lambda: convolution(nn.Conv2d(3, 4, 2, dilation=(2, 3))), 0, images),
    Architecture("conv no bias", lambda: convolution(nn.Conv2d(3, 4, 3, stride=(1, 2), bias=False)), 0, images),
    Architecture("conv groups", lambda: convolution(nn.Conv2d(3, 6, 3, groups=3)), 0, images),
    Architecture(
        "conv circular padding", lambda: convolution(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")), 0, images
    ),
    Architecture(
        "conv used twice",
        lambda: Net(
            lambda net, x: net.b(net.a(torch.tanh(net.a(x))).flatten(1)), a=nn.Conv2d(3, 3, 3), b=nn.Linear(27, 2)
        ),
        0,
        images,
    ),
    Architecture(
        "conv and group norm",
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(36, 2)),
        2,
        images,
    ),
    Architecture("conv1d", lambda: nn.Sequential(nn.Conv1d(3, 4, 2), nn.Flatten(), nn.Linear(12, 2)), 0, sequences),
    Architecture(
        "transposed conv",
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 2, 2), nn.Flatten(), nn.Linear(128, 2)),
        2,
        images,
    ),
    Architecture(
        "conv same padding", lambda: convolution(nn.Conv2d(3, 4, (3, 2), padding="same", dilation=(1, 2))), 0, images
    ),
    Architecture(
        "conv same padding, reflected",
        lambda: convolution(nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect")),
        0,
        images,
    ),
    Architecture(
        "conv depthwise, many groups",
        lambda: nn.Sequential(nn.Conv2d(3, 18, 1), nn.Conv2d(18, 18, 3, groups=18), nn.Flatten(), nn.Linear(450, 2)),
        2,
        images,
    ),
    Architecture(
        "conv1d groups, dilation, no bias",
        lambda: nn.Sequential(
            nn.Conv1d(4, 6, 2, groups=2, dilation=2, padding=1, bias=False), nn.Flatten(), nn.Linear(18, 2)
        ),
        0,
        lambda samples, seed: sequences(samples, seed).transpose(1, 2),
    ),
    Architecture(
        "conv3d",
        lambda: nn.Sequential(
            nn.Conv3d(2, 4, 2, groups=2, stride=(1, 2, 1), padding=1), nn.Flatten(), nn.Linear(96, 2)
        ),
        0,
        volumes,
    ),
    Architecture(
        "conv1d transposed",
        lambda: nn.Sequential(nn.ConvTranspose1d(3, 2, 2), nn.Flatten(), nn.Linear(10, 2)),
        2,
        sequences,
    ),
    Architecture(
        "conv channels last",
        lambda: convolution(nn.Conv2d(3, 4, 3)),
        0,
        lambda samples, seed: images(samples, seed).to(memory_format=torch.channels_last),
    ),
    Architecture(
        "inputs not contiguous", lambda: mlp(4, 6, 3), 0, lambda samples, seed: normal(4, samples, seed=seed).T
    ),
    Architecture(
        "frozen conv weight", lambda: frozen(convolution(nn.Conv2d(3, 6, 3, groups=3)), "0.weight"), 0, images
    ),
    Architecture(
        "layer norm over two axes",
        lambda: nn.Sequential(nn.LayerNorm((3, 4)), nn.Flatten(), nn.Linear(12, 2)),
        2,
        sequences,
    ),
    Architecture(
        "layer norm at positions, no bias",
        lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(15, 2)),
        1,
        sequences,
    ),
    Architecture(
        "rms norm",
        lambda: nn.Sequential(nn.Linear(4, 5), nn.RMSNorm(5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 2)),
        1,
        sequences,
    ),
    Architecture(
        "norm used twice",
        lambda: Net(lambda net, x: net.a(net.n(torch.tanh(net.n(x)))), n=nn.LayerNorm(4), a=nn.Linear(4, 2)),
        2,
    ),
    Architecture("batch norm of images in eval mode", lambda: evaluated_batch_norm_2d(), 2, images),
    Architecture(
        "instance norm",
        lambda: nn.Sequential(nn.InstanceNorm2d(3, affine=True), nn.Flatten(), nn.Linear(147, 2)),
        2,
        images,
    ),
    Architecture("prelu", lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU(3), nn.Linear(3, 2)), 1),
    Architecture(
        "attention, positions first",
        lambda: Net(
            lambda net, x: net.b(attend(net.a, x.transpose(0, 1)).mean(0)),
            a=nn.MultiheadAttention(4, 2),
            b=nn.Linear(4, 2),
        ),
        0,
        sequences,
    ),
    Architecture(
        "attention across, own widths",
        lambda: Net(
            lambda net, x: net.b(net.a(x, x[:, :2, :3], x[:, :2, :2])[0].mean(1)),
            a=nn.MultiheadAttention(4, 2, kdim=3, vdim=2, batch_first=True),
            b=nn.Linear(4, 2),
        ),
        0,
        sequences,
    ),
    Architecture(
        "attention, masked, with extra key",
        lambda: Net(
            lambda net, x: net.b(attend(net.a, x, attn_mask=CAUSAL.to(x.device)).mean(1)),
            a=nn.MultiheadAttention(4, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True),
            b=nn.Linear(4, 2),
        ),
        2,
        sequences,
    ),
    Architecture(
        "attention used twice, without bias",
        lambda: Net(
            lambda net, x: net.b(attend(net.a, torch.tanh(attend(net.a, x))).mean(1)),
            a=nn.MultiheadAttention(4, 1, bias=False, batch_first=True),
            b=nn.Linear(4, 2),
        ),
        0,
        sequences,
    ),
    Architecture(
        "attention of one sample without batch axis",
        lambda: Net(
            lambda net, x: net.b(torch.stack([attend(net.a, one) for one in x]).mean(1)),
            a=nn.MultiheadAttention(4, 2),
            b=nn.Linear(4, 2),
        ),
        4,
        sequences,
    ),
    Architecture(
        "transformer encoder layer",
        lambda: Net(
            lambda net, x: net.b(net.a(x).mean(1)),
            a=nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
            b=nn.Linear(4, 2),
        ).eval(),
        4,
        sequences,
    ),
    Architecture(
        "transformer decoder layer",
        lambda: Net(
            lambda net, x: net.b(net.a(x, x.sin()).mean(1)),
            a=nn.TransformerDecoderLayer(4, 2, 8, dropout=0.0, norm_first=True, batch_first=True),
            b=nn.Linear(4, 2),
        ).eval(),
        6,
        sequences,
    ),
    Architecture("scaled dot product attention block", lambda: SelfAttention(), 4, sequences),
    Architecture("language model, tied head", lambda: LanguageModel(), 2, tokens),
    Architecture("language model, tied head with bias", lambda: LanguageModel(bias=True), 2, tokens),
    Architecture("transposed linear", lambda: nn.Sequential(Conv1D(6, 4), nn.Tanh(), nn.Linear(6, 2)), 0),
    Architecture(
        "transposed linear, positions",
        lambda: nn.Sequential(Conv1D(6, 4), nn.Tanh(), nn.Flatten(), Conv1D(2, 18)),
        0,
        sequences,
    ),
    Architecture("weight tied to a transposed linear", lambda: transposed_tie(), 0),
    Architecture(
        "lstm",
        lambda: Net(lambda net, x: net.a(net.r(x)[0][:, -1]), r=nn.LSTM(4, 3, batch_first=True), a=nn.Linear(3, 2)),
        4,
        sequences,
    ),
    Architecture(
        "gru",
        lambda: Net(lambda net, x: net.a(net.r(x)[0][:, -1]), r=nn.GRU(4, 3, batch_first=True), a=nn.Linear(3, 2)),
        4,
        sequences,
    ),
    Architecture(
        "low-rank adapter",
        lambda: Net(
            lambda net, x: net.b(torch.tanh(net.w(x) + net.up(net.down(x)))),
            w=frozen(nn.Linear(4, 5), "weight", "bias"),
            down=nn.Linear(4, 1, bias=False),
            up=nn.Linear(1, 5, bias=False),
            b=frozen(nn.Linear(5, 2), "weight", "bias"),
        ),
        0,
    ),
    Architecture("parametrised low-rank adapter", lambda: parametrised(), 2),
    *ROUTED,
    *PARAMETRISED,
    *LAYERS,
]
