"""Architectures whose use of a layer depends on the data, or that autograd alone can follow."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from tests.projection.architecture import Architecture, images, sequences, tokens
from tests.projection.builders import Net, mlp, normal


def padded(samples: int, seed: int) -> dict[str, Tensor]:
    lengths = torch.randint(1, 4, (samples,), generator=torch.Generator().manual_seed(seed))
    return {"x": sequences(samples, seed), "lengths": lengths}


def descending(samples: int, seed: int) -> dict[str, Tensor]:
    inputs = padded(samples, seed)
    return {"x": inputs["x"], "lengths": inputs["lengths"].sort(descending=True).values}


def pair(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    return normal(samples, 4, seed=seed), normal(samples, 3, seed=seed + 100)


def graphs(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    edges = (normal(samples, 3, 3, seed=seed + 100) > 0).double()
    return sequences(samples, seed), edges + edges.transpose(1, 2)


def experts(count: int = 3) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(4, 3) for _ in range(count))


def routed_to_one(net: Net, x: Tensor) -> Tensor:
    """Every expert sees its own samples only: as many as there are, now and then all of them in order."""
    gates = net.gate(x).softmax(-1)
    weight, chosen = gates.max(-1)
    out = x.new_zeros(len(x), 3)
    for index, expert in enumerate(net.experts):
        rows = (chosen == index).nonzero().flatten()
        if len(rows):
            out = out.index_add(0, rows, expert(x[rows]) * weight[rows, None])
    return out


def routed_to_two(net: Net, x: Tensor) -> Tensor:
    scores, chosen = net.gate(x).topk(2, -1)
    weights = scores.softmax(-1)
    everything = torch.stack([expert(x) for expert in net.experts], 1)
    picked = everything.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 3))
    return (weights.unsqueeze(-1) * picked).sum(1)


def all_to_one(net: Net, x: Tensor) -> Tensor:
    """All samples go through one expert, in another order: the layer's call looks like any other."""
    order = x[:, 0].argsort()
    return net.a(net.b(x[order]).tanh())[order.argsort()]


def per_sample_branch(net: Net, x: Tensor) -> Tensor:
    return torch.where(x[:, :1] > 0, net.a(x), net.b(x))


def branch_on_each_sample(net: Net, x: Tensor) -> Tensor:
    return torch.cat([net.a(row[None]) if row[0] > 0 else net.b(row[None]).sin() for row in x])


def early_exit(net: Net, x: Tensor) -> Tensor:
    hidden = torch.tanh(net.a(x))
    sure = net.b(hidden).amax(-1) > 0.3
    deeper = hidden.clone()
    deeper[~sure] = torch.tanh(net.c(hidden[~sure]))
    return net.b(deeper)


def one_key_a_sample(net: Net, x: Tensor) -> Tensor:
    keys = ["left" if value > 0 else "right" for value in x[:, 0].tolist()]
    return torch.stack([net.branches[key](row) for key, row in zip(keys, x, strict=True)])


def last_of_each(net: Net, inputs: dict[str, Tensor], enforce_sorted: bool = False) -> Tensor:
    lengths = inputs["lengths"]
    packed = pack_padded_sequence(inputs["x"], lengths.cpu(), batch_first=True, enforce_sorted=enforce_sorted)
    out, _ = pad_packed_sequence(net.r(packed)[0], batch_first=True)
    return net.a(out[torch.arange(len(lengths)), lengths - 1])


def linear_on_packed(net: Net, inputs: dict[str, Tensor]) -> Tensor:
    packed = pack_padded_sequence(inputs["x"], inputs["lengths"].cpu(), batch_first=True, enforce_sorted=False)
    moved = packed._replace(data=torch.tanh(net.a(packed.data)))
    return net.b(pad_packed_sequence(moved, batch_first=True)[0].sum(1))


def unrolled(net: Net, x: Tensor) -> Tensor:
    hidden = x.new_zeros(len(x), 3)
    state = hidden
    for position in x.unbind(1):
        hidden, state = net.r(position, (hidden, state))
    return net.a(hidden)


def fixed_point(net: Net, x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(5):
        z = torch.tanh(net.a(z) + x)
    return net.b(z)


def until_short(net: Net, x: Tensor) -> Tensor:
    """As many steps as each sample needs: halted samples are carried along."""
    z, going = x, torch.ones(len(x), 1, dtype=torch.bool, device=x.device)
    for _ in range(4):
        z = torch.where(going, 0.5 * torch.tanh(net.a(z)), z)
        going = z.norm(dim=1, keepdim=True) > 0.4
        if not going.any():
            break
    return net.b(z)


class Cube(torch.autograd.Function):
    """Without a rule for vmap."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, slope):
        return 3 * ctx.saved_tensors[0] ** 2 * slope


class Rounded(torch.autograd.Function):
    """Straight through, and with a rule for vmap."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, slope):
        return slope


def adapted(net: Net, x: Tensor) -> Tensor:
    """One inner step on a support set first (MAML): the layer is called with weights that are not its own."""
    weights = dict(net.a.named_parameters())
    loss = (functional_call(net.a, weights, (net.support,)) - 1.0).square().mean()
    slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    moved = {name: value - 0.1 * slope for (name, value), slope in zip(weights.items(), slopes, strict=True)}
    return functional_call(net.a, moved, (x,))


def with_support(net: Net) -> Net:
    net.register_buffer("support", normal(4, 4, seed=9))  # as many as samples
    return net


def gradient_field(net: Net, x: Tensor) -> Tensor:
    """The slope of an energy in the inputs: weights act in a backward pass too."""
    x = x.detach().requires_grad_(True)
    return torch.autograd.grad(net.a(x).tanh().square().sum(), x, create_graph=True)[0]


def overwriting(net: Net, x: Tensor) -> Tensor:
    x.mul_(2.0).add_(1.0)
    return net.a(x)


def assigned(net: Net, x: Tensor) -> Tensor:
    hidden = net.a(x).clone()
    hidden[:, 0] = hidden[:, 1] * 2
    hidden += 1.0
    return net.b(hidden.mul_(3.0))


def message_passing(net: Net, inputs: tuple[Tensor, Tensor]) -> Tensor:
    x, edges = inputs
    for layer in net.layers:
        x = torch.relu(layer(edges @ x))
    return net.head(x.sum(1))


def generated_weights(net: Net, x: Tensor) -> Tensor:
    weights = net.make(torch.tanh(x)).view(-1, 2, 4)
    return torch.bmm(weights, x.unsqueeze(-1)).squeeze(-1)


def loop(layer: nn.Module) -> Net:
    return Net(lambda net, x: torch.stack([net.a(row) for row in x]), a=layer)


def recurrent(layer: nn.Module, width: int, last: int = -1) -> Net:
    return Net(lambda net, x: net.a(net.r(x)[0][:, last]), r=layer, a=nn.Linear(width, 2))


def time_first(layer: nn.Module, width: int) -> Net:
    return Net(lambda net, x: net.a(net.r(x.transpose(0, 1).contiguous())[0][-1]), r=layer, a=nn.Linear(width, 2))


ROUTED = [
    Architecture(
        "mixture of experts, one each",
        lambda: Net(routed_to_one, gate=nn.Linear(4, 3), experts=experts()),
        6,
        rows=True,
    ),
    Architecture(
        "mixture of experts, one expert for all",
        lambda: Net(routed_to_one, gate=nn.Linear(4, 1), experts=experts(1)),
        2,
    ),
    Architecture(
        "mixture of experts, two each", lambda: Net(routed_to_two, gate=nn.Linear(4, 3), experts=experts()), 0
    ),
    Architecture("sorted and unsorted", lambda: Net(all_to_one, a=nn.Linear(4, 3), b=nn.Linear(4, 4)), 4),
    Architecture(
        "two branches, both computed", lambda: Net(per_sample_branch, a=nn.Linear(4, 3), b=nn.Linear(4, 3)), 0
    ),
    Architecture(
        "a branch for each sample",
        lambda: Net(branch_on_each_sample, a=nn.Linear(4, 3), b=nn.Linear(4, 3)),
        4,
        rows=True,
    ),
    Architecture(
        "early exit", lambda: Net(early_exit, a=nn.Linear(4, 5), b=nn.Linear(5, 2), c=nn.Linear(5, 5)), 4, rows=True
    ),
    Architecture(
        "a module of a dictionary for each sample",
        lambda: Net(one_key_a_sample, branches=nn.ModuleDict({"left": nn.Linear(4, 3), "right": mlp(4, 4, 3)})),
        6,
        rows=True,
    ),
    Architecture("single rows, as many as the layer is wide", lambda: loop(mlp(4, 4, 4)), 4),
    Architecture(
        "single rows of positions",
        lambda: Net(lambda net, x: torch.stack([net.a(one).mean(0) for one in x]), a=nn.Linear(4, 4)),
        2,
        lambda samples, seed: normal(samples, samples, 4, seed=seed),
    ),
    Architecture(
        "single images",
        lambda: Net(
            lambda net, x: net.b(torch.stack([net.a(one) for one in x]).flatten(1)),
            a=nn.Conv2d(3, 4, 3),
            b=nn.Linear(100, 2),
        ),
        2,
        images,
    ),
    Architecture(
        "packed lstm",
        lambda: Net(last_of_each, r=nn.LSTM(4, 3, batch_first=True), a=nn.Linear(3, 2)),
        4,
        padded,
        rows=True,
    ),
    Architecture(
        "packed gru, sorted by length",
        lambda: Net(
            lambda net, inputs: last_of_each(net, inputs, True), r=nn.GRU(4, 3, batch_first=True), a=nn.Linear(3, 2)
        ),
        4,
        descending,
        rows=True,
    ),
    Architecture(
        "linear on packed sequences",
        lambda: Net(linear_on_packed, a=nn.Linear(4, 3), b=nn.Linear(3, 2)),
        2,
        padded,
        rows=True,
    ),
    Architecture(
        "lstm of two layers, both ways",
        lambda: recurrent(nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True), 6),
        16,
        sequences,
    ),
    Architecture(
        "lstm without bias, projected",
        lambda: recurrent(nn.LSTM(4, 3, bias=False, proj_size=2, batch_first=True), 2),
        3,
        sequences,
    ),
    Architecture("lstm, time first", lambda: time_first(nn.LSTM(4, 3), 3), 4, sequences),
    Architecture(
        "gru of two layers, time first, both ways",
        lambda: time_first(nn.GRU(4, 3, 2, bidirectional=True), 6),
        16,
        sequences,
    ),
    Architecture(
        "gru both ways, first step",
        lambda: recurrent(nn.GRU(4, 3, batch_first=True, bidirectional=True), 6, 0),
        8,
        sequences,
    ),
    Architecture("relu rnn", lambda: recurrent(nn.RNN(4, 3, nonlinearity="relu", batch_first=True), 3), 4, sequences),
    Architecture("lstm cell, unrolled", lambda: Net(unrolled, r=nn.LSTMCell(4, 3), a=nn.Linear(3, 2)), 4, sequences),
    Architecture("fixed point", lambda: Net(fixed_point, a=nn.Linear(4, 4), b=nn.Linear(4, 2)), 0),
    Architecture(
        "as many steps as needed", lambda: Net(until_short, a=nn.Linear(4, 4), b=nn.Linear(4, 2)), 2, rows=True
    ),
    Architecture(
        "checkpointed",
        lambda: Net(lambda net, x: net.b(checkpoint(net.a, x, use_reentrant=False)), a=mlp(4, 5, 4), b=nn.Linear(4, 2)),
        0,
        rows=True,
    ),
    Architecture(
        "own backward pass",
        lambda: Net(
            lambda net, x: net.b(Cube.apply(net.a(x)) * net.g),
            a=nn.Linear(4, 3),
            b=nn.Linear(3, 2),
            g=nn.Parameter(normal(3)),
        ),
        1,
        rows=True,
    ),
    Architecture(
        "straight through",
        lambda: Net(
            lambda net, x: net.b(Rounded.apply(net.a(x)) * net.g),
            a=nn.Linear(4, 3),
            b=nn.Linear(3, 2),
            g=nn.Parameter(normal(3)),
        ),
        1,
    ),
    Architecture(
        "straight through by detaching",
        lambda: Net(
            lambda net, x: net.b(net.a(x) + (net.a(x).sign() - net.a(x)).detach()), a=nn.Linear(4, 3), b=nn.Linear(3, 2)
        ),
        0,
    ),
    Architecture("adapted by an inner step", lambda: with_support(Net(adapted, a=nn.Linear(4, 3))), 2, rows=True),
    Architecture("gradient field", lambda: Net(gradient_field, a=nn.Linear(4, 5)), 2, rows=True),
    Architecture(
        "a layer under other weights",
        lambda: Net(
            lambda net, x: net.b(
                functional_call(net.a, {"weight": 2.0 * net.a.weight, "bias": net.a.bias.exp()}, (x,))
            ),
            a=nn.Linear(4, 4),
            b=nn.Linear(4, 2),
        ),
        2,
    ),
    Architecture("inputs overwritten", lambda: Net(overwriting, a=nn.Linear(4, 3)), 0, rows=True),
    Architecture("assigned in place", lambda: Net(assigned, a=nn.Linear(4, 3), b=nn.Linear(3, 2)), 0),
    Architecture(
        "pair of inputs",
        lambda: Net(
            lambda net, inputs: net.a(inputs[0]).tanh() * net.b(inputs[1]), a=nn.Linear(4, 2), b=nn.Linear(3, 2)
        ),
        0,
        pair,
    ),
    Architecture(
        "message passing",
        lambda: Net(message_passing, layers=nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 3)]), head=nn.Linear(3, 2)),
        0,
        graphs,
    ),
    Architecture("weights made from the sample", lambda: Net(generated_weights, make=nn.Linear(4, 8)), 0),
    Architecture(
        "attention over tokens with one loop a head",
        lambda: Net(
            lambda net, x: net.out(
                torch.cat(
                    [
                        F.scaled_dot_product_attention(q(net.e(x)), k(net.e(x)), v(net.e(x)))
                        for q, k, v in zip(net.q, net.k, net.v, strict=True)
                    ],
                    -1,
                ).mean(1)
            ),
            e=nn.Embedding(6, 4),
            q=nn.ModuleList(nn.Linear(4, 2) for _ in range(2)),
            k=nn.ModuleList(nn.Linear(4, 2) for _ in range(2)),
            v=nn.ModuleList(nn.Linear(4, 2) for _ in range(2)),
            out=nn.Linear(4, 2),
        ),
        0,
        tokens,
    ),
    Architecture(
        "residual block used again",
        lambda: Net(lambda net, x: net.b(x + net.a(x) + net.a(x + net.a(x))), a=mlp(4, 5, 4), b=nn.Linear(4, 2)),
        0,
    ),
    Architecture(
        "part of it without gradients",
        lambda: Net(lambda net, x: net.b(net.a(x) + _constant(net.a, x.sin())), a=nn.Linear(4, 4), b=nn.Linear(4, 2)),
        0,
    ),
]


@torch.no_grad()
def _constant(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)
