"""The empirical kernel against `torch.func.jacrev`, in all its kinds and batches; refusals."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.policies import ActorCriticPolicy, MultiInputActorCriticPolicy
from torch import Tensor, nn

from nsrl.errors import NsrlError
from nsrl.ntk import empirical_ntk, kernels, ntk_tiles
from nsrl.projection import JacobianError, jacobian
from nsrl.rl.policies.actor_critic import policy_outputs
from tests.projection.architecture import Architecture
from tests.projection.architectures import ARCHITECTURES
from tests.projection.builders import Net, jacrev_matrix, mlp, normal, rows_matrix

ODD = (
    "one linear used twice",
    "tied weights",
    "free parameters",
    "positions before samples",
    "embedding",
    "attention",
    "conv used twice",
    "lstm",
    "language model, tied head",
    "batch norm in eval mode",
    "conv and group norm",
    "low-rank adapter",
)


def build() -> nn.Module:
    return mlp(3, 8, 2).double()


def test_full_kernel_is_the_gram_of_jacrev_with_rows_sample_major():
    model, x = build(), normal(5, 3)
    oracle = jacrev_matrix(model, x)
    kernel = empirical_ntk(model, x)
    assert kernel.shape == (10, 10) and kernel.dtype == torch.float64
    torch.testing.assert_close(kernel, oracle @ oracle.T, rtol=1e-12, atol=1e-12)
    rows = oracle.view(5, 2, -1)
    tutorial = torch.einsum("naf,mbf->nmab", rows, rows)
    torch.testing.assert_close(kernel.view(5, 2, 5, 2).transpose(1, 2), tutorial, rtol=1e-12, atol=1e-12)


def test_cross_kernel_has_test_rows_and_training_columns():
    model, test, train = build(), normal(3, 3, seed=1), normal(5, 3, seed=2)
    oracle = jacrev_matrix(model, test) @ jacrev_matrix(model, train).T
    torch.testing.assert_close(empirical_ntk(model, test, train), oracle, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("batch_size", [None, 1, 2, 3])
def test_trace_and_diagonal_are_the_blocks_of_the_full_kernel(others, batch_size):
    model, x1, x2 = build(), normal(5, 3, seed=1), normal(4, 3, seed=2) if others else None
    n2 = 4 if others else 5
    blocks = empirical_ntk(model, x1, x2).view(5, 2, n2, 2)
    diagonal = empirical_ntk(model, x1, x2, "diagonal", batch_size=batch_size)
    trace = empirical_ntk(model, x1, x2, "trace", batch_size=batch_size)
    assert diagonal.shape == (2, 5, n2) and trace.shape == (5, n2)
    torch.testing.assert_close(diagonal, torch.einsum("nomo->onm", blocks), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(trace, torch.einsum("nomo->nm", blocks), rtol=1e-12, atol=1e-12)


@given(n1=st.integers(1, 7), n2=st.integers(0, 7), batch=st.integers(1, 8), seed=st.integers(0, 99))
def test_batches_do_not_matter(n1, n2, batch, seed):
    torch.manual_seed(seed)
    model, x1, x2 = build(), normal(n1, 3, seed=seed), normal(n2, 3, seed=seed + 1) if n2 else None
    whole, pieces = empirical_ntk(model, x1, x2), empirical_ntk(model, x1, x2, batch_size=batch)
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-12)
    if x2 is None:
        assert torch.equal(pieces, pieces.T)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a.name in ODD], ids=str)
def test_any_module_in_batches(architecture: Architecture):
    model = architecture.build().double()
    x = architecture.inputs(5, 7)
    x = x.double() if x.is_floating_point() else x
    oracle = jacrev_matrix(model, x)
    # batches of 3, as many as there are positions, and a rest of 2
    kernel = empirical_ntk(model, x, batch_size=3)
    torch.testing.assert_close(kernel, oracle @ oracle.T, rtol=1e-9, atol=1e-9)


def test_a_batch_as_long_as_the_positions_is_checked_again():
    """With positions first, a layer's output looks like one row a sample in batches of just that size."""
    model = Net(lambda net, x: torch.tanh(net.a(x.transpose(0, 1))).sum(0), a=nn.Linear(4, 3)).double()
    x = normal(7, 3, 4)
    oracle = jacrev_matrix(model, x)
    kernel = empirical_ntk(model, x, batch_size=4)  # and a rest of 3
    torch.testing.assert_close(kernel, oracle @ oracle.T, rtol=1e-9, atol=1e-9)


def test_memory_is_bounded_by_the_batch(monkeypatch):
    """No batch larger than its bytes allow is ever linearised."""
    model, x = mlp(3, 50, 2).double(), normal(40, 3)
    sizes = []

    def spy(module, inputs, **options):
        sizes.append(inputs.shape[0])
        return jacobian(module, inputs, **options)

    a_sample = jacobian(model, x[:4]).nbytes() // 4
    monkeypatch.setattr(kernels, "jacobian", spy)
    monkeypatch.setattr(kernels, "BATCH_BYTES", 8 * a_sample)
    kernel = empirical_ntk(model, x)
    assert max(sizes) == 8
    torch.testing.assert_close(kernel, jacobian(model, x).gram(), rtol=1e-12, atol=1e-12)


def test_tiles_cover_the_lower_half_once():
    model, x = build(), normal(5, 3)
    kernel, seen = torch.zeros(10, 10, dtype=torch.float64), torch.zeros(10, 10)
    for tile in ntk_tiles(model, x, batch_size=2):
        kernel[tile.rows, tile.columns] = tile.values
        seen[tile.rows, tile.columns] += 1
    assert seen.max() == 1 and bool((seen + seen.T > 0).all())
    torch.testing.assert_close(kernel.tril(), empirical_ntk(model, x).tril(), rtol=1e-12, atol=1e-12)
    first = torch.cat([tile.values for tile in ntk_tiles(model, x[:1], x, output=1, batch_size=2)], 1)
    torch.testing.assert_close(first, empirical_ntk(model, x[:1], x, "diagonal")[1], rtol=1e-12, atol=1e-12)
    with pytest.raises(NsrlError, match="no output 2"):
        next(ntk_tiles(model, x, output=2))


def test_precision_is_that_of_the_result():
    model, x = mlp(3, 8, 2), normal(4, 3, dtype=torch.float32)
    single, double = empirical_ntk(model, x, precision=torch.float32), empirical_ntk(model, x)
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["vector", "dict"])
def test_policies_of_agents(kind):
    vector = spaces.Box(-1.0, 1.0, (3,), np.float32)
    mixed = spaces.Dict({"a": vector, "b": spaces.Box(-1.0, 1.0, (2,), np.float32)})
    space: gym.Space = mixed if kind == "dict" else vector
    policy_class = MultiInputActorCriticPolicy if kind == "dict" else ActorCriticPolicy
    policy = policy_class(space, spaces.Discrete(3), lambda _: 1e-3, net_arch=[6], ortho_init=False)
    policy.set_training_mode(False)
    x: Tensor | dict[str, Tensor] = normal(5, 3, dtype=torch.float32)
    if kind == "dict":
        x = {"a": x, "b": normal(5, 2, seed=1, dtype=torch.float32)}
    oracle = jacrev_matrix(policy, x, policy_outputs).double()
    kernel = empirical_ntk(policy, x, forward=policy_outputs, batch_size=2)
    torch.testing.assert_close(kernel, oracle @ oracle.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((normal(0, 3),), "no samples"),
        ((normal(4, 3), normal(0, 3)), "no samples"),
        ((normal(4, 3), normal(4, 2)), r"shape \(3,\).*\(2,\)"),
        ((normal(4, 3), normal(4, 3).float()), "float32"),
        ((normal(4, 3), {"a": normal(4, 3)}), "different containers"),
        (({"a": normal(4, 3), "b": normal(5, 3)},), "different numbers of samples: 4, 5"),
        ((np.ones((4, 3)),), "torch.as_tensor"),
        ((normal(4, 3), None, "block"), '"full", "trace" or "diagonal"'),
    ],
)
def test_bad_arguments_are_refused(arguments, sentence):
    with pytest.raises(NsrlError, match=sentence):
        empirical_ntk(build(), *arguments)


def test_a_bad_batch_size_is_refused():
    with pytest.raises(NsrlError, match="at least 1"):
        empirical_ntk(build(), normal(4, 3), batch_size=0)


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), "train mode"),
        (nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 1)), "train mode"),
        (Net(lambda net, x: net.a(x) + torch.randn(len(x), 1), a=nn.Linear(3, 1)), "random"),
    ],
)
def test_modules_without_a_kernel_are_refused(module, sentence):
    with pytest.raises(JacobianError, match=sentence):
        empirical_ntk(module, normal(4, 3, dtype=torch.float32))


def test_a_kernel_that_does_not_fit_is_refused_with_its_size(monkeypatch):
    monkeypatch.setattr(kernels, "available_bytes", lambda device: 1000)
    with pytest.raises(NsrlError, match=r"\(20, 20\) and takes 3.1 KiB.*1000 bytes.*ntk_tiles.*trace"):
        empirical_ntk(build(), normal(10, 3))
    assert empirical_ntk(build(), normal(10, 3), kind="trace").shape == (10, 10)


def test_free_memory_is_known_here():
    assert kernels.available_bytes(torch.device("cpu")) > 10**6
    assert kernels.available_bytes(torch.device("meta")) is None


# -- the use of a weight depends on the batch -------------------------------------------------------------------------


def sorted_by_size(net: Net, x: Tensor) -> Tensor:
    order = x[:, 0].argsort()
    return net.b(torch.tanh(net.a(x[order])))[order.argsort()]


def to_experts(net: Net, x: Tensor) -> Tensor:
    out = torch.zeros(len(x), 2, dtype=x.dtype)
    for expert, rows in ((net.a, x[:, 0] <= 0.3), (net.c, x[:, 0] > 0.3)):
        if rows.any():
            out = out.index_put((rows.nonzero().flatten(),), expert(x[rows])[:, :2])
    return out


def outside_now_and_then(net: Net, x: Tensor) -> Tensor:
    return net.b(torch.tanh(net.a(x))) + torch.where(x[:, :1] > 0.5, x.sin() @ net.b.weight[:, :4].T, 0.0)


@pytest.mark.parametrize("kind", ["full", "trace", "diagonal"])
@pytest.mark.parametrize("function", [sorted_by_size, to_experts, outside_now_and_then])
def test_models_that_use_a_layer_differently_on_later_batches(function, kind):
    """The first batches are in order, below every threshold: what they say of a layer does not hold for the others."""
    torch.manual_seed(0)
    model = Net(function, a=nn.Linear(4, 5), b=nn.Linear(5, 2), c=nn.Linear(4, 2)).double()
    x = normal(17, 4, seed=3)
    x[:8, 0] = torch.linspace(-2.0, -1.0, 8, dtype=torch.float64)
    rows = rows_matrix(model, x)
    full = (rows @ rows.T).view(17, 2, 17, 2)
    expected = {
        "full": full.reshape(34, 34),
        "trace": torch.einsum("nomo->nm", full),
        "diagonal": torch.einsum("nomo->onm", full),
    }[kind]
    torch.testing.assert_close(empirical_ntk(model, x, None, kind, batch_size=4), expected, rtol=1e-10, atol=1e-10)


def test_a_later_batch_whose_samples_meet_is_refused():
    def meeting(net, x):
        return net.a(x - x.mean(0)) if bool((x[:, 0] > 1.0).any()) else net.a(x)

    model, x = Net(meeting, a=nn.Linear(4, 2)).double(), normal(12, 4)
    x[:, 0] = torch.linspace(-1.0, 2.0, 12, dtype=torch.float64)
    with pytest.raises(JacobianError, match="other samples"):
        empirical_ntk(model, x, batch_size=4)
