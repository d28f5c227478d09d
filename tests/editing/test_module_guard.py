"""A guard around any loop: the KL that it measures, what it projects, what it promises, and what it refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, kl_divergence

from nsrl.editing.guard import protect_module
from nsrl.editing.post_training.preserved import Preserved, Reference
from nsrl.errors import NsrlError
from tests.editing.tiny_lm import TinyLM, batches, loss, train


def moved(model: nn.Module, size: float = 0.05, seed: int = 3) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return model


def divergences(then: nn.Module, now: nn.Module, data: list[dict]) -> torch.Tensor:
    """KL of every real position by torch.distributions, float64."""
    found = []
    with torch.no_grad():
        for batch in data:
            p, q = (Categorical(logits=m(**batch).logits.double()) for m in (then, now))
            found.append(kl_divergence(p, q)[batch["attention_mask"].bool()])
    return torch.cat(found)


def state(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_the_kl_is_that_of_torch_distributions_over_real_tokens() -> None:
    then, data = TinyLM(), batches()
    now = copy.deepcopy(then)
    preserved = Preserved(now, data)
    assert preserved.measure().kl_mean == 0.0
    moved(now)
    found, expected = preserved.measure(), divergences(then, now, data)
    assert found.tokens == len(expected)
    # both are float64 sums of float32 logits, whose own rounding is the same
    assert found.kl_mean == pytest.approx(float(expected.mean()), rel=1e-10)
    assert found.kl_max == pytest.approx(float(expected.max()), rel=1e-10)


def test_padding_changes_nothing() -> None:
    then, data = TinyLM(), batches()
    other = [{**b, "input_ids": torch.where(b["attention_mask"].bool(), b["input_ids"], 5)} for b in data]
    found = []
    for given in (data, other):
        model = copy.deepcopy(then)
        preserved = Preserved(model, given)
        moved(model)
        found.append(preserved.measure().kl_mean)
    assert found[0] == found[1] > 0.0


def test_likeliest_classes_and_the_rest_bound_the_full_kl_from_below() -> None:
    then, data = TinyLM(), batches()
    now = moved(copy.deepcopy(then), 0.2)
    full = divergences(then, now, data).mean()
    last = 0.0
    for count in (1, 2, 4, 8, 16, 22):
        model = copy.deepcopy(then)
        preserved = Preserved(model, data, top_k=count)
        model.load_state_dict(now.state_dict())
        kl = preserved.measure().kl_mean
        # a partition that is refined: the log-sum inequality; the log-probabilities are held in float32
        assert last <= kl + 1e-6 and kl <= float(full) + 1e-6
        last = kl
    assert last == pytest.approx(float(full), rel=1e-5)  # nothing is left out: 22 and the one other


def test_the_kl_of_likeliest_classes_is_that_of_the_merged_distribution() -> None:
    logits = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    now = logits + torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    reference = Reference.most_likely(logits, 3)
    assert reference.indices is not None

    def merged(values: torch.Tensor) -> Categorical:
        p = values.softmax(-1)
        top = p.gather(1, reference.indices)
        return Categorical(probs=torch.cat([top, 1.0 - top.sum(1, keepdim=True)], 1))

    then = reference.completed(now)
    ours = (then.softmax(-1) * (then.log_softmax(-1) - now.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(ours, kl_divergence(merged(logits), merged(now)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(then.softmax(-1).sum(-1), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("top_k", [None, 5])
def test_the_pull_is_the_gradient_of_the_kl(top_k: int | None) -> None:
    then = TinyLM().double()
    model = copy.deepcopy(then)
    data = batches(1)
    preserved = Preserved(model, data, top_k)
    moved(model)
    _, pieces = preserved.pull(0, list(model.parameters()))
    direction = [torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(9)) for p in pieces]
    slope = sum(float((a * b).sum()) for a, b in zip(pieces, direction, strict=True))
    ends, eps = [], 1e-4
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction, strict=True):
                p.add_(d, alpha=sign * eps)
        ends.append(preserved.measure().kl_mean)
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction, strict=True):
                p.sub_(d, alpha=sign * eps)
    # central differences in float64: an error of eps^2; the reference is held in float32
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * eps), rel=1e-3)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_an_infinite_budget_changes_no_bit(make) -> None:
    plain, guarded = TinyLM(dropout=0.1), TinyLM(dropout=0.1)
    torch.manual_seed(0)
    train(plain, make(plain.parameters(), 1e-2), 12)
    torch.manual_seed(0)
    optimizer = make(guarded.parameters(), 1e-2)
    guard = protect_module(guarded, optimizer, batches(), math.inf, measure_every=5, project_every=2)
    train(guarded, optimizer, 12)
    assert same(plain, guarded) and guarded.training
    assert guard.finish().kl_mean > 1e-3


@pytest.mark.parametrize("constraint", ["features", "kronecker", "none"])
@pytest.mark.parametrize("pull_every", [0, 1])
def test_the_budget_holds_at_every_measurement(constraint: str, pull_every: int) -> None:
    then = TinyLM()
    model, data = copy.deepcopy(then), batches()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    guard = protect_module(
        model, optimizer, data, 0.01, constraint=constraint, pull_every=pull_every, measure_every=7, project_every=3
    )
    before = loss(model, batches(1, seed=100, padded=False)[0])
    for step in range(0, 28, 7):
        train(model, optimizer, 7, step)
        assert float(divergences(then, model, data).mean()) <= 0.01 * (1 + 1e-9)
    report = guard.finish()
    assert report.kl_mean <= 0.01 and report.steps == 28
    assert report.kl_mean == pytest.approx(float(divergences(then, model, data).mean()), rel=1e-9)
    assert loss(model, batches(1, seed=100, padded=False)[0]) < before  # and something is learnt
    train(model, optimizer, 30)  # the optimizer is as it was
    assert float(divergences(then, model, data).mean()) > 0.01


def test_features_are_projected_as_dense_float64_algebra_does() -> None:
    model, data = TinyLM(), batches()
    inputs: dict[str, list[torch.Tensor]] = {}
    handles = [
        layer.register_forward_pre_hook(lambda m, args, name=name: inputs.setdefault(name, []).append(args[0].detach()))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name != "head"
    ]
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for handle in handles:
        handle.remove()
    masks = [batch["attention_mask"].bool() for batch in data]
    start = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    guard = protect_module(
        model, optimizer, data, 1e3, energy=0.9, pull_every=0, project_every=100, measure_every=100, precision="float64"
    )
    train(model, optimizer, 3)
    free = copy.deepcopy(model)
    guard.enforce()
    for name, seen in inputs.items():
        x = torch.cat([a[m] for a, m in zip(seen, masks, strict=True)]).double()
        x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))
        values, vectors = values.flip(0), vectors.flip(1)
        rank = int((values.cumsum(0) < 0.9 * values.sum()).sum()) + 1
        q = vectors[:, :rank]
        ours, theirs, begin = (m.get_submodule(name) for m in (model, free, start))

        def matrix(layer) -> torch.Tensor:
            return torch.cat([layer.weight, layer.bias[:, None]], 1).detach().double()

        way = matrix(theirs) - matrix(begin)
        expected = matrix(begin) + way - way @ q @ q.T
        # float32 weights: one rounding of numbers of size 1
        torch.testing.assert_close(matrix(ours), expected, rtol=0, atol=2e-7)
    torch.testing.assert_close(model.tokens.weight, free.tokens.weight, rtol=0, atol=0)  # not covered: not a bit


def test_all_energy_with_nothing_uncovered_keeps_the_outputs() -> None:
    then = TinyLM()
    model, data = copy.deepcopy(then), batches(1, 1, 7)  # fewer tokens than any layer has inputs
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    guard = protect_module(
        model, optimizer, data, 1e-6, energy=1.0, hold_uncovered=True, pull_every=0, project_every=1, measure_every=50
    )
    before = loss(model, batches(1, seed=100, padded=False)[0])
    train(model, optimizer, 40)
    report = guard.finish()
    # nothing had to be enforced: float32 outputs move by their rounding, and the KL is quadratic in that
    assert report.kl_mean < 1e-10 and report.restorations == report.fallbacks == 0
    assert loss(model, batches(1, seed=100, padded=False)[0]) < 0.98 * before
    assert torch.equal(model.tokens.weight, then.tokens.weight)
    assert 0.0 < report.kept_share < 1.0 and 0 < report.rank < report.parameters


def test_restoration_steps_come_back_inside_and_go_less_far_back_than_the_segment() -> None:
    then = TinyLM()
    kept = {}
    for steps in (0, 8):
        model = copy.deepcopy(then)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        guard = protect_module(
            model, optimizer, batches(), 0.05, constraint="none", pull_every=0, measure_every=100, restore_steps=steps
        )
        train(model, optimizer, 10)
        report = guard.finish()
        assert report.kl_mean <= 0.05
        assert (report.restorations > 0) == (steps > 0) and (report.fallbacks > 0) == (steps == 0)
        kept[steps] = loss(model, batches(1, seed=100, padded=False)[0]).item()
    assert kept[8] < kept[0]


def test_accumulation_clipping_and_frozen_parameters() -> None:
    then = TinyLM(tied=False)
    model, data = copy.deepcopy(then), batches()
    model.blocks[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.1)
    with protect_module(model, optimizer, data, 0.005, measure_every=4) as guard:
        for step in range(12):
            for part in range(3):
                (loss(model, batches(1, seed=step + part, padded=False)[0]) / 3).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert guard.report().steps == 12
    assert float(divergences(then, model, data).mean()) <= 0.005 * (1 + 1e-9)
    for ours, theirs in zip(model.blocks[0].parameters(), then.blocks[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("constraint", ["features", "none"])
def test_half_precision_is_accounted_in_float32(constraint: str) -> None:
    model, data = TinyLM().bfloat16(), batches()
    then = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    guard = protect_module(model, optimizer, data, 0.01, constraint=constraint, measure_every=10, project_every=1)
    train(model, optimizer, 20)
    report = guard.finish()
    assert report.kl_mean <= 0.01
    # the model's own bfloat16 logits, compared in float64
    assert report.kl_mean == pytest.approx(float(divergences(then, model, data).mean()), rel=1e-9)


def test_what_rounding_holds_back_is_not_lost() -> None:
    from nsrl.editing.post_training.way import Way

    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    way = Way({"p": p}, lambda d: 0.4 * d)
    for _ in range(8):  # one unit in the last place of a bfloat16 at 1, of which 0.4 rounds to nothing
        with torch.no_grad():
            p += 2.0**-7
        way.retract()
    expected = 0.0
    for _ in range(8):
        expected = 0.4 * (expected + 2.0**-7)
    assert way.made is not None
    torch.testing.assert_close(way.made, torch.full((4,), expected), rtol=0.6, atol=0)


@pytest.mark.parametrize("constraint", ["features", "kronecker", "none"])
def test_a_resumed_run_is_the_same_to_the_bit(constraint: str, tmp_path) -> None:
    options = {"constraint": constraint, "measure_every": 4, "project_every": 2, "kl_budget": 0.05}
    data = batches()

    def begin() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = TinyLM()
        return model, torch.optim.Adam(model.parameters(), 1e-2)

    whole, optimizer = begin()
    guard = protect_module(whole, optimizer, data, **options)
    train(whole, optimizer, 9)
    torch.save(
        {"guard": guard.state_dict(), "model": whole.state_dict(), "optimizer": optimizer.state_dict()},
        tmp_path / "state.pt",
    )
    train(whole, optimizer, 9, 9)
    first = guard.finish()

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed, optimizer = begin()
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))  # which would go on in the moments that it is given
    guard = protect_module(resumed, optimizer, data, resume=saved["guard"], **options)
    train(resumed, optimizer, 9, 9)
    second = guard.finish()
    assert same(whole, resumed)
    assert (first.kl_mean, first.multiplier, first.steps) == (second.kl_mean, second.multiplier, second.steps)
    assert first.kl_mean > 1e-3  # the reference is the first one, not what was resumed from

    loaded, optimizer = begin()
    guard = protect_module(loaded, optimizer, data, **options)
    loaded.load_state_dict(saved["model"])
    optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))  # which would go on in the moments that it is given
    guard.load_state_dict(saved["guard"])
    train(loaded, optimizer, 9, 9)
    guard.finish()
    assert same(whole, loaded)


def test_an_exception_in_the_loop_and_remove_leave_the_optimizer_as_it_was() -> None:
    model = TinyLM()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(KeyError), protect_module(model, optimizer, batches()):
        raise KeyError
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_a_loop_that_diverges_gets_the_last_feasible_parameters_and_a_sentence() -> None:
    model = TinyLM()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    guard = protect_module(model, optimizer, batches(), measure_every=2, pull_every=0, constraint="none")
    train(model, optimizer, 2)
    feasible = state(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    with pytest.raises(NsrlError, match="diverged"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(state(model), feasible, strict=True))
    assert math.isfinite(guard.report().kl_mean)


def test_plain_modules_and_two_optimizers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5))
    inputs = torch.randn(40, 6)
    first, second = (torch.optim.SGD(model[i].parameters(), 0.5) for i in (0, 2))
    guard = protect_module(model, first, [(inputs, torch.zeros(40))], 0.01, measure_every=1)
    then = model(inputs).detach()
    for _ in range(5):
        first.zero_grad(), second.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(16, 6)), torch.randint(5, (16,))).backward()
        second.step()
        first.step()
    kl = kl_divergence(Categorical(logits=then.double()), Categorical(logits=model(inputs).detach().double())).mean()
    assert guard.report().kl_mean == pytest.approx(float(kl), rel=1e-9)
    assert guard.report().parameters == 6 * 12 + 12


def test_tensorboard_gets_the_tags() -> None:
    class Writer:
        def __init__(self) -> None:
            self.rows: list[tuple[str, float, int]] = []

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.rows.append((tag, value, step))

    model, writer = TinyLM(), Writer()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    protect_module(model, optimizer, batches(), measure_every=2, writer=writer)
    train(model, optimizer, 4)
    assert {row[2] for row in writer.rows} == {2, 4}
    assert {"retain/kl_mean", "retain/kl_max", "nullspace/update_kept", "nullspace/overhead_fraction"} <= {
        row[0] for row in writer.rows
    }


def bad_preserve() -> list[tuple]:
    return [([], "no batch"), (3, "is a int"), ([{"labels": 1}], "input_ids"), (["text"], "is a str")]


@pytest.mark.parametrize("preserve, told", bad_preserve())
def test_bad_things_to_preserve_are_refused(preserve, told: str) -> None:
    model = TinyLM()
    with pytest.raises(NsrlError, match=told):
        protect_module(model, torch.optim.SGD(model.parameters(), 0.1), preserve)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"kl_budget": 0.0}, "positive"),
        ({"kl_budget": math.nan}, "positive"),
        ({"constraint": "full"}, "one of features"),
        ({"energy": 0.0}, "shares"),
        ({"measure_every": 0}, "at least 1"),
        ({"mesure_every": 2}, "did you mean measure_every"),
        ({"pull_every": -1}, "negative"),
        ({"precision": "bf16"}, "float32 or float64"),
        ({"top_k": 0}, "at least 1"),
    ],
)
def test_bad_options_are_refused(options: dict, told: str) -> None:
    model = TinyLM()
    with pytest.raises(NsrlError, match=told):
        protect_module(model, torch.optim.SGD(model.parameters(), 0.1), batches(), **options)


def test_what_cannot_be_guarded_is_refused_in_a_sentence() -> None:
    model, other = TinyLM(), TinyLM()
    with pytest.raises(NsrlError, match="moves no trainable parameter"):
        protect_module(model, torch.optim.SGD(other.parameters(), 0.1), batches())
    with pytest.raises(NsrlError, match="no step hooks"):
        protect_module(model, object(), batches())
    normed = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(NsrlError, match="running statistics"):
        protect_module(normed, torch.optim.SGD(normed.parameters(), 0.1), torch.randn(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    protect_module(model, optimizer, batches())
    model.norm.requires_grad_(False)
    with pytest.raises(NsrlError, match="others than when it was protected"):
        train(model, optimizer, 1)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    guard = protect_module(other, optimizer, batches())
    with pytest.raises(NsrlError, match="no state of a guard"):
        guard.load_state_dict({})
    kept = guard.state_dict()
    with pytest.raises(NsrlError, match="other preserved tokens"):
        protect_module(other, torch.optim.SGD(other.parameters(), 0.1), batches(seed=8), resume=kept)
