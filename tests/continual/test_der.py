"""Dark experience replay: its steps against plain autograd, its reservoir against what algorithm R promises."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nsrl.continual import MultiHead, OptimizerConfig, Task
from nsrl.continual.reservoir import Reservoir
from nsrl.errors import NsrlError
from nsrl.reading.limits import Unreadable
from tests.continual.learning import blobs, build, learn

SGD = OptimizerConfig("sgd", lr=0.05)
#: Round-off of a step of size lr * gradient in float32: some ten products of numbers near one.
CLOSE = 1e-6


@pytest.mark.parametrize("name", ["der", "derpp"])
def test_a_step_is_that_of_the_papers_loss(name):
    weights = {"alpha": 0.7, **({"beta": 0.3} if name == "derpp" else {})}
    strategy = build(name, optimizer=SGD, buffer_size=60, batch_samples=60, **weights)
    learn(strategy, Task("first", 0), blobs(0), epochs=2)
    kept, second = strategy.reservoir, blobs(1)
    assert len(kept) == 60  # all of it is drawn, so that the draws are known
    strategy.before_task(Task("second", 1), second)
    model = strategy.model
    loss = F.cross_entropy(model(second.inputs), second.targets)
    now = model(kept.inputs)
    total = loss + 0.7 * F.mse_loss(now, kept.outputs)
    if name == "derpp":
        total = total + 0.3 * F.cross_entropy(now, kept.targets)
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))])
    before = strategy.flat.read()
    assert strategy.step((second.inputs, second.targets, 1)) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert torch.allclose(strategy.flat.read() - before, -0.05 * wanted, atol=CLOSE)


def test_stored_outputs_are_those_of_the_step_in_which_a_sample_came():
    strategy = build("derpp", optimizer=SGD, buffer_size=200, batch_samples=8)
    loader = blobs(0)
    strategy.before_task(Task("first", 0), loader)
    then = []
    for inputs, targets in loader:
        with torch.no_grad():
            then.append(strategy.model(inputs))
        strategy.step((inputs, targets, 0))
    kept = strategy.reservoir
    assert torch.equal(kept.inputs[:96], loader.inputs) and torch.equal(kept.targets[:96], loader.targets)
    # rows of one product may be summed in another order when there are more of them
    assert torch.allclose(kept.outputs[:96], torch.cat(then), atol=1e-5)
    assert strategy.memory_bytes() == 96 * (4 * 12 + 8 + 4 * 3)


@pytest.mark.parametrize("name", ["der", "derpp"])
def test_heads_of_different_widths(name):
    model = MultiHead(nn.Sequential(nn.Linear(12, 24), nn.ReLU()), 24, [3, 5])
    strategy = build(name, model, SGD, buffer_size=300, batch_samples=300, alpha=0.5)
    learn(strategy, Task("a", 0, head=0), blobs(0), epochs=1)
    second = blobs(1)
    strategy.before_task(Task("b", 1, head=1), second)
    for _ in range(2):
        kept, first = strategy.reservoir, strategy.reservoir.heads[: len(strategy.reservoir)] == 0
        inputs, outputs, targets = (t[: len(kept)] for t in (kept.inputs, kept.outputs, kept.targets))
        now = model(inputs[first], 0)
        gaps = [(now - outputs[first][:, :3]).flatten()]
        labels = [F.cross_entropy(now, targets[first], reduction="sum")]
        if not bool(first.all()):
            now = model(inputs[~first], 1)
            gaps.append((now - outputs[~first]).flatten())
            labels.append(F.cross_entropy(now, targets[~first], reduction="sum"))
        total = F.cross_entropy(model(second.inputs, 1), second.targets) + 0.5 * torch.cat(gaps).square().mean()
        if name == "derpp":
            total = total + 0.5 * sum(labels) / len(kept)
        gradients = torch.autograd.grad(total, list(model.parameters()), allow_unused=True, materialize_grads=True)
        wanted = torch.cat([g.flatten() for g in gradients])
        before = strategy.flat.read()
        strategy.step((second.inputs, second.targets, 1))
        assert torch.allclose(strategy.flat.read() - before, -0.05 * wanted, atol=CLOSE)


def test_every_sample_of_a_stream_is_as_likely_to_be_kept():
    runs, length, capacity = 1000, 60, 12
    stream = torch.arange(length, dtype=torch.float32).unsqueeze(1)
    counts = torch.zeros(length)
    for seed in range(runs):
        reservoir = Reservoir(capacity, seed)
        for batch in stream.split(7):
            reservoir.offer(batch, batch[:, 0].long(), batch, None)
        kept = reservoir.targets[: len(reservoir)]
        assert len(kept.unique()) == capacity and torch.equal(reservoir.inputs[:, 0].long(), kept)
        counts[kept] += 1
    share = capacity / length
    # binomial: 4.5 deviations, of 60 counts, are passed once in 2500 such tests by a right reservoir
    assert float((counts - runs * share).abs().max()) < 4.5 * math.sqrt(runs * share * (1 - share))


def test_a_draw_is_of_different_samples_and_goes_on_where_it_was():
    reservoir = Reservoir(10, seed=3)
    inputs = torch.randn(25, 4)
    reservoir.offer(inputs, torch.arange(25), inputs[:, :2], None)
    again = Reservoir(10, seed=8)
    again.resume(reservoir.progress())
    for _ in range(3):
        draw = reservoir.draw(4)
        assert len(draw.unique()) == 4 and torch.equal(draw, again.draw(4))
    for one in (reservoir, again):
        one.offer(inputs + 1, torch.arange(25), inputs[:, :2], None)
    assert torch.equal(reservoir.inputs, again.inputs) and reservoir.seen == again.seen == 50
    assert reservoir.heads_of(draw) is None and len(reservoir.draw(40)) == 10


def test_bad_input_is_one_sentence():
    with pytest.raises(NsrlError, match="at least 1"):
        build("der", buffer_size=0)
    with pytest.raises(NsrlError, match="beta must not be negative"):
        build("derpp", beta=-1.0)
    with pytest.raises(NsrlError, match="alpha must not be negative"):
        build("der", alpha=float("nan"))
    reservoir = Reservoir(4)
    reservoir.offer(torch.zeros(2, 3), torch.zeros(2).long(), torch.zeros(2, 2), None)
    with pytest.raises(NsrlError, match="needs one shape"):
        reservoir.offer(torch.zeros(2, 5), torch.zeros(2).long(), torch.zeros(2, 2), None)
    with pytest.raises(Unreadable, match="targets must be a tensor of 2 samples"):
        Reservoir(4).resume({**reservoir.progress(), "targets": torch.zeros(3)})
    with pytest.raises(Unreadable, match="random generator"):
        Reservoir(4).resume({**reservoir.progress(), "generator": torch.zeros(3)})
