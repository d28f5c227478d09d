"""What has no per-sample Jacobian is refused in one sentence; what has one is not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nsrl.projection import JacobianError, jacobian
from tests.projection.builders import Net, jacrev_matrix, mlp, normal

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def inputs() -> torch.Tensor:
    return normal(5, 4)


def refuse(module: nn.Module, match: str, **options) -> None:
    with pytest.raises(JacobianError, match=match) as caught:
        jacobian(module.double(), options.pop("inputs", inputs()), **options)
    assert "\n" not in str(caught.value)


def test_batch_norm_in_train_mode():
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    before = module[1].running_mean.clone()
    refuse(module, r"^1: batch normalisation in train mode .* module\.eval\(\)")
    assert torch.equal(module[1].running_mean, before.double())  # refused before the forward pass moved them


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.AlphaDropout(0.5), nn.Dropout1d(0.3)])
def test_dropout_in_train_mode(layer):
    refuse(nn.Sequential(nn.Linear(4, 3), layer, nn.Linear(3, 2)), r"^1: dropout in train mode .* module\.eval\(\)")


def test_dropout_without_effect_is_fine():
    module = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.0), nn.Linear(3, 2)).double()
    torch.testing.assert_close(jacobian(module, inputs()).dense(), jacrev_matrix(module, inputs()))


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: F.dropout(net.a(x), 0.5),
        lambda net, x: net.a(x) + torch.randn(5, 3, dtype=x.dtype),
        lambda net, x: net.a(x + 1e-3 * torch.randn_like(x)),
    ],
)
def test_random_outputs(function):
    refuse(Net(function, a=nn.Linear(4, 3)), "random")


@pytest.mark.parametrize(
    "mix",
    [
        lambda z: z - z.mean(0),
        lambda z: z - 1e-2 * z.mean(0),
        lambda z: z / z.norm(dim=0),
        lambda z: z.softmax(0),
        lambda z: z.flip(0),
        lambda z: z.sort(0).values,
        lambda z: z.cumsum(0),
    ],
)
@pytest.mark.parametrize("depth", ["hidden", "output"])
def test_outputs_that_mix_samples(mix, depth):
    body, head = mlp(4, 4, 4), nn.Linear(4, 2)
    refuse(
        Net(lambda net, x: net.b(mix(net.a(x))) if depth == "hidden" else mix(net.b(net.a(x))), a=body, b=head),
        "depend on other samples",
    )


def test_in_place_damage_of_an_input():
    def function(net, x):
        hidden = net.a(x)
        first = net.b(hidden)
        hidden.relu_()
        return first + net.c(hidden)

    frozen = nn.Linear(4, 2)
    frozen.weight.requires_grad_(False)  # so that autograd itself would not notice
    refuse(Net(function, a=nn.Linear(4, 4), b=frozen, c=nn.Linear(4, 2)), "in-place operation .* of a Linear")


@pytest.mark.parametrize("shape", [lambda z: z[:, 0], lambda z: z.unsqueeze(1), lambda z: z.sum()])
def test_outputs_that_are_no_matrix(shape):
    refuse(Net(lambda net, x: shape(net.a(x)), a=nn.Linear(4, 3)), r"shape \(samples, outputs\)")


def test_no_parameters():
    refuse(mlp(4, 3), "no trainable parameter", parameters=[])
    refuse(nn.Tanh(), "no trainable parameter")
    module = nn.Linear(4, 3).requires_grad_(False)
    refuse(module, "no trainable parameter")


def test_unknown_and_frozen_names():
    module = mlp(4, 3, 2)
    refuse(module, r"^2\.gain, nope: no trainable parameter", parameters=["nope", "0.weight", "2.gain"])
    module[0].weight.requires_grad_(False)
    refuse(module, r"^0\.weight: no trainable parameter", parameters=["0.weight"])


def test_autocast_is_switched_off_inside():
    """bfloat16 factors would give a Gram matrix that is off by percents (pitfall 4)."""
    module = mlp(4, 6, 3)
    expected = jacobian(module, inputs().float()).dense()
    with torch.autocast("cpu", torch.bfloat16):
        assert module(inputs().float()).dtype == torch.bfloat16
        result = jacobian(module, inputs().float())
        torch.testing.assert_close(result.dense(), expected, rtol=0, atol=0)
        assert torch.is_autocast_enabled("cpu")


def test_autocast_of_the_module_itself_is_refused():
    def half(net, x):
        with torch.autocast("cpu", torch.bfloat16):
            hidden = net.a(x)
        return net.b(hidden.float())

    with pytest.raises(JacobianError, match=r"Linear computes in torch\.bfloat16"):
        jacobian(Net(half, a=nn.Linear(4, 3), b=nn.Linear(3, 2)), inputs().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused(dtype):
    with pytest.raises(JacobianError, match="float32 copy"):
        jacobian(mlp(4, 6, 3).to(dtype), inputs().to(dtype))


def test_attention_computes_through_its_own_forward_again_afterwards():
    module = Net(lambda net, x: net.a(x, x, x)[0].mean(1), a=nn.MultiheadAttention(4, 2, batch_first=True)).double()
    x = normal(3, 5, 4)
    before = module(x)
    jacobian(module, x)
    assert "forward" not in vars(module.a)
    torch.testing.assert_close(module(x), before, rtol=0, atol=0)


def test_hooks_are_removed_when_the_forward_pass_fails():
    module = Net(lambda net, x: net.a(x) @ torch.zeros(7, 7, dtype=x.dtype), a=nn.Linear(4, 3)).double()
    with pytest.raises(RuntimeError):
        jacobian(module, inputs())
    assert all(not child._forward_hooks for child in module.modules())


@pytest.mark.parametrize("function", [lambda net, x: x[:, :3] * 2.0, lambda net, x: net.a(x).detach()])
def test_outputs_without_a_graph(function):
    refuse(Net(function, a=nn.Linear(4, 3)), "depend|grad")


def test_several_outputs():
    refuse(Net(lambda net, x: (net.a(x), x), a=nn.Linear(4, 3)), "shape|tensor")


def test_no_samples():
    refuse(mlp(4, 3), "sample", inputs=inputs()[:0])


def test_outputs_that_are_not_finite():
    refuse(Net(lambda net, x: net.a(x) * float("nan"), a=nn.Linear(4, 3)), "(?i)nan|finite")


def test_batch_norm_without_running_statistics():
    """Mixes samples in eval mode too."""
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2))
    refuse(module.eval(), "batch normalisation|other samples")


@pytest.mark.parametrize("layer", [nn.LSTM(4, 3, batch_first=True), nn.GRUCell(4, 3)], ids=["lstm", "gru cell"])
def test_layers_that_vmap_cannot_follow(layer):
    """Right or refused in a sentence, but not a stack trace from inside functorch."""

    def function(net, x):
        hidden = net.a(x)
        return net.b(hidden[0][:, -1] if isinstance(hidden, tuple) else hidden)

    module = Net(function, a=layer, b=nn.Linear(3, 2)).double()
    data = normal(5, 2, 4) if isinstance(layer, nn.LSTM) else inputs()
    try:
        result = jacobian(module, data)
    except JacobianError:
        return
    vector = normal(result.shape[0])
    torch.testing.assert_close(result.rmatvec(vector), gradient(module, data, vector))


def gradient(module: nn.Module, data: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
    outputs = module(data)
    grads = torch.autograd.grad(outputs, list(module.parameters()), cotangent.view_as(outputs))
    return torch.cat([grad.flatten() for grad in grads])


def test_prelu():
    module = nn.Sequential(nn.Linear(4, 3), nn.PReLU(3), nn.Linear(3, 2)).double()
    torch.testing.assert_close(jacobian(module, inputs()).dense(), jacrev_matrix(module, inputs()))


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_named_padding(padding):
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=padding), nn.Flatten(), nn.LazyLinear(2))
    data = normal(3, 3, 6, 6)
    module(data.float())
    module = module.double()
    torch.testing.assert_close(jacobian(module, data).dense(), jacrev_matrix(module, data))


def test_parameters_that_the_outputs_do_not_reach_cost_nothing():
    """A value net next to a policy whose forward vmap cannot follow: `one_hot` looks at its data."""

    def function(net, x):
        return net.a(F.one_hot(x, 5).double()) if net.training else net.value(x)

    module = Net(function, a=nn.Linear(5, 3), value=nn.Linear(5, 1)).double()
    states = torch.tensor([0, 3, 4, 1])
    module.value.weight.requires_grad_(False)
    module.value.bias.requires_grad_(False)
    expected = jacobian(module, states).dense()
    module.value.weight.requires_grad_(True)
    result = jacobian(module, states)
    torch.testing.assert_close(result.dense()[:, : expected.shape[1]], expected)
    assert not result.dense()[:, expected.shape[1] :].any()


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(normal(4))
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x * self.gain)


def test_a_submodule_under_two_names():
    """As in every SB3 policy, where features_extractor is pi_features_extractor too.

    `torch.func.functional_call` leaves its substitutes behind in such modules (torch 2.13).
    """
    extractor = Gain()
    module = Net(lambda net, x: net.a(x), a=extractor, b=extractor).double()
    before = dict(module.named_parameters())
    try:
        result = jacobian(module, inputs())
    finally:
        after = dict(module.named_parameters())
        assert all(after[name] is p and isinstance(p, nn.Parameter) for name, p in before.items())
    torch.testing.assert_close(result.dense(), jacrev_matrix(module, inputs()))
