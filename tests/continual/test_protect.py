"""`protect` in a hand-written loop of plain torch."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nsrl.continual import protect
from nsrl.errors import NsrlError
from tests.continual.learning import Batches, accuracy, blobs, multi_head, network


def _train(model, optimizer, loader, epochs=20, head=None) -> None:
    for _ in range(epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs) if head is None else model(inputs, head), targets).backward()
            optimizer.step()


@pytest.mark.parametrize("method", ["kl_budget", "combined"])
def test_old_task_stays_in_the_budget_and_the_new_one_is_learnt(method):
    model, first, second = network(), blobs(0), blobs(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    guard = protect(model, optimizer, method=method, kl_budget=0.02, enforce_every=10)
    _train(model, optimizer, first)
    guard.after_task(first)
    kept = guard.budget.retained.memory.inputs
    then = model(kept).detach()
    _train(model, optimizer, second, epochs=40)
    assert guard.enforce()["largest_kl"] <= 0.02
    now = model(kept).detach()
    assert float(F.kl_div(now.log_softmax(1), then.log_softmax(1), log_target=True, reduction="batchmean")) <= 0.0201
    assert accuracy(model, first) > 0.95 and accuracy(model, second) > 0.9


def test_features_keep_outputs_exactly():
    model, loader = network(width=64), blobs(0, samples=20, rank=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    guard = protect(model, optimizer, method="features", energy=1.0)
    _train(model, optimizer, loader)
    guard.after_task(loader)
    then = model(loader.inputs).detach()
    _train(model, optimizer, blobs(1))
    guard.enforce()
    assert float((model(loader.inputs).detach() - then).abs().max()) <= 1e-5


def _accumulated(model, optimizer, loader) -> None:
    batches = list(loader)
    for some in zip(batches[::2], batches[1::2], strict=False):
        optimizer.zero_grad()
        for inputs, targets in some:
            (F.cross_entropy(model(inputs), targets) / len(some)).backward()
        optimizer.step()


def _clipped(model, optimizer, loader) -> None:
    for inputs, targets in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


def _scaled(model, optimizer, loader) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for inputs, targets in loader:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(inputs).float(), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def _inside_autocast(model, optimizer, loader) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        _train(model, optimizer, loader, epochs=1)


def _scheduled(model, optimizer, loader) -> None:
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=100)
    for inputs, targets in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        scheduler.step()


LOOPS = {
    "plain": lambda model, optimizer, loader: _train(model, optimizer, loader, epochs=1),
    "accumulation": _accumulated,
    "clipping": _clipped,
    "scaler": _scaled,
    "autocast": _inside_autocast,
    "scheduler": _scheduled,
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.5, dampening=0.2),
        lambda p: torch.optim.AdamW(p, lr=5e-3, weight_decay=0.05),
        lambda p: torch.optim.RMSprop(p, lr=2e-3, momentum=0.5),
    ],
)
@pytest.mark.parametrize("parallel", [False, True])
def test_every_kind_of_loop_stays_in_the_budget(loop, build, parallel):
    inner = network()
    model = torch.nn.DataParallel(inner) if parallel else inner
    optimizer = build(model.parameters())
    guard = protect(model, optimizer, kl_budget=0.02, enforce_every=7, relax_every=3)
    first, second = blobs(0), blobs(1)
    for _ in range(15):
        LOOPS[loop](model, optimizer, first)
    guard.after_task(first)
    inputs = guard.budget.retained.memory.inputs
    then = inner(inputs).detach()
    start = [p.detach().clone() for p in inner.parameters()]
    for _ in range(15):
        LOOPS[loop](model, optimizer, second)
    guard.enforce()
    now = inner(inputs).detach()
    # the budget is kept on outputs of float32, whose round-off in a KL of 0.02 is below 1e-5
    assert float(F.kl_div(now.log_softmax(1), then.log_softmax(1), log_target=True, reduction="batchmean")) <= 0.02001
    assert any(not torch.equal(a, b) for a, b in zip(start, inner.parameters(), strict=True))
    assert accuracy(inner, first) > 0.9


@pytest.mark.parametrize("clipped", [False, True])
def test_what_is_added_comes_behind_clipping_and_accumulation(clipped):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    guard = protect(model, optimizer, draw_every=1)
    _train(model, optimizer, blobs(0), epochs=3)
    guard.after_task(blobs(0))
    twin, budget = copy.deepcopy((model, guard.budget))
    steps = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    steps.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    # by hand: the gradient of two batches, clipped, and then that of the budget
    batches = list(blobs(1))[:2]
    for network_, optimizer_ in ((model, optimizer), (twin, steps)):
        optimizer_.zero_grad()
        for inputs, targets in batches:
            (0.5 * F.cross_entropy(network_(inputs), targets)).backward()
        if clipped:
            torch.nn.utils.clip_grad_norm_(network_.parameters(), 0.1)
    budget.add_gradient()
    optimizer.step()
    steps.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=0.0)


def test_what_cannot_be_guarded_is_refused():
    model = network()
    with pytest.raises(NsrlError, match="LBFGS"):
        protect(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(NsrlError, match="maximizes"):
        protect(model, torch.optim.SGD(model.parameters(), lr=0.1, maximize=True))
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    guard = protect(model, optimizer)
    _train(model, optimizer, blobs(0), epochs=1)
    guard.after_task(blobs(0))
    with pytest.raises(NsrlError, match=r"scaler\.unscale_"):
        _scaled(model, optimizer, blobs(1))
    with pytest.raises(NsrlError, match="call backward before"):
        optimizer.step(lambda: F.cross_entropy(model(blobs(1).inputs), blobs(1).targets))
    guard.detach()
    optimizer.step(lambda: None)


def test_idle_until_the_first_task_is_reported_and_after_detach():
    model = network()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.Adam(m.parameters(), lr=5e-3) for m in (model, twin)]
    guard = protect(model, optimizers[0])
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        _train(m, optimizer, blobs(0), epochs=2)
    guard.after_task(blobs(0))
    guard.detach()
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        _train(m, optimizer, blobs(1), epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert guard.nbytes() > 0


def test_heads():
    model = multi_head()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    guard = protect(model, optimizer, kl_budget=1e-3)
    _train(model, optimizer, blobs(0), head=0)
    guard.after_task(blobs(0), head=0)
    _train(model, optimizer, blobs(1), head=1)
    guard.after_task(blobs(1), head=1)
    assert guard.report()["largest_kl"] <= 1e-3


def test_bad_input_is_one_sentence():
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(NsrlError, match="must be one of kl_budget, features, combined, not 'ewc'"):
        protect(model, optimizer, method="ewc")
    with pytest.raises(NsrlError, match="no option budget"):
        protect(model, optimizer, budget=0.1)
    with pytest.raises(NsrlError, match="'kl_budget' does not use energy"):
        protect(model, optimizer, energy=0.9)
    guard = protect(model, optimizer)
    with pytest.raises(NsrlError, match="the loader is empty"):
        guard.after_task(Batches(torch.zeros(0, 12), torch.zeros(0, dtype=torch.long)))


def test_the_documented_example_runs():
    page = Path(__file__).parents[2] / "docs" / "continual.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    scope: dict = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), scope)
        if "guard.report()" in block:  # a later block trains the same model without the guard
            assert scope["guard"].report()["largest_kl"] <= 0.02
