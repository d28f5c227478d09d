"""Modules that do odd things to their layers, inputs and gradients: right, or refused in a sentence."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from nsrl.projection import JacobianError, jacobian
from nsrl.projection.jacobians.blocks import DenseBlock
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


# -- layers that only some ways can follow ----------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [2, 3, 4, 5])
def test_prelu_with_as_many_outputs_as_samples(samples):
    """torch's vmapped rule for it is wrong there, so that it takes one backward pass a row."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.PReLU(4, init=0.3), nn.Linear(4, 4)).double()
    near(module, inputs(samples))


@pytest.mark.parametrize("width", [3, 4, 5])
def test_a_layer_called_on_single_rows(width):
    module = Net(lambda net, x: torch.stack([net.a(row) for row in x]), a=nn.Linear(width, width)).double()
    near(module, normal(4, width))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padding_in_a_transformer_encoder():
    """Without gradients torch takes another path, which makes zeros of the padding: the module is not random."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    module = (
        Net(
            lambda net, x: net.b(net.a(x, src_key_padding_mask=MASK[: len(x)]).sum(1)),
            a=nn.TransformerEncoder(layer, 2),
            b=nn.Linear(4, 2),
        )
        .double()
        .eval()
    )
    x = normal(4, 3, 4)
    with torch.no_grad():
        quick = module(x)
    assert not torch.allclose(quick, module(x))
    near(module, x)


MASK = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 1], [0, 0, 0]]).bool()


class Stored(nn.Module):
    """Keeps what it computed, as modules with auxiliary losses do."""

    def __init__(self):
        super().__init__()
        self.a, self.gain, self.last = mlp(4, 3, 2), nn.Parameter(normal(2)), None
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        self.last = self.a(x) * self.gain
        return self.last


def test_nothing_of_a_transform_is_left_behind():
    module = Stored().double()
    near(module, inputs())
    assert module.last.shape == (4, 2) and torch.isfinite(module.last).all()
    copy.deepcopy(module.calls)  # a tensor of a transform cannot be copied
    assert isinstance(module.gain, nn.Parameter)


def test_inputs_are_left_alone():
    def overwriting(net, x):
        x.mul_(2.0)
        return net.a(x)

    module, x = Net(overwriting, a=nn.Linear(4, 3)).double(), inputs()
    before = x.clone()
    near(module, x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("compiled", ["whole", "part"])
def test_compiled_modules_keep_their_factors(compiled):
    torch.manual_seed(0)
    module = mlp(4, 5, 3).double()
    x = inputs()
    expected = jacrev_matrix(module, x)
    if compiled == "whole":
        module = torch.compile(module, backend="aot_eager")
    else:
        module[0] = torch.compile(module[0], backend="aot_eager")
    module(x).sum().backward()
    result = jacobian(module, x)
    torch.testing.assert_close(result.dense(), expected, **EXACT)
    assert not any(isinstance(block, DenseBlock) for block in result.blocks)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda module: torch.jit.trace(module, inputs())])
def test_scripted_modules(make):
    torch.manual_seed(0)
    near(Net(lambda net, x: net.b(net.a(x)), a=make(mlp(4, 5, 3).double()), b=nn.Linear(3, 2).double()), inputs())
    near(make(mlp(4, 5, 3).double()), inputs())


def test_a_view_of_a_parameter_that_was_taken_once():
    """No substitute reaches it: only autograd does."""
    module = Net(lambda net, x: F.linear(net.a(x), net.part), a=nn.Linear(4, 3).double(), w=nn.Parameter(normal(3, 3)))
    module.part = module.w[:2]
    near(module, inputs())


def test_a_layer_with_a_forward_of_its_own():
    module = mlp(4, 5, 2).double()
    plain = module[0].forward
    module[0].forward = lambda x: 2.0 * plain(x)
    near(module, inputs())
    attention = Net(
        lambda net, x: net.b(net.a(x, x, x)[0].mean(1)),
        b=nn.Linear(4, 2),
        a=nn.MultiheadAttention(4, 2, batch_first=True),
    ).double()
    own = attention.a.forward
    attention.a.forward = lambda *args: (2.0 * own(*args)[0], None)
    near(attention, normal(3, 5, 4))


def test_a_module_inside_inference_mode():
    module = mlp(4, 5, 2).double()
    with torch.inference_mode():
        result = jacobian(module, inputs())
    torch.testing.assert_close(result.dense(), jacrev_matrix(module, inputs()), **EXACT)


def test_float64_inputs_of_a_float32_module():
    """The factors are no better than the coarsest of what they are made of."""
    torch.manual_seed(0)
    module = Net(
        lambda net, x: net.b(net.a(x.float()).double()) * net.g,
        a=nn.Linear(4, 3),
        b=nn.Linear(3, 2).double(),
        g=nn.Parameter(normal(2)),
    )
    result = jacobian(module, inputs())
    assert result.outputs.dtype == result.dense().dtype == torch.float32
    expected = jacrev_matrix(module, inputs())
    assert float((result.dense() - expected).norm()) <= 1e-6 * float(expected.norm())
    assert result.matvec(normal(result.shape[1])).dtype == torch.float32


# -- gradients that are no derivative ---------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", [lambda g: 0.5 * g, lambda g: g.clamp(-0.1, 0.1)], ids=["scaled", "clipped"])
def test_hooks_of_parameters_do_not_reach_the_jacobian(hook):
    module = Net(
        lambda net, x: torch.stack([net.a(row) for row in x]) * net.g, a=nn.Linear(4, 4), g=nn.Parameter(normal(4))
    ).double()
    expected = rows_matrix(module, inputs())
    handle = module.a.weight.register_hook(hook)
    torch.testing.assert_close(jacobian(module, inputs()).dense(), expected, **EXACT)
    (gradient,) = torch.autograd.grad(module(inputs()).sum(), module.a.weight)
    torch.testing.assert_close(gradient, hook(expected.sum(0)[4:20].view(4, 4)))  # the hook is back
    handle.remove()
    torch.testing.assert_close(jacobian(module, inputs()).dense(), expected, **EXACT)


def clipped(net: Net, x: Tensor) -> Tensor:
    hidden = net.a(x)
    hidden.register_hook(lambda g: g.clamp(-0.1, 0.1))
    return net.b(hidden)


def test_a_backward_pass_that_is_not_linear():
    refuse(Net(clipped, a=nn.Linear(4, 3), b=nn.Linear(3, 2)).double(), inputs(), "a.weight.*not linear")


def test_reentrant_checkpoints_hide_their_parameters():
    def function(net, x):
        return net.b(checkpoint(net.a, x.clone().requires_grad_(), use_reentrant=True))

    refuse(Net(function, a=mlp(4, 5, 4), b=nn.Linear(4, 2)).double(), inputs(), "use_reentrant=False")


@pytest.mark.parametrize(
    "layer", [nn.Embedding(6, 4, scale_grad_by_freq=True), nn.EmbeddingBag(6, 4, mode="sum", scale_grad_by_freq=True)]
)
def test_gradients_that_are_scaled_by_frequency(layer):
    tokens = torch.tensor([[1, 1, 2], [1, 3, 3], [0, 1, 5]])
    module = Net(lambda net, x: net.a(net.e(x).view(len(x), -1)), e=copy.deepcopy(layer), a=nn.LazyLinear(2)).double()
    module(tokens)
    refuse(module, tokens, "scale_grad_by_freq")


def test_parameters_without_a_real_column():
    def product(net, x):
        return (net.a(x).to(torch.complex128) @ net.w).real

    weights = nn.Parameter(torch.randn(3, 2, dtype=torch.complex128))
    refuse(Net(product, a=nn.Linear(4, 3).double(), w=weights), inputs(), "w is complex.*view_as_complex")
    half = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    module = Net(lambda net, x: net.a(x) * net.g.double(), a=nn.Linear(4, 3).double(), g=half)
    refuse(module, inputs(), "g is .*float32")
    refuse(nn.Sequential(nn.LazyLinear(3)), inputs(), "has no shape yet")
    with torch.inference_mode():
        module = nn.Linear(4, 3).double()
    refuse(module, inputs(), "inference mode")


def test_weights_of_a_layer_that_are_computed_by_the_module():
    """A fast weight that happens to be the layer's own twice over: only the numbers tell."""
    module = Net(lambda net, x: functional_call(net.a, {"weight": 2.0 * net.a.weight}, (x,)), a=nn.Linear(4, 3))
    near(module.double(), inputs())


class OnlyOnce(torch.autograd.Function):
    """Frees what it needs, as fused kernels with donated buffers do."""

    @staticmethod
    def forward(ctx, x):
        ctx.left = 1
        return x.clone()

    @staticmethod
    def backward(ctx, slope):
        if not ctx.left:
            raise RuntimeError("the buffers of this backward pass are gone\nand more lines of explanation")
        ctx.left -= 1
        return slope


def test_a_backward_pass_that_works_once():
    module = Net(lambda net, x: OnlyOnce.apply(net.a(x)), a=nn.Linear(4, 3)).double()
    refuse(module, inputs(), "cannot differentiate the outputs: the buffers .* are gone; .*retain_graph=True")


def test_parameters_that_are_known_to_be_dense():
    module = mlp(4, 5, 2).double()
    result = jacobian(module, inputs(), dense=iter(["2.weight"]))
    assert result.recomputed == ("2.weight",)
    torch.testing.assert_close(result.dense(), jacrev_matrix(module, inputs()), **EXACT)
