"""Every batch is held against autograd: nothing depends on which batch came first, and NaN is never right."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from nsrl.projection import JacobianError, StackedJacobian, jacobian
from nsrl.projection.jacobians.blocks import DenseBlock
from nsrl.projection.jacobians.verification import Probe, refuse_dependence, refuse_mixing
from tests.projection.builders import Net, jacrev_matrix, mlp, normal, rows_matrix

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def inputs(samples: int = 4, seed: int = 0) -> Tensor:
    return normal(samples, 4, seed=seed)


def near(module: nn.Module, data, **options) -> None:
    result = jacobian(module, data, **options)
    torch.testing.assert_close(result.dense(), rows_matrix(module, data), **EXACT)
    rows = normal(result.shape[0], seed=3)
    torch.testing.assert_close(result.rmatvec(rows), rows_matrix(module, data).T @ rows, **EXACT)


def refuse(module: nn.Module, data, match: str, **options) -> None:
    with pytest.raises(JacobianError, match=match) as caught:
        jacobian(module, data, **options)
    assert "\n" not in str(caught.value)


# -- the use of a weight depends on the batch -------------------------------------------------------------------------


def sorted_by_size(net: Net, x: Tensor) -> Tensor:
    """In order already, or not: the same calls, on the same shapes."""
    order = x[:, 0].argsort()
    return net.b(torch.tanh(net.a(x[order])))[order.argsort()]


def outside_for_some(net: Net, x: Tensor) -> Tensor:
    return net.b(torch.tanh(net.a(x))) + (x[:, :1] > 1.0) * F.linear(x.sin(), net.b.weight[:, :4])


def one_expert_or_two(net: Net, x: Tensor) -> Tensor:
    out = torch.zeros(len(x), 2, dtype=x.dtype)
    for expert, rows in ((net.a, x[:, 0] <= 0), (net.b, x[:, 0] > 0)):
        if rows.any():
            out = out.index_put((rows.nonzero().flatten(),), expert(x[rows]))
    return out


BATCHES = {
    "sorted": (sorted_by_size, {"a": (4, 5), "b": (5, 2)}),
    "outside": (outside_for_some, {"a": (4, 5), "b": (5, 2)}),
    "experts": (one_expert_or_two, {"a": (4, 2), "b": (4, 2)}),
}


def changing(name: str) -> tuple[Net, list[Tensor]]:
    """A module, and batches of one size of which the first uses every layer in the ordinary way."""
    torch.manual_seed(0)
    function, layers = BATCHES[name]
    module = Net(function, **{layer: nn.Linear(*sizes) for layer, sizes in layers.items()}).double()
    batches = [inputs(4, seed) for seed in range(3)]
    first = batches[0].clone()
    first[:, 0] = -first[:, 0].abs().sort(descending=True).values.clamp_min(0.1)  # ascending, and none above zero
    return module, [first, *batches]


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("name", BATCHES)
def test_later_batches_of_the_same_size(name, check):
    module, batches = changing(name)
    assert not any(isinstance(block, DenseBlock) for block in jacobian(module, batches[0]).blocks)
    for batch in batches:
        near(module, batch, check=check)


def test_gram_of_batches_that_use_a_layer_differently():
    """One part has the weight in factors, the other materialised."""
    module, batches = changing("sorted")
    stack = StackedJacobian([jacobian(module, batch) for batch in batches])
    dense = torch.cat([rows_matrix(module, batch) for batch in batches])
    torch.testing.assert_close(stack.gram(), dense @ dense.T, **EXACT)
    torch.testing.assert_close(stack.column_squares(), dense.square().sum(0), **EXACT)


PIECES = {
    "groups of a conv": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(36, 2)),
        "0.weight",
        (4, 5, 5),
    ),
    "thirds of an attention": (
        lambda: Net(
            lambda net, x: net.b(net.a(x, x, x)[0].mean(1)),
            b=nn.Linear(4, 2),
            a=nn.MultiheadAttention(4, 2, batch_first=True),
        ),
        "a.in_proj_weight",
        (5, 4),
    ),
}


@pytest.mark.parametrize("name", PIECES)
def test_a_dense_block_meets_one_in_pieces(name):
    build, dense, shape = PIECES[name]
    torch.manual_seed(0)
    module = build().double()
    x, y = normal(3, *shape), normal(2, *shape, seed=1)
    here, there = jacobian(module, x), jacobian(module, y, dense=[dense])
    expected = jacrev_matrix(module, x) @ jacrev_matrix(module, y).T
    torch.testing.assert_close(here.cross_gram(there), expected, **EXACT)
    torch.testing.assert_close(there.cross_gram(here), expected.T, **EXACT)
    scaled, fitted = StackedJacobian([here, there]).scaled(normal(here.shape[1], seed=4).exp())
    rows = torch.cat([jacrev_matrix(module, x), jacrev_matrix(module, y)]) * fitted
    torch.testing.assert_close(scaled.gram(), rows @ rows.T, **EXACT)


# -- check=False ------------------------------------------------------------------------------------------------------


def hooked(module: nn.Sequential) -> nn.Module:
    module[0].register_forward_hook(lambda layer, args, output: 2.0 * output)
    return module


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize(
    "build",
    [
        lambda: Net(lambda net, x: net.a(x) + F.linear(x.sin(), net.a.weight), a=nn.Linear(4, 3)),
        lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)),
        lambda: hooked(mlp(4, 3, 2)),
        lambda: Net(lambda net, x: net.a(x) * net.a.bias.sum(), a=nn.Linear(4, 3)),
    ],
    ids=["outside", "weight norm", "hook", "bias outside"],
)
def test_an_unchecked_jacobian_is_right_all_the_same(build):
    torch.manual_seed(0)
    near(build().double(), inputs(), check=False)


def test_unchecked_means_without_further_evaluations():
    calls = []

    def forward(module, x):
        calls.append(len(x))
        return module(x)

    jacobian(mlp(4, 5, 2).double(), inputs(), forward=forward, check=False)
    assert calls == [4]
    jacobian(mlp(4, 5, 2).double(), inputs(), forward=forward)
    assert calls == [4] * 4


# -- NaN --------------------------------------------------------------------------------------------------------------


def test_nan_in_factors_is_wrong():
    """`error > allowed` lets NaN pass."""
    module = nn.Linear(4, 3).double()
    x = inputs()
    outputs = module(x)
    seeds = torch.eye(3).double().expand(4, -1, -1)
    probe = Probe(outputs, seeds, dict(module.named_parameters()), {"weight": (0, 12), "bias": (12, 15)}, torch.float64)
    values = jacrev_matrix(module, x).view(4, 3, 15)
    assert probe.wrong([DenseBlock(values, (0, 15))], ["weight", "bias"]) == []
    for broken in (torch.nan, torch.inf, 0.5):
        changed = values.clone()
        changed[2, 1, 13] = broken
        assert probe.wrong([DenseBlock(changed, (0, 15))], ["weight", "bias"]) == ["bias"]


@pytest.mark.filterwarnings("ignore:std.. degrees of freedom")
def test_samples_mixed_in_a_way_that_is_nan_for_one_alone():
    """The standard deviation of one sample is NaN, so that half of the Jacobian was."""
    torch.manual_seed(0)
    module = Net(lambda net, x: net.b(net.a(x) / net.a(x).std(0)), a=nn.Linear(4, 3), b=nn.Linear(3, 2)).double()
    refuse(module, inputs(), "depend on other samples")


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: net.a(x) + net.w.sqrt(),
        lambda net, x: net.a(x) * (1.0 + net.w.pow(0.5)),
        lambda net, x: net.a(x) + torch.where(net.w > 0, net.w.log(), net.w),
    ],
    ids=["square root of zero", "power of zero", "branch not taken"],
)
def test_derivatives_that_are_not_finite(function):
    module = Net(function, a=nn.Linear(4, 3), w=nn.Parameter(torch.zeros(3))).double()
    assert torch.isfinite(module(inputs())).all()
    refuse(module, inputs(), "derivative of the outputs in w is NaN or infinite.*constant")


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number(scale):
    refuse(mlp(4, 3).double(), inputs(), "scale of the rows", scale=scale)


# -- samples that depend on each other --------------------------------------------------------------------------------


def last_state(layer: nn.RNNBase) -> Net:
    width = layer.hidden_size * (2 if layer.bidirectional else 1)
    return Net(lambda net, x: net.a(net.r(x)[0][:, -1]), r=layer, a=nn.Linear(width, 2)).double()


@pytest.mark.parametrize(
    "layer",
    [nn.LSTM(4, 3), nn.GRU(4, 3, 2), nn.RNN(4, 3), nn.LSTM(4, 3, bidirectional=True)],
    ids=["lstm", "gru", "rnn", "both ways"],
)
@pytest.mark.parametrize("samples", [2, 3, 6])
def test_the_batch_taken_for_time(layer, samples):
    refuse(last_state(copy.deepcopy(layer)), normal(samples, 3, 4), "depend on other samples.*batch_first=True")


def test_one_sample_has_no_other_to_depend_on():
    near(last_state(nn.LSTM(4, 3)), normal(1, 3, 4))


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: net.a((x - x.mean(0)) / x.std(0)),
        lambda net, x: net.a(x) if x.sum() > 0 else net.b(x),
        lambda net, x: net.a(x) @ net.b(x).T,
        lambda net, x: net.a(x / x.abs().max()),
        lambda net, x: net.a(x.flip(0)),
        lambda net, x: net.a(x + x[-1:]),
        lambda net, x: net.a(x.cumsum(0)),
        lambda net, x: net.a(x).detach() * x.norm() + net.a(x),
    ],
    ids=["standardised", "branch", "contrastive", "scaled", "reversed", "last", "summed", "detached"],
)
@pytest.mark.parametrize("samples", [2, 5, 8])
def test_mixing_that_no_gradient_shows(function, samples):
    """The parameters' derivative is that of the batch, but no row is a function of its own sample."""
    torch.manual_seed(0)
    module = Net(function, a=nn.Linear(4, 2), b=nn.Linear(4, 2)).double()
    refuse(module, normal(samples, 4, seed=2), "depend on other samples")


@pytest.mark.parametrize("samples", [2, 3, 4, 5, 9])
def test_every_pair_of_samples_is_told_apart(samples):
    """`refuse_mixing` sees that sample i depends on sample j, for every i and j."""
    x = normal(samples, 3)
    refuse_mixing(torch.sin, x, x.sin(), torch.float64)
    for i in range(samples):
        for j in set(range(samples)) - {i}:

            def mixed(x: Tensor, i: int = i, j: int = j) -> Tensor:
                out = x.sin()
                out[i] += 1e-6 * x[j]
                return out

            with pytest.raises(JacobianError, match="other samples"):
                refuse_mixing(mixed, x, mixed(x), torch.float64)


@pytest.mark.parametrize("samples", range(2, 18))
def test_what_the_two_evaluations_of_every_batch_see(samples):
    x = normal(samples, 3)
    refuse_dependence(torch.sin, x, x.sin(), torch.float64)
    for mix in (
        lambda x: x.flip(0),
        lambda x: x.roll(1, 0),
        lambda x: x.roll(-1, 0),
        lambda x: x.cumsum(0),
        lambda x: x + x[:1],
        lambda x: x + x[-1:],
        lambda x: x - 1e-3 * x.mean(0),
    ):
        with pytest.raises(JacobianError, match="other samples"):
            refuse_dependence(mix, x, mix(x), torch.float64)


def test_masked_outputs_do_not_hide_a_difference():
    """A logit of -1e4 is a thousand times larger than what tells two samples apart."""

    def masked(x: Tensor) -> Tensor:
        return torch.cat([x - 0.1 * x.mean(0), torch.full_like(x[:, :1], -1e4)], 1)

    x = normal(6, 3, dtype=torch.float32)
    with pytest.raises(JacobianError, match="other samples"):
        refuse_dependence(masked, x, masked(x), torch.float32)


def test_an_order_of_the_samples_that_the_module_insists_on():
    """Exchanged samples are no longer sorted by length, which packing demands: another exchange keeps the order."""

    def packed(net, data):
        x, lengths = data
        out = net.r(pack_padded_sequence(x, lengths, batch_first=True))[0]
        out, _ = pad_packed_sequence(out, batch_first=True)
        return net.a(out[torch.arange(len(x)), lengths - 1])

    def mixed(net, data):
        return packed(net, (data[0] - 0.1 * data[0].mean(0), data[1]))

    lengths = torch.tensor([3, 3, 2, 1, 1])
    torch.manual_seed(0)
    module = Net(packed, r=nn.GRU(4, 3, batch_first=True), a=nn.Linear(3, 2)).double()
    near(module, (normal(5, 3, 4), lengths))
    module.function = mixed
    refuse(module, (normal(5, 3, 4), lengths), "depend on other samples")


def test_rows_of_tokens_are_no_samples():
    """Three rows a sample: what belongs to which cannot be known, so only randomness is looked for."""
    torch.manual_seed(0)
    module = Net(
        lambda net, x: net.b(net.a(x, x, x)[0]).flatten(0, 1),
        b=nn.Linear(4, 2),
        a=nn.MultiheadAttention(4, 2, batch_first=True),
    ).double()
    near(module, normal(4, 3, 4))


def test_packed_sequences_as_inputs():
    torch.manual_seed(0)
    module = Net(lambda net, x: net.a(net.r(x)[1][0][-1]), r=nn.LSTM(4, 3), a=nn.Linear(3, 2)).double()
    near(module, pack_padded_sequence(normal(4, 3, 4), torch.tensor([1, 3, 2, 1]), True, enforce_sorted=False))
