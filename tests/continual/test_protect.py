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
