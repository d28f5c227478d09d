"""Layer features: exact for any step size, on every kind of linear layer, and never less protected than before."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nsrl.projection import FeatureConstraint, Hard, JacobianError, SmallestMultiple, Tikhonov
from nsrl.projection.optimizer import FlatParameters
from tests.projection.builders import Net, mlp, normal


class Conv1D(nn.Module):
    """The layer of GPT-2: a linear layer with its weight stored as (in, out)."""

    def __init__(self, width_out: int, width_in: int):
        super().__init__()
        self.nf = width_out
        self.weight = nn.Parameter(normal(width_in, width_out).float())
        self.bias = nn.Parameter(normal(width_out).float())

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight + self.bias


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, inputs: Tensor) -> Tensor:
        weights = torch.softmax(self.query(inputs) @ self.key(inputs).transpose(1, 2), -1)
        return weights @ self.value(inputs)


def frozen(layer: nn.Module, name: str) -> nn.Module:
    getattr(layer, name).requires_grad_(False)
    return layer


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp(12, 20, 20, 3), (5, 12)),
    "relu": (lambda: mlp(12, 20, 3, activation=nn.ReLU), (5, 12)),
    "no bias": (lambda: mlp(12, 20, 3, bias=False), (5, 12)),
    "frozen bias": (lambda: nn.Sequential(frozen(nn.Linear(12, 20), "bias"), nn.Tanh(), nn.Linear(20, 2)), (5, 12)),
    "frozen weight": (lambda: nn.Sequential(nn.Linear(12, 20), nn.Tanh(), frozen(nn.Linear(20, 2), "weight")), (5, 12)),
    "conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(5, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 2), nn.Flatten(), nn.Linear(2, 2)
        ),
        (2, 5, 4, 4),
    ),
    "conv groups": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=4, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)),
        (4, 8, 3, 3),
    ),
    "conv circular": (
        lambda: nn.Sequential(
            nn.Conv1d(6, 4, 3, padding=1, padding_mode="circular", dilation=1), nn.Flatten(), nn.Linear(12, 2)
        ),
        (3, 6, 3),
    ),
    "conv same": (
        lambda: nn.Sequential(nn.Conv1d(6, 4, 4, padding="same", dilation=2), nn.Flatten(), nn.Linear(16, 2)),
        (3, 6, 4),
    ),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(4, 3, 2), nn.Flatten(), nn.Linear(3, 2)), (3, 4, 2, 2, 2)),
    "transposed storage": (lambda: nn.Sequential(Conv1D(20, 12), nn.GELU(), Conv1D(3, 20)), (5, 12)),
    "tokens": (lambda: nn.Sequential(nn.Linear(12, 16), Attention(16), nn.Linear(16, 3)), (2, 3, 12)),
    "shared module": (
        lambda: Net(
            lambda net, x: net.out(net.inner(torch.tanh(net.inner(x)))), inner=nn.Linear(14, 14), out=nn.Linear(14, 2)
        ),
        (4, 14),
    ),
    "norm in eval mode": (
        lambda: frozen(frozen(nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.Linear(20, 2)), "1").eval(), "1"),
        (5, 12),
    ),
}


def layer_outputs(net: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Outputs of every leaf module, in order of the calls, then of the network."""
    seen: list[Tensor] = []
    hooks = [
        m.register_forward_hook(lambda _m, _a, out: seen.append(out.detach().clone()))
        for m in net.modules()
        if not list(m.children())
    ]
    result = net(inputs).detach()
    for hook in hooks:
        hook.remove()
    return [*seen, result]


def move(net: nn.Module, displacement: Tensor) -> None:
    flat = FlatParameters([p for p in net.parameters() if p.requires_grad])
    flat.write(flat.read() + displacement)


def trained(net: nn.Module, inputs: Any, **kwargs: Any) -> FeatureConstraint:
    constraint = FeatureConstraint(net)
    constraint.update(net, inputs, **kwargs)
    return constraint


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("consolidated", [False, True])
def test_exact_for_a_step_of_any_size(name, consolidated):
    make, shape = ARCHITECTURES[name]
    net, inputs, others = make().double(), normal(*shape), normal(*shape, seed=1)
    constraint = trained(net, inputs)
    assert constraint.uncovered == ()
    if consolidated:
        constraint.consolidate()
    before, elsewhere = layer_outputs(net, inputs), net(others).detach()
    moved = constraint.project(3.0 * normal(constraint.width, seed=2))
    assert moved.leakage < 1e-10 and moved.kept > 0.1
    move(net, moved.displacement)
    for old, new in zip(before, layer_outputs(net, inputs), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-10)
    assert float((net(others) - elsewhere).detach().abs().max()) > 0.1


def test_steps_accumulate_without_drift():
    net, inputs = mlp(12, 20, 3).double(), normal(5, 12)
    constraint, before = trained(net, inputs), net(inputs).detach()
    for step in range(200):
        move(net, constraint.project(normal(constraint.width, seed=step)).displacement)
    torch.testing.assert_close(net(inputs), before, rtol=0, atol=1e-9)


def test_single_precision():
    net, inputs = mlp(12, 20, 3), normal(5, 12, dtype=torch.float32)
    constraint, before = trained(net, inputs), net(inputs).detach()
    moved = constraint.project(normal(constraint.width, dtype=torch.float32))
    assert moved.displacement.dtype == torch.float32
    move(net, moved.displacement)
    torch.testing.assert_close(net(inputs), before, rtol=0, atol=2e-5)


def test_the_moment_is_the_mean_over_positions():
    layer = nn.Linear(4, 2).double()
    batches = [normal(3, 5, 4), normal(1, 5, 4, seed=1)]
    constraint = FeatureConstraint(layer)
    for batch in batches:
        constraint.update(layer, batch)
    rows = torch.cat([torch.cat(batches).flatten(0, 1), torch.ones(20, 1).double()], 1)
    displacement = normal(constraint.width)
    matrix = torch.cat([displacement[:8].view(2, 4), displacement[8:].view(2, 1)], 1)
    expected = 0.5 * float((rows @ matrix.T).square().sum(1).mean())
    assert constraint.quadratic(displacement) == pytest.approx(expected, rel=1e-12)


def test_streaming_equals_one_shot():
    net, inputs = mlp(12, 16, 3).double(), normal(9, 12)
    shot, stream = trained(net, inputs), FeatureConstraint(net)
    for batch in inputs.split([1, 5, 3]):
        stream.update(net, batch)
    displacement = normal(shot.width)
    for filter in (Hard(), Tikhonov(0.1)):
        torch.testing.assert_close(
            stream.project(displacement, filter).displacement,
            shot.project(displacement, filter).displacement,
            rtol=1e-10,
            atol=1e-10,
        )
    torch.testing.assert_close(stream.values, shot.values, rtol=1e-10, atol=1e-10)


def test_half_precision_features_are_accumulated_in_double():
    layer = nn.Linear(6, 2).bfloat16()
    inputs = (1.0 + 1e-2 * normal(4000, 6)).bfloat16()
    constraint = trained(layer, inputs)
    rows = torch.cat([inputs.double(), torch.ones(4000, 1).double()], 1)
    expected = torch.linalg.eigvalsh(rows.T @ rows / 4000).flip(0)
    torch.testing.assert_close(constraint.eigenspaces[0].values, expected, rtol=1e-9, atol=1e-12)


class TestMask:
    net: nn.Module

    def setup_method(self):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, 18), nn.Tanh(), nn.Linear(18, 2)).double()
        self.tokens = normal(4, 5, 12)
        self.mask = torch.arange(5) < torch.tensor([[2], [1], [2], [1]])

    def test_padding_is_left_out(self):
        constraint = trained(self.net, self.tokens, mask=self.mask)
        bare = trained(self.net, self.tokens[self.mask])
        displacement = normal(constraint.width)
        result = constraint.project(displacement)
        assert result.rank == bare.project(displacement).rank == 6 * (18 + 2)
        torch.testing.assert_close(result.displacement, bare.project(displacement).displacement)
        before = self.net(self.tokens)[self.mask].detach()
        move(self.net, result.displacement)
        torch.testing.assert_close(self.net(self.tokens)[self.mask], before, rtol=0, atol=1e-10)

    def test_flattened_positions(self):
        constraint = trained(self.net, self.tokens, forward=lambda net, x: net(x.flatten(0, 1)), mask=self.mask)
        torch.testing.assert_close(constraint.values, trained(self.net, self.tokens, mask=self.mask).values)

    def test_pooled_samples_count_when_any_position_is_real(self):
        net = Net(lambda net, x: net.head(net.body(x).mean(1)), body=nn.Linear(12, 6), head=nn.Linear(6, 2)).double()
        mask = self.mask.clone()
        mask[3] = False
        constraint = trained(net, self.tokens, mask=mask)
        assert [space.values.numel() for space in constraint.eigenspaces] == [5, 3]

    def test_samples_of_a_convolution(self):
        net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(9, 1)).double()
        inputs, mask = normal(6, 2, 5), torch.arange(6) < 2
        torch.testing.assert_close(trained(net, inputs, mask=mask).values, trained(net, inputs[:2]).values)

    def test_a_mask_that_does_not_fit(self):
        with pytest.raises(ValueError, match=r"0: its input has positions \(4, 5\)"):
            trained(self.net, self.tokens, mask=torch.ones(5, 4))


def test_what_is_not_covered():
    net = Net(
        lambda net, x: net.out(net.norm(net.body(net.embed(x)).sum(1))) * net.gain,
        embed=nn.Embedding(7, 5),
        body=nn.Linear(5, 6),
        norm=nn.LayerNorm(6),
        out=nn.Linear(6, 2),
        gain=nn.Parameter(torch.ones(2)),
    )
    constraint = trained(net, torch.randint(7, (3, 4)))
    assert constraint.uncovered == ("gain", "embed.weight", "norm.weight", "norm.bias")


def test_a_tied_embedding_is_not_covered():
    net = Net(
        lambda net, x: net.head(net.body(net.embed(x))),
        embed=nn.Embedding(7, 5),
        body=nn.Linear(5, 5),
        head=nn.Linear(5, 7, bias=False),
    )
    net.head.weight = net.embed.weight
    assert trained(net, torch.randint(7, (3, 4))).uncovered == ("embed.weight",)


def test_a_weight_that_other_code_uses_is_found_out():
    net = Net(
        lambda net, x: net.b(torch.tanh(net.a(x))) + F.linear(x, net.b.weight), a=nn.Linear(6, 6), b=nn.Linear(6, 6)
    )
    constraint = trained(net, normal(3, 6, dtype=torch.float32))
    assert constraint.uncovered == ("b.weight", "b.bias")
    assert all(p.requires_grad for p in net.parameters())


def test_attention_behind_a_fast_path():
    """Modules that read their layers' weights without calling them: nothing is claimed that was not seen."""
    net = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    inputs = normal(2, 3, 8, dtype=torch.float32)
    with torch.no_grad():
        constraint = trained(net, inputs)
    assert set(constraint.covered) == {"linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias"}
    assert all(space.values.numel() == 6 for space in constraint.eigenspaces)


def test_a_head_that_the_retained_inputs_do_not_use_is_free():
    net = Net(lambda net, x: net.old(net.body(x)), body=nn.Linear(9, 6), old=nn.Linear(6, 2), new=nn.Linear(6, 2))
    constraint = trained(net.double(), normal(4, 9))
    displacement = normal(constraint.width)
    moved = constraint.project(displacement)
    assert constraint.uncovered == ()
    assert torch.equal(moved.displacement[-14:], displacement[-14:])
    assert moved.kept_by_layer["new"] == 1.0 and moved.kept_share < 1.0


def test_groups_have_their_own_features():
    net = nn.Sequential(nn.Conv2d(6, 4, 2, groups=2), nn.Flatten()).double()
    constraint = trained(net, normal(3, 6, 2, 2))
    assert [space.name for space in constraint.eigenspaces] == ["0[0]", "0[1]"]
    assert [space.dimension for space in constraint.eigenspaces] == [2 * 13, 2 * 13]
    assert [space.values.numel() for space in constraint.eigenspaces] == [3, 3]


@pytest.mark.parametrize("layer,match", [(nn.BatchNorm1d(4), "batch norm"), (nn.Dropout(0.5), "dropout")])
def test_mixed_or_random_samples_are_refused(layer, match):
    net = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 2))
    with pytest.raises(JacobianError, match=match):
        trained(net.train(), normal(3, 4, dtype=torch.float32))


def test_two_tasks_one_after_the_other():
    """Outputs of both tasks stay through a third one, each as it was when its own task ended."""
    net = mlp(16, 24, 24, 3).double()
    tasks, kept = [normal(4, 16, seed=seed) for seed in range(3)], []
    constraint = FeatureConstraint(net)
    for index, inputs in enumerate(tasks):
        step = normal(constraint.width, seed=index)
        move(net, constraint.project(step).displacement if index else step)
        constraint.update(net, inputs)
        assert constraint.consolidate() == {"0": 4, "2": 4, "4": 4}
        kept.append(net(inputs).detach())
        for old, outputs in zip(tasks, kept, strict=False):
            torch.testing.assert_close(net(old), outputs, rtol=0, atol=1e-10)
    assert constraint.protected_rank == {"0": 12, "2": 12, "4": 12}


def gpm(bases: np.ndarray, features: np.ndarray, threshold: float) -> np.ndarray:
    """GPM's update of one layer (arXiv 2103.09762), features as columns."""
    total = np.sum(features**2)
    rest = features - bases @ bases.T @ features
    left, singular, _ = np.linalg.svd(rest, full_matrices=False)
    held = (total - np.sum(singular**2)) / total
    count = 0
    while held < threshold:
        held += singular[count] ** 2 / total
        count += 1
    return np.hstack([bases, left[:, :count]])


def test_energy_rule_is_gpm():
    layer, bases = nn.Linear(10, 2, bias=False).double(), np.zeros((10, 0))
    constraint = FeatureConstraint(layer)
    for seed, threshold in enumerate((0.6, 0.9, 0.8, 0.95)):
        features = normal(6, 10, seed=seed) * torch.logspace(0, -2, 10).double()[torch.randperm(10)]
        bases = gpm(bases, features.T.numpy(), threshold)
        constraint.update(layer, features)
        constraint.consolidate(Hard(energy=threshold))
        assert constraint.protected_rank[""] == bases.shape[1]
        vector = normal(20, seed=seed)
        expected = vector.view(2, 10).numpy() @ (np.eye(10) - bases @ bases.T)
        np.testing.assert_allclose(constraint.project(vector).displacement.view(2, 10).numpy(), expected, atol=1e-9)


operations = st.lists(
    st.tuples(st.sampled_from(["update", "repeat", "energy", "rank", "all"]), st.integers(1, 4), st.integers(-3, 3)),
    min_size=1,
    max_size=10,
)


@given(operations=operations, width=st.integers(2, 14))
def test_the_protected_subspace_never_shrinks(operations, width):
    layer = nn.Linear(width, 3).double()
    constraint, rows = FeatureConstraint(layer), normal(2, width)
    held: list[Tensor] = []
    for step, (operation, size, decade) in enumerate(operations):
        if operation in ("update", "repeat"):
            rows = rows if operation == "repeat" else 10.0**decade * normal(size, width, seed=step)
            constraint.update(layer, rows)
        elif constraint._layers[""][0].protected.rank or constraint._layers[""][0].moment is not None:
            before = constraint.protected_rank[""]
            filter = {"energy": Hard(energy=0.2 * size), "rank": Hard(rank=size), "all": Hard()}[operation]
            added = constraint.consolidate(filter)[""]
            assert constraint.protected_rank[""] == before + added <= width + 1
            held.append(constraint._layers[""][0].protected.basis())
        protected = constraint._layers[""][0].protected
        for old in held:
            assert float(protected.without(old.T).norm()) < 1e-11
    if held and held[-1].shape[1]:
        left = constraint.project(normal(constraint.width), Tikhonov(1e12)).displacement
        matrix = torch.cat([left[: 3 * width].view(3, width), left[3 * width :].view(3, 1)], 1)
        assert float((matrix @ held[-1]).norm()) < 1e-11


def test_nscl_rule_sets_free_what_it_protected():
    """Adam-NSCL on the same growing sequence of tasks: what is protected first grows, then shrinks."""
    layer = nn.Linear(12, 2, bias=False).double()
    constraint, total, ours, nscl = FeatureConstraint(layer), torch.zeros(12, 12).double(), [], []
    for seed in range(6):
        features = normal(4, 12, seed=seed)
        constraint.update(layer, features)
        constraint.consolidate()
        total += features.T @ features
        ours.append(constraint.protected_rank[""])
        nscl.append(int(SmallestMultiple(10.0).removed(torch.linalg.eigvalsh(total).clamp_min(0.0)).sum()))
    assert ours == [4, 8, 12, 12, 12, 12]
    assert min(nscl[:3]) >= 4 and nscl[-1] < max(nscl) - 3


def test_storage_is_thin():
    layer = nn.Linear(40, 30, bias=False).double()
    for tasks, rank in ((1, 5), (7, 35)):
        constraint = FeatureConstraint(layer)
        for seed in range(tasks):
            constraint.update(layer, normal(5, 40, seed=seed))
            constraint.consolidate()
        assert constraint.protected_rank[""] == rank
        assert constraint.nbytes() <= 8 * 5 * 41
        constraint.project(normal(constraint.width))
        assert constraint.nbytes() <= 8 * 5 * 41  # projecting leaves nothing behind


def test_merge():
    net = mlp(12, 20, 2).double()
    first, second, third = normal(3, 12), normal(4, 12, seed=1), normal(2, 12, seed=2)
    ours, theirs = FeatureConstraint(net), FeatureConstraint(net)
    ours.update(net, first)
    ours.consolidate()
    ours.update(net, second)
    theirs.update(net, torch.cat([first[:1], third]))
    theirs.consolidate()
    merged = ours.merged(theirs)
    assert merged.protected_rank == {"0": 5, "2": 5}
    assert ours.protected_rank == {"0": 3, "2": 3}
    inputs = torch.cat([first, second, third])
    before = net(inputs).detach()
    moved = merged.project(normal(merged.width))
    assert moved.rank == 9 * 22
    move(net, moved.displacement)
    torch.testing.assert_close(net(inputs), before, rtol=0, atol=1e-10)
    streams = [trained(net, batch) for batch in (first, second)]
    torch.testing.assert_close(streams[0].merged(streams[1]).values, trained(net, torch.cat([first, second])).values)
    with pytest.raises(ValueError, match="same layers"):
        merged.merged(FeatureConstraint(mlp(12, 21, 2)))


def test_reset():
    net = mlp(5, 8, 2).double()
    constraint = trained(net, normal(3, 5))
    constraint.consolidate()
    constraint.reset()
    assert constraint.protected_rank == {"0": 0, "2": 0} and constraint.nbytes() == 0
    with pytest.raises(ValueError, match="retained inputs"):
        constraint.project(normal(constraint.width))
    with pytest.raises(ValueError, match="retained inputs"):
        constraint.consolidate()


def test_only_named_parameters():
    net = mlp(12, 16, 2).double()
    constraint = FeatureConstraint(net, ["2.weight", "2.bias"])
    constraint.update(net, normal(4, 12))
    assert constraint.width == 34 and list(constraint.covered) == ["2.weight", "2.bias"]
    assert constraint.project(normal(34)).rank == 2 * 4


def test_the_module_is_left_as_it_was():
    net, inputs = mlp(5, 8, 2).double(), normal(3, 5)
    twin = copy.deepcopy(net)
    trained(net, inputs)
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert torch.equal(net(inputs), twin(inputs))


# -- uses of a weight that its layer's features do not see ------------------------------------------------------------


def by_hand(net: Net, x: Tensor) -> Tensor:
    return net.b(torch.tanh(net.a(x))) + F.linear(x.sin(), net.a.weight)[:, :2]


def under_other_weights(net: Net, x: Tensor) -> Tensor:
    return net.b(torch.func.functional_call(net.a, {"weight": net.a.weight.tanh()}, (x,)))


def in_a_backward_pass(net: Net, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_(True)
    return torch.autograd.grad(net.b(torch.tanh(net.a(x))).square().sum(), x, create_graph=True)[0]


def after_an_inner_step(net: Net, x: Tensor) -> Tensor:
    slope = torch.autograd.grad(net.a(x.sin()).square().mean(), net.a.weight, create_graph=True)[0]
    return net.b(F.linear(x, net.a.weight - slope, net.a.bias))


@pytest.mark.parametrize("function", [by_hand, under_other_weights, in_a_backward_pass, after_an_inner_step])
def test_features_cover_what_acts_through_its_layer_only(function):
    """Whatever is covered may move by any step: the outputs stay."""
    net = Net(function, a=nn.Linear(9, 5), b=nn.Linear(5, 2)).double()
    inputs = normal(3, 9)
    constraint = trained(net, inputs)
    assert "a.weight" in constraint.uncovered
    before = net(inputs).detach()
    step = torch.zeros(constraint.width).double()
    if constraint.covered:
        step = constraint.project(5.0 * normal(constraint.width)).displacement
        for name in constraint.uncovered:
            step[slice(*constraint.columns[name])] = 0.0
    move(net, step)
    torch.testing.assert_close(net(inputs).detach(), before, rtol=0, atol=1e-9)


def test_hooks_of_the_user_leave_features_as_they_are():
    net, inputs = mlp(12, 20, 3).double(), normal(5, 12)
    net[0].register_forward_hook(lambda layer, args, output: 2.0 * output)
    constraint, before = trained(net, inputs), net(inputs).detach()
    assert constraint.uncovered == ()
    move(net, constraint.project(3.0 * normal(constraint.width)).displacement)
    torch.testing.assert_close(net(inputs).detach(), before, rtol=0, atol=1e-9)


def test_a_use_outside_that_comes_later_is_refused():
    def late(net, x):
        out = net.b(torch.tanh(net.a(x)))
        return out + F.linear(x, net.a.weight)[:, :2] if len(x) > 4 else out

    net = Net(late, a=nn.Linear(9, 5), b=nn.Linear(5, 2)).double()
    constraint = trained(net, normal(3, 9))
    constraint.update(net, normal(4, 9, seed=1))
    with pytest.raises(ValueError, match=r"parameters of a are used outside .*freeze them"):
        constraint.update(net, normal(5, 9, seed=2))


def test_outputs_without_gradients_are_refused():
    net = mlp(12, 20, 3)
    for forward in (
        lambda net, x: net(x).argmax(-1),
        torch.no_grad()(lambda net, x: net(x)),
        lambda net, x: [None for _ in net(x)],
    ):
        with pytest.raises(ValueError, match="carry no gradients"):
            trained(net, normal(5, 12, dtype=torch.float32), forward=forward)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_layer_with_nothing_to_cover():
    net = nn.Sequential(nn.utils.weight_norm(nn.Linear(9, 5, bias=False)), nn.Tanh(), nn.Linear(5, 2)).double()
    constraint = trained(net, normal(3, 9))
    assert constraint.uncovered == ("0.weight_g", "0.weight_v")
