"""Every strategy against an independent oracle, and the properties that are promised."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev, vmap

from nsrl.continual import STRATEGIES, OptimizerConfig, Task
from nsrl.continual.memory import Memory
from nsrl.errors import NsrlError
from tests.continual.learning import CLASSES, Batches, accuracy, blobs, build, learn, multi_head, network

FIRST, SECOND = Task("first", 0), Task("second", 1)
SGD = OptimizerConfig("sgd", lr=0.05)


def _outputs_jacobian(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Dense per-sample output Jacobian (N, O, P) by torch.func."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    blocks = vmap(jacrev(lambda p, x: functional_call(model, p, (x[None],))[0]), (None, 0))(parameters, inputs)
    return torch.cat([block.flatten(2) for block in blocks.values()], 2)


def _layer_inputs(model: nn.Sequential, inputs: torch.Tensor) -> dict[str, np.ndarray]:
    found = {}
    with torch.no_grad():
        for name, layer in model.named_children():
            if isinstance(layer, nn.Linear):
                found[name] = inputs.double().numpy()
            inputs = layer(inputs)
    return found


def _moved(strategy, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: p.detach() - before[name] for name, p in strategy.model.named_parameters()}


def _values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.filterwarnings("ignore:.*no constraint covers")
def test_learns_two_tasks_single_and_multi_head(name):
    for model, tasks in ((network(), (FIRST, SECOND)), (multi_head(), (Task("a", 0, head=0), Task("b", 1, head=1)))):
        strategy = build(name, model)
        for task in tasks:
            learn(strategy, task, blobs(task.index), epochs=3)
        found = strategy.diagnostics()
        assert np.isfinite(list(found.values())).all() and found["preserved_kl"] >= 0.0
        assert (strategy.memory_bytes() > 0) == (name != "naive")


def test_naive_forgets_and_ours_does_not():
    first = blobs(0)
    # the same classes under other labels, told apart by a shift of the inputs
    second = Batches(first.inputs + 1.5, (first.targets + 1) % CLASSES)
    scores = {}
    for name in ("naive", "kl_budget"):
        torch.manual_seed(0)
        strategy = build(name)
        learn(strategy, FIRST, first, epochs=25)
        assert accuracy(strategy.model, first) > 0.97
        learn(strategy, SECOND, second, epochs=25)
        scores[name] = accuracy(strategy.model, first), accuracy(strategy.model, second)
    assert scores["naive"][0] < 0.8
    assert min(scores["kl_budget"]) > 0.95


def test_joint_batches_weigh_every_task_alike():
    strategy = build("joint", optimizer=SGD)
    first = blobs(0, samples=32)
    learn(strategy, FIRST, first, epochs=1)
    second = blobs(1, samples=32)
    strategy.before_task(SECOND, second)
    before = _values(strategy.model)
    # the whole of the first task is drawn: the step is that of the mean of both losses
    losses = sum(0.5 * F.cross_entropy(strategy.model(loader.inputs), loader.targets) for loader in (first, second))
    wanted = torch.autograd.grad(losses, list(strategy.model.parameters()))
    strategy.step((second.inputs, second.targets, 1))
    for gradient, moved in zip(wanted, _moved(strategy, before).values(), strict=True):
        assert torch.allclose(moved, -0.05 * gradient, atol=1e-6)


def test_ewc_penalty_is_the_quadratic_of_the_dense_fisher_diagonals():
    strategy = build("ewc", strength=7.0, samples=1000)
    anchors = []
    for task in (FIRST, SECOND):
        loader = blobs(task.index)
        learn(strategy, task, loader, epochs=2)
        J = _outputs_jacobian(strategy.model, loader.inputs).double()
        p = strategy.model(loader.inputs).detach().double().softmax(1)
        H = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        fisher = torch.einsum("nop,nor,nrp->p", J, H, J) / len(p)
        anchors.append((fisher, strategy.flat.read().double()))
    for parameter in strategy.model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    weights = strategy.flat.read().double().requires_grad_()
    penalty = 3.5 * sum((fisher * (weights - anchor).square()).sum() for fisher, anchor in anchors)
    (wanted,) = torch.autograd.grad(penalty, weights)
    close = 1e-5 * float(wanted.abs().max())
    assert torch.allclose(strategy.penalty_gradient().double(), wanted, rtol=1e-3, atol=close)


def test_agem_projects_a_conflicting_gradient_and_no_other():
    strategy = build("agem", optimizer=SGD, samples_per_task=96, batch_samples=96)
    first = blobs(0)
    learn(strategy, FIRST, first)
    # the first task with its labels turned: every gradient conflicts
    for shift, conflicts in ((1, True), (0, False)):
        other = Batches(first.inputs, (first.targets + shift) % CLASSES)
        strategy.before_task(SECOND, other)
        parameters = list(strategy.model.parameters())
        g, reference = (
            torch.cat(
                [
                    t.flatten()
                    for t in torch.autograd.grad(F.cross_entropy(strategy.model(first.inputs), targets), parameters)
                ]
            )
            for targets in (other.targets, first.targets)
        )
        assert (float(g @ reference) < 0.0) == conflicts
        wanted = g - (g @ reference) / (reference @ reference) * reference if conflicts else g
        before = strategy.flat.read()
        strategy.step((other.inputs, other.targets, 1))
        assert torch.allclose(strategy.flat.read() - before, -0.05 * wanted, atol=1e-6)


def test_ogd_is_gram_schmidt_on_true_class_logit_gradients():
    strategy = build("ogd", optimizer=SGD, samples_per_task=20)
    stored = []
    for task in (FIRST, SECOND):
        loader = blobs(task.index)
        learn(strategy, task, loader, epochs=2)
        memory = Memory(20)
        memory.add(task, loader)
        J = _outputs_jacobian(strategy.model, memory.inputs)
        stored.append(J[torch.arange(20), memory.targets].double())
    basis: list[torch.Tensor] = []
    for row in torch.cat(stored):
        for _ in range(2):
            for q in basis:
                row = row - (row @ q) * q
        if float(row.norm()) > 1e-5:
            basis.append(row / row.norm())
    third, loader = Task("third", 2), blobs(2)
    strategy.before_task(third, loader)
    loss = F.cross_entropy(strategy.model(loader.inputs), loader.targets)
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(strategy.model.parameters()))]).double()
    for q in basis:
        wanted = wanted - (wanted @ q) * q
    before = strategy.flat.read()
    strategy.step((loader.inputs, loader.targets, 2))
    assert torch.allclose((strategy.flat.read() - before).double(), -0.05 * wanted, atol=2e-6)


def _gpm_basis(features: np.ndarray, basis: np.ndarray, energy: float) -> np.ndarray:
    """The paper's algorithm on a representation matrix (d, n), by NumPy."""
    representation = features.T
    rest = representation - basis @ basis.T @ representation
    left, singular, _ = np.linalg.svd(rest, full_matrices=False)
    total = (representation**2).sum()
    held = total - (singular**2).sum()
    count = 0
    while held < energy * total:
        held += singular[count] ** 2
        count += 1
    return np.concatenate([basis, left[:, :count]], 1)


@pytest.mark.parametrize("energy", [0.9, [0.8, 0.95, 0.99]])
def test_gpm_bases_are_the_papers_by_numpy(energy):
    strategy = build("gpm", energy=energy, samples_per_task=1000)
    energies = dict(zip("024", [energy] * 3 if energy == 0.9 else energy, strict=True))
    bases = {
        name: np.zeros((layer.in_features, 0))
        for name, layer in strategy.model.named_children()
        if isinstance(layer, nn.Linear)
    }
    for task in (FIRST, SECOND):
        loader = blobs(task.index)
        learn(strategy, task, loader, epochs=2)
        for name, features in _layer_inputs(strategy.model, loader.inputs).items():
            bases[name] = _gpm_basis(features, bases[name], energies[name])
            found = strategy.bases[name].numpy()
            assert np.allclose(found @ found.T, bases[name] @ bases[name].T, atol=1e-5), name


def test_gpm_and_sgp_steps_lose_the_importance_of_every_direction():
    for name in ("gpm", "sgp"):
        strategy = build(name, optimizer=SGD)
        learn(strategy, FIRST, blobs(0))
        loader = blobs(1)
        strategy.before_task(SECOND, loader)
        before = _values(strategy.model)
        loss = F.cross_entropy(strategy.model(loader.inputs), loader.targets)
        weights = dict(strategy.model.named_parameters())
        wanted = torch.autograd.grad(loss, [weights[f"{layer}.weight"] for layer in strategy.bases])
        strategy.step((loader.inputs, loader.targets, 1))
        moved = _moved(strategy, before)
        for (layer, U), gradient in zip(strategy.bases.items(), wanted, strict=True):
            U, share = U.float(), strategy.importances[layer].float()
            assert (name == "gpm") == bool((share == 1.0).all())
            projected = gradient - (gradient @ U) * share @ U.T
            assert torch.allclose(moved[f"{layer}.weight"], -0.05 * projected, atol=1e-6)
            assert not moved[f"{layer}.bias"].any()


def test_sgp_importances_are_the_papers_and_accumulate():
    strategy = build("sgp", alpha=5.0, energy=0.9, samples_per_task=1000)
    importance = np.zeros(0)
    for task in (FIRST, SECOND):
        old = strategy.bases["2"].numpy() if task is SECOND else np.zeros((24, 0))
        loader = blobs(task.index)
        learn(strategy, task, loader, epochs=2)
        R = _layer_inputs(strategy.model, loader.inputs)["2"].T
        along = np.sqrt(((old.T @ R) ** 2).sum(1))
        new = np.linalg.svd(R - old @ old.T @ R, full_matrices=False)[1][: strategy.bases["2"].shape[1] - old.shape[1]]
        strengths = np.concatenate([along, new])
        found = 6.0 * strengths / (5.0 * strengths + strengths.max())
        found[: len(importance)] += importance
        importance = np.minimum(found, 1.0)
        assert np.allclose(strategy.importances["2"].numpy(), importance, atol=1e-5)


@pytest.mark.parametrize("official", [False, True])
def test_adam_nscl_projector_is_the_papers_by_dense_svd(official):
    name = "adam_nscl_official" if official else "adam_nscl"
    strategy = build(name, network(width=8), OptimizerConfig("sgd", lr=0.05), multiple=10.0)
    covariance: dict[str, np.ndarray] = {}
    count = 0
    for task in (FIRST, SECOND):
        loader = blobs(task.index, samples=320)
        learn(strategy, task, loader, epochs=1)
        rows = len(list(loader)) if official else 320
        for batch, _ in loader if official else [(loader.inputs, None)]:
            for layer, features in _layer_inputs(strategy.model, batch).items():
                X = features.mean(0, keepdims=True) if official else features
                covariance[layer] = covariance.get(layer, 0.0) + X.T @ X
        count += rows
    third, loader = Task("third", 2), blobs(2)
    strategy.before_task(third, loader)
    before = _values(strategy.model)
    weights = dict(strategy.model.named_parameters())
    loss = F.cross_entropy(strategy.model(loader.inputs), loader.targets)
    gradients = torch.autograd.grad(loss, [weights[f"{layer}.weight"] for layer in covariance])
    strategy.step((loader.inputs, loader.targets, 2))
    moved = _moved(strategy, before)
    assert min(strategy.kept.values()) < 8
    for (layer, total), gradient in zip(covariance.items(), gradients, strict=True):
        left, singular, _ = np.linalg.svd(total / count)
        null = left[:, singular <= 10.0 * singular.min()]
        projector = null @ null.T
        if official:
            projector = projector / np.linalg.norm(projector)
        assert strategy.kept[layer] == null.shape[1]
        wanted = -0.05 * gradient.double().numpy() @ projector
        assert np.allclose(moved[f"{layer}.weight"].double().numpy(), wanted, atol=1e-6), layer
        assert moved[f"{layer}.bias"].any() == official


def test_exact_features_keep_old_outputs_however_far_the_weights_go():
    first = blobs(0, rank=4)
    strategy = build("features", network(width=64), energy=1.0)
    learn(strategy, FIRST, Batches(first.inputs[:24], first.targets[:24]), epochs=15)
    with torch.no_grad():
        then = strategy.model(first.inputs[:24])
    before = strategy.flat.read()
    learn(strategy, SECOND, blobs(1), epochs=15)
    with torch.no_grad():
        now = strategy.model(first.inputs[:24])
    assert float((strategy.flat.read() - before).norm()) > 0.5
    assert float((now - then).abs().max()) <= 1e-6 * float(then.abs().max())
    assert strategy.diagnostics()["leakage"] < 1e-6


@pytest.mark.parametrize("name", ["kl_budget", "combined"])
def test_measured_kl_is_within_the_budget_whenever_it_is_promised(name):
    budget = 2e-3
    strategy = build(name, kl_budget=budget, states_per_task=48, batch_states=16, enforce_every=5, multiplier=1e-3)
    references = []
    for task in (FIRST, SECOND, Task("third", 2)):
        loader = blobs(task.index)
        strategy.before_task(task, loader)
        for step in range(1, 41):
            inputs, targets = list(loader)[step % 3]
            strategy.step((inputs, targets, task.index))
            if step % 5 == 0:
                assert _largest_kl(strategy.model, references) <= budget + 1e-9
        strategy.after_task(task, loader)
        assert _largest_kl(strategy.model, references) <= budget + 1e-9
        kept = strategy.budget.retained.memory
        inputs = kept.inputs[kept.owner == task.index].clone()
        references.append((inputs, strategy.model(inputs).detach()))
    assert strategy.budget.interventions > 0


def _largest_kl(model: nn.Module, references: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    with torch.no_grad():
        return max(
            (
                float(
                    F.kl_div(
                        model(x).double().log_softmax(1),
                        then.double().log_softmax(1),
                        log_target=True,
                        reduction="batchmean",
                    )
                )
                for x, then in references
            ),
            default=0.0,
        )


def test_regression_keeps_half_the_squared_change_in_the_budget():
    inputs = torch.linspace(-1, 1, 64).unsqueeze(1)
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
    strategy = build("kl_budget", model, kl_budget=1e-3, states_per_task=64, enforce_every=10)
    learn(strategy, FIRST, Batches(inputs - 2, torch.sin(3 * inputs)), epochs=20)
    then = model(inputs - 2).detach()
    learn(strategy, SECOND, Batches(inputs + 2, torch.cos(3 * inputs)), epochs=20)
    assert 0.5 * float((model(inputs - 2).detach() - then).square().mean()) <= 1e-3


def test_weight_decay_goes_to_the_reference_or_to_zero_and_is_projected():
    for to in ("reference", "zero"):
        optimizer = OptimizerConfig(lr=5e-3, weight_decay=0.5, decay_to=to)
        strategy = build("features", network(width=64), optimizer, energy=1.0)
        first = blobs(0, samples=20, rank=4)
        learn(strategy, FIRST, first, epochs=5)
        then = strategy.model(first.inputs).detach()
        learn(strategy, SECOND, blobs(1), epochs=5)
        assert float((strategy.model(first.inputs).detach() - then).abs().max()) <= 1e-5


def test_decay_moves_towards_the_reference():
    strategy = build("naive", optimizer=OptimizerConfig("sgd", lr=0.1, weight_decay=1.0))
    learn(strategy, FIRST, blobs(0), epochs=2)
    reference, loader = strategy.flat.read(), blobs(1)
    strategy.before_task(SECOND, loader)
    for parameter in strategy.model.parameters():
        parameter.data += 1.0
    loss = F.cross_entropy(strategy.model(loader.inputs), loader.targets)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(strategy.model.parameters()))])
    strategy.step((loader.inputs, loader.targets, 1))
    way = (1.0 - 0.1 * gradient) * (1.0 - 0.1)
    assert torch.allclose(strategy.flat.read() - reference, way, atol=1e-5)


def test_memory_is_even_over_classes_and_counted_in_bytes():
    memory = Memory(10, seed=1)
    targets = torch.tensor([0] * 50 + [1] * 5 + [2] * 45)
    memory.add(FIRST, Batches(torch.randn(100, 4), targets))
    assert sorted(torch.bincount(memory.targets).tolist()) == [3, 3, 4]
    assert memory.nbytes() == 10 * (4 * 4 + 8)
    seen = torch.cat([memory.draw(5), memory.draw(5)])
    assert sorted(seen.tolist()) == list(range(10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_made_of_bytes_are_held_as_bytes_without_loss(dtype):
    images = ((torch.randint(0, 256, (40, 3, 5)).to(dtype) / 255 - 0.13) / 0.31).requires_grad_(False)
    memory = Memory(20)
    for index, some in enumerate(images.split(20)):
        memory.add(Task(f"task {index}", index), [(some, torch.arange(20) % 2)])
        assert memory._inputs.codes.dtype == torch.uint8
    assert sorted(map(tuple, memory.inputs.flatten(1).tolist())) == sorted(map(tuple, images.flatten(1).tolist()))
    chosen = torch.tensor([31, 2])
    assert torch.equal(memory.take(chosen), memory.inputs[chosen]) and memory.take(chosen).dtype == dtype
    colours = len(images.unique())
    assert memory.nbytes() == 40 * 15 + colours * images.element_size() + 40 * 8
    memory.add(Task("noise", 2), [(torch.randn(20, 3, 5, dtype=dtype), torch.arange(20) % 2)])
    assert torch.equal(memory.inputs[:40].sort(0).values, images.sort(0).values)


class _Uncovered(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, inputs):
        return self.last(self.norm(self.first(inputs)).relu())


@pytest.mark.parametrize("name", ["features", "gpm", "adam_nscl"])
def test_uncovered_parameters_are_named_and_frozen(name):
    strategy = build(name, _Uncovered())
    with pytest.warns(UserWarning, match=r"norm\.weight.*frozen"):
        learn(strategy, FIRST, blobs(0), epochs=1)
    scale = strategy.model.norm.weight.detach().clone()
    learn(strategy, SECOND, blobs(1), epochs=1)
    assert torch.equal(strategy.model.norm.weight, scale)


def test_bad_input_is_one_sentence():
    loader = blobs(0)
    strategy = build("naive")
    with pytest.raises(NsrlError, match="call before_task first"):
        strategy.step((loader.inputs, loader.targets, 0))
    with pytest.raises(NsrlError, match="'first' is empty"):
        strategy.before_task(FIRST, [])
    strategy.before_task(FIRST, loader)
    with pytest.raises(NsrlError, match="batch of task 4 came while task 0"):
        strategy.step((loader.inputs, loader.targets, 4))
    with pytest.raises(NsrlError, match="labels go from 1 to 3, but the model has outputs 0 to 2"):
        strategy.step((loader.inputs, loader.targets + 1, 0))
    with pytest.raises(NsrlError, match="'second' is not at hand"):
        strategy.after_task(SECOND, loader)
    strategy.after_task(FIRST, loader)
    with pytest.raises(NsrlError, match="energy has 2 numbers, but the model has 3 layers in use: 0, 2, 4"):
        learn(build("gpm", energy=[0.9, 0.95]), FIRST, loader, epochs=1)
    with pytest.raises(NsrlError, match="learnt already"):
        strategy.before_task(FIRST, loader)
    with pytest.raises(NsrlError, match="freeze_statistics"):
        build("gpm", nn.Sequential(nn.Linear(12, 3), nn.BatchNorm1d(3))).before_task(FIRST, loader)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kl-budget", {}, "no strategy 'kl-budget'; choose one of naive"),
        ("er", {"samples": 3}, "'er' has no option samples; it has samples_per_task"),
        ("kl_budget", {"kl_budget": 0.0}, "positive number of nats"),
        ("features", {"energy": 1.5}, "share in"),
    ],
)
def test_unknown_names_and_values_are_refused(name, options, message):
    with pytest.raises(NsrlError, match=message):
        build(name, **options)
