"""Layers of torch that have no factors of their own, and blocks of known networks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.projection.architecture import Architecture, images, sequences, tokens, vectors, volumes
from tests.projection.builders import Net, mlp, normal


def flattened(width: int, *layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, 2))


def positions_last(samples: int, seed: int) -> Tensor:
    return sequences(samples, seed).transpose(1, 2)


def evaluated(module: nn.Module) -> nn.Module:
    """With running statistics that have seen something."""
    for index, child in enumerate(module.modules()):
        if getattr(child, "running_mean", None) is not None:
            width = len(child.running_mean)
            child.running_mean.copy_(normal(width, seed=index))
            child.running_var.copy_(normal(width, seed=index + 1).abs() + 0.5)
    return module.eval()


def padding_of(x: Tensor) -> Tensor:
    """The last position of every other sample is padding; the first never is."""
    mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    mask[:, -1] = x[:, -1].flatten(1)[:, 0] > 0 if x.is_floating_point() else x[:, -1] > 2
    return mask


def mean_of_real(hidden: Tensor, padding: Tensor) -> Tensor:
    real = (~padding).to(hidden).unsqueeze(-1)
    return (hidden * real).sum(1) / real.sum(1)


def encoder(**options) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options.get("norm_first", False))


def encoded(net: Net, x: Tensor) -> Tensor:
    padding = padding_of(x)
    return net.head(mean_of_real(net.body(x, src_key_padding_mask=padding), padding))


def decoded(net: Net, x: Tensor) -> Tensor:
    causal = torch.ones(3, 3, dtype=torch.bool, device=x.device).triu(1)
    padding = padding_of(x)
    hidden = net.body(x.sin(), x, tgt_mask=causal, memory_key_padding_mask=padding, tgt_key_padding_mask=padding)
    return net.head(mean_of_real(hidden, padding))


def both(net: Net, x: Tensor) -> Tensor:
    causal = nn.Transformer.generate_square_subsequent_mask(3, device=x.device, dtype=x.dtype)
    return net.head(net.body(x, x.cos(), tgt_mask=causal, src_key_padding_mask=padding_of(x))[:, -1])


def grouped_queries(net: Net, x: Tensor) -> Tensor:
    query = net.q(x).unflatten(-1, (2, 2)).transpose(1, 2)
    key, value = net.k(x).unsqueeze(1), net.v(x).unsqueeze(1)
    mixed = F.scaled_dot_product_attention(query, key.expand_as(query), value.expand_as(query), attn_mask=net.bias)
    return net.head(mixed.transpose(1, 2).flatten(2).mean(1))


def rotary(net: Net, x: Tensor) -> Tensor:
    angles = torch.arange(3, device=x.device).to(x)[:, None] / torch.tensor([1.0, 10.0], device=x.device).to(x)

    def turned(t: Tensor) -> Tensor:
        even, odd = t[..., ::2], t[..., 1::2]
        return torch.cat([even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()], -1)

    return net.head(F.scaled_dot_product_attention(turned(net.q(x)), turned(net.k(x)), net.v(x)).mean(1))


def linear_attention(net: Net, x: Tensor) -> Tensor:
    query, key = F.elu(net.q(x)) + 1, F.elu(net.k(x)) + 1
    mixed = query @ (key.transpose(1, 2) @ net.v(x)) / (query @ key.sum(1).unsqueeze(-1))
    return net.head(mixed.mean(1))


class Residual(nn.Module):
    """Two convolutions with batch normalisation and a way around them."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
        )
        self.around = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.around(x), inplace=True)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Mixer(nn.Module):
    """Linear layers over positions and over features in turn."""

    def __init__(self):
        super().__init__()
        self.across, self.along = nn.Linear(3, 3), nn.Linear(4, 4)
        self.first, self.second = nn.LayerNorm(4), nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.gelu(self.across(self.first(x).transpose(1, 2))).transpose(1, 2)
        return self.head((x + F.gelu(self.along(self.second(x)))).mean(1))


class Gated(nn.Module):
    """A causal, gated convolution, as in WaveNet."""

    def __init__(self):
        super().__init__()
        self.filter, self.gate = (nn.Conv1d(4, 4, 2, dilation=2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        past = F.pad(x, (2, 0))
        return x + torch.tanh(self.filter(past)) * torch.sigmoid(self.gate(past))


class ConvolutionalGRU(nn.Module):
    def __init__(self):
        super().__init__()
        self.gates, self.new = nn.Conv2d(5, 4, 3, padding=1), nn.Conv2d(5, 2, 3, padding=1)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 2, 7, 7)
        for _ in range(2):
            reset, update = torch.sigmoid(self.gates(torch.cat([x, state], 1))).chunk(2, 1)
            state = (1 - update) * state + update * torch.tanh(self.new(torch.cat([x, reset * state], 1)))
        return self.head(state.mean((2, 3)))


def unet(net: Net, x: Tensor) -> Tensor:
    top = F.relu(net.a(x))
    down = F.relu(net.b(F.max_pool2d(top, 2)))
    up = F.interpolate(down, size=top.shape[2:], mode="bilinear")
    return net.head(net.c(torch.cat([top, up], 1)).mean((2, 3)))


def unpooled(net: Net, x: Tensor) -> Tensor:
    pooled, where = F.max_pool2d(net.a(x), 2, return_indices=True)
    return net.b(F.max_unpool2d(pooled.tanh(), where, 2, output_size=(5, 5)).flatten(1))


def dueling(net: Net, x: Tensor) -> Tensor:
    hidden = F.relu(net.body(x))
    advantage = net.advantage(hidden)
    return net.value(hidden) + advantage - advantage.mean(1, keepdim=True)


def bag_of_one_list(net: Net, x: Tensor) -> Tensor:
    starts = torch.arange(0, x.numel(), x.shape[1], device=x.device)
    return net.a(net.e(x.flatten(), starts))


def swish_gated(net: Net, x: Tensor) -> Tensor:
    return net.down(F.silu(net.gate(x)) * net.up(x))


LAYERS = [
    Architecture(
        "transposed conv1d, strided",
        lambda: flattened(20, nn.ConvTranspose1d(3, 2, 3, stride=2, output_padding=1)),
        2,
        sequences,
    ),
    Architecture(
        "transposed conv, groups and dilation",
        lambda: flattened(484, nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 3, groups=2, dilation=2)),
        2,
        images,
    ),
    Architecture(
        "transposed conv3d",
        lambda: flattened(54, nn.ConvTranspose3d(2, 2, (2, 2, 2), padding=(0, 0, 0), bias=False)),
        1,
        lambda samples, seed: normal(samples, 2, 2, 2, 2, seed=seed),
    ),
    Architecture(
        "group norm of vectors",
        lambda: nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.Tanh(), nn.Linear(6, 2)),
        2,
    ),
    Architecture("group norm of one group", lambda: flattened(100, nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4)), 2, images),
    Architecture("group norm of sequences", lambda: flattened(12, nn.GroupNorm(2, 4)), 2, positions_last),
    Architecture(
        "instance norm of sequences", lambda: flattened(12, nn.InstanceNorm1d(4, affine=True)), 2, positions_last
    ),
    Architecture(
        "instance norm with running statistics",
        lambda: evaluated(flattened(147, nn.InstanceNorm2d(3, affine=True, track_running_stats=True))),
        2,
        images,
    ),
    Architecture("instance norm of volumes", lambda: flattened(24, nn.InstanceNorm3d(2, affine=True)), 2, volumes),
    Architecture("batch norm of sequences", lambda: evaluated(flattened(12, nn.BatchNorm1d(4))), 2, positions_last),
    Architecture("batch norm of volumes", lambda: evaluated(flattened(24, nn.BatchNorm3d(2))), 2, volumes),
    Architecture(
        "batch norm without scale",
        lambda: evaluated(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2))),
        0,
    ),
    Architecture("local response norm", lambda: flattened(100, nn.Conv2d(3, 4, 3), nn.LocalResponseNorm(2)), 0, images),
    Architecture(
        "sparse embedding",
        lambda: Net(lambda net, x: net.a(net.e(x).flatten(1)), e=nn.Embedding(6, 4, sparse=True), a=nn.Linear(12, 2)),
        0,
        tokens,
        rows=True,
    ),
    Architecture(
        "sparse embedding, used outside too",
        lambda: Net(
            lambda net, x: net.a(net.e(x).flatten(1)) + net.e.weight[:2, 0],
            e=nn.Embedding(6, 4, sparse=True),
            a=nn.Linear(12, 2),
        ),
        1,
        tokens,
        rows=True,
    ),
    Architecture("bag of embeddings, mean", lambda: nn.Sequential(nn.EmbeddingBag(6, 4), nn.Linear(4, 2)), 1, tokens),
    Architecture(
        "bag of embeddings, sum and padding",
        lambda: nn.Sequential(nn.EmbeddingBag(6, 4, mode="sum", padding_idx=1), nn.Linear(4, 2)),
        1,
        tokens,
    ),
    Architecture(
        "bag of embeddings, largest",
        lambda: nn.Sequential(nn.EmbeddingBag(6, 4, mode="max"), nn.Linear(4, 2)),
        1,
        tokens,
        rows=True,
    ),
    Architecture(
        "bags of one list",
        lambda: Net(bag_of_one_list, e=nn.EmbeddingBag(6, 4, mode="sum"), a=nn.Linear(4, 2)),
        1,
        tokens,
        rows=True,
    ),
    Architecture(
        "bilinear at positions",
        lambda: Net(lambda net, x: net.a(x, x.cos()).sum(1), a=nn.Bilinear(4, 4, 2)),
        2,
        sequences,
    ),
    Architecture("pixel shuffle", lambda: flattened(400, nn.Conv2d(3, 16, 3), nn.PixelShuffle(2)), 0, images),
    Architecture("pixel unshuffle", lambda: flattened(36, nn.Conv2d(3, 1, 2), nn.PixelUnshuffle(2)), 0, images),
    Architecture(
        "unfold and fold",
        lambda: Net(
            lambda net, x: net.b(F.fold(net.a(F.unfold(x, 3).transpose(1, 2)).transpose(1, 2), (5, 5), 1).flatten(1)),
            a=nn.Linear(27, 2),
            b=nn.Linear(50, 2),
        ),
        0,
        images,
    ),
    Architecture("pooled and unpooled", lambda: Net(unpooled, a=nn.Conv2d(3, 2, 3), b=nn.Linear(50, 2)), 0, images),
    Architecture(
        "upsampled", lambda: flattened(392, nn.Conv2d(3, 2, 1), nn.Upsample(scale_factor=2, mode="bicubic")), 0, images
    ),
    Architecture("adaptive pooling", lambda: flattened(16, nn.Conv2d(3, 4, 3), nn.AdaptiveMaxPool2d(2)), 0, images),
    Architecture("prelu, one slope", lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU(), nn.Linear(3, 2)), 1),
    Architecture("prelu of channels", lambda: flattened(100, nn.Conv2d(3, 4, 3), nn.PReLU(4)), 1, images),
    Architecture(
        "prelu, as many outputs as samples", lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU(4), nn.Linear(4, 4)), 1
    ),
    Architecture("gated linear units", lambda: nn.Sequential(nn.Linear(4, 6), nn.GLU(), nn.Linear(3, 2)), 0),
    Architecture(
        "swish-gated units",
        lambda: Net(
            swish_gated, gate=nn.Linear(4, 5, bias=False), up=nn.Linear(4, 5, bias=False), down=nn.Linear(5, 2)
        ),
        0,
    ),
    Architecture(
        "odd activations",
        lambda: nn.Sequential(
            nn.Linear(4, 6),
            nn.Mish(),
            nn.Linear(6, 6),
            nn.RReLU().eval(),
            nn.Linear(6, 6),
            nn.Softmax(-1),
            nn.Linear(6, 2),
            nn.LogSigmoid(),
        ),
        0,
    ),
    Architecture(
        "transformer encoder with padding",
        lambda: Net(encoded, body=encoder(), head=nn.Linear(4, 2)).eval(),
        8,
        sequences,
    ),
    Architecture(
        "transformer encoder with padding, norm first",
        lambda: Net(encoded, body=encoder(norm_first=True, activation="gelu"), head=nn.Linear(4, 2)).eval(),
        8,
        sequences,
    ),
    Architecture(
        "transformer encoder on tokens, positions first",
        lambda: Net(
            lambda net, x: net.head(net.body(net.e(x).transpose(0, 1), src_key_padding_mask=padding_of(x))[0]),
            e=nn.Embedding(6, 4),
            body=nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1), 1, enable_nested_tensor=False),
            head=nn.Linear(4, 2),
        ).eval(),
        8,
        tokens,
    ),
    Architecture(
        "transformer decoder, masked",
        lambda: Net(
            decoded,
            body=nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 6, batch_first=True), 1),
            head=nn.Linear(4, 2),
        ).eval(),
        10,
        sequences,
    ),
    Architecture(
        "transformer",
        lambda: Net(both, body=nn.Transformer(4, 2, 1, 1, 6, batch_first=True), head=nn.Linear(4, 2)).eval(),
        14,
        sequences,
    ),
    Architecture(
        "attention, mean of its weights",
        lambda: Net(
            lambda net, x: net.b(net.a(x, x, x, key_padding_mask=padding_of(x))[1].flatten(1)),
            a=nn.MultiheadAttention(4, 2, batch_first=True),
            b=nn.Linear(9, 2),
        ),
        2,
        sequences,
    ),
    Architecture(
        "grouped queries with learnt bias",
        lambda: Net(
            grouped_queries,
            q=nn.Linear(4, 4),
            k=nn.Linear(4, 2),
            v=nn.Linear(4, 2),
            head=nn.Linear(4, 2),
            bias=nn.Parameter(normal(2, 3, 3)),
        ),
        1,
        sequences,
        rows=True,
    ),
    Architecture(
        "rotary attention",
        lambda: Net(rotary, q=nn.Linear(4, 4), k=nn.Linear(4, 4), v=nn.Linear(4, 4), head=nn.Linear(4, 2)),
        0,
        sequences,
    ),
    Architecture(
        "linear attention",
        lambda: Net(linear_attention, q=nn.Linear(4, 4), k=nn.Linear(4, 4), v=nn.Linear(4, 4), head=nn.Linear(4, 2)),
        0,
        sequences,
    ),
    Architecture("residual block", lambda: evaluated(flattened(196, Residual())), 4, images),
    Architecture("squeeze and excitation", lambda: flattened(100, nn.Conv2d(3, 4, 3), SqueezeExcite(4)), 0, images),
    Architecture("mixer", lambda: Mixer(), 4, sequences),
    Architecture("gated causal conv", lambda: flattened(12, Gated(), Gated()), 0, positions_last),
    Architecture("convolutional gru", lambda: ConvolutionalGRU(), 0, images),
    Architecture(
        "u-net",
        lambda: Net(unet, a=nn.Conv2d(3, 2, 3), b=nn.Conv2d(2, 2, 1), c=nn.Conv2d(4, 2, 1), head=nn.Linear(2, 2)),
        0,
        images,
    ),
    Architecture(
        "dueling", lambda: Net(dueling, body=nn.Linear(4, 5), value=nn.Linear(5, 1), advantage=nn.Linear(5, 3)), 0
    ),
    Architecture(
        "dense connections",
        lambda: Net(
            lambda net, x: net.c(torch.cat([x, net.a(x).relu(), net.b(torch.cat([x, net.a(x)], 1)).relu()], 1)),
            a=nn.Linear(4, 3),
            b=nn.Linear(7, 3),
            c=nn.Linear(10, 2),
        ),
        0,
    ),
    Architecture(
        "highway",
        lambda: Net(
            lambda net, x: net.c(torch.sigmoid(net.t(x)) * torch.relu(net.h(x)) + (1 - torch.sigmoid(net.t(x))) * x),
            t=nn.Linear(4, 4),
            h=nn.Linear(4, 4),
            c=nn.Linear(4, 2),
        ),
        0,
    ),
    Architecture(
        "maxout",
        lambda: Net(lambda net, x: net.b(net.a(x).unflatten(1, (3, 2)).amax(2)), a=nn.Linear(4, 6), b=nn.Linear(3, 2)),
        0,
    ),
    Architecture(
        "deep set",
        lambda: Net(lambda net, x: net.rho(net.phi(x).amax(1)), phi=mlp(4, 5, 5), rho=mlp(5, 4, 2)),
        0,
        sequences,
    ),
    Architecture(
        "siamese",
        lambda: Net(lambda net, x: (net.a(x[:, 0]) - net.a(x[:, 1])).abs() @ net.a[2].weight[:, :2], a=mlp(4, 5, 3)),
        1,
        sequences,
    ),
    Architecture(
        "adaptive softmax",
        lambda: Net(
            lambda net, x: net.s.log_prob(net.a(x)),
            a=nn.Linear(4, 4),
            s=nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2, 4], div_value=2.0),
        ),
        3,
        rows=True,
    ),
    Architecture(
        "euler steps",
        lambda: Net(
            lambda net, x: net.b(x + 0.1 * net.a(x) + 0.1 * net.a(x + 0.1 * net.a(x))),
            a=mlp(4, 6, 4),
            b=nn.Linear(4, 2),
        ),
        0,
    ),
    Architecture(
        "log-determinant of a matrix",
        lambda: Net(lambda net, x: net.a(x).unflatten(1, (2, 2)).matrix_exp().flatten(1), a=nn.Linear(4, 4)),
        0,
        vectors,
    ),
]
