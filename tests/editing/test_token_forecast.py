"""The forecast of what new data costs, against dense algebra and against what happens."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from nsrl.editing.post_training.forecast import Calibration, forecast_cost
from nsrl.editing.post_training.preserved import Preserved
from nsrl.errors import NsrlError
from tests.editing.tiny_lm import TinyLM, batches, loss


def new(count: int = 3) -> list[dict]:
    return batches(count, seed=50, padded=False)


def test_it_is_the_quadratic_form_of_dense_algebra() -> None:
    model, data = TinyLM(blocks=1).double(), batches(2)
    found = forecast_cost(model, data, new(), loss, learning_rate=0.01, steps=5, optimizer="sgd")
    named = {name: p.detach() for name, p in model.named_parameters()}

    def answers(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        kept = []
        for batch in data:
            logits = torch.func.functional_call(model, parameters, (), batch, tie_weights=True).logits
            kept.append(logits[batch["attention_mask"].bool()])
        return torch.cat(kept)

    moves = []
    for batch in new():
        grads = torch.autograd.grad(loss(model, batch), list(model.parameters()))
        moves.append({name: -0.01 * g for name, g in zip(named, grads, strict=True)})
    effects = torch.stack([torch.func.jvp(answers, (named,), (move,))[1] for move in moves])
    p = 0.999 * answers(named).softmax(-1) + 0.001 / 23  # the tempering of the token metric
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    gram = torch.einsum("ano,nop,bnp->ab", effects, hessian, effects) / len(p)
    mean, whole = float(gram.mean()), float(gram.trace()) / 3
    scatter = (whole - mean) * 3 / 2
    assert found.kl_step == pytest.approx(0.5 * whole, rel=1e-6)
    assert found.kl_noise == pytest.approx(0.5 * 5 * scatter, rel=1e-6)
    assert found.kl_drift == pytest.approx(0.5 * 25 * max(mean - scatter / 3, 0.0), rel=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_single_small_step_costs_what_was_forecast(optimizer: str) -> None:
    then, data = TinyLM(), batches(2)
    batch = new(1)[0]
    rate = 1e-3 if optimizer == "sgd" else 1e-5
    found = forecast_cost(then, data, [batch, batch], loss, learning_rate=rate, steps=1, optimizer=optimizer)
    model = copy.deepcopy(then).double()
    preserved = Preserved(model, data)
    make = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
    stepper = make(model.parameters(), rate)
    loss(model, batch).backward()
    stepper.step()
    # second order in a step this small; tempering and the third order are the rest
    assert preserved.measure().kl_mean == pytest.approx(found.kl, rel=0.05)
    assert found.kl == pytest.approx(found.kl_step, rel=1e-6) and found.kl_noise == pytest.approx(0.0, abs=1e-12)


def test_a_calibration_finds_the_line_and_its_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    kl = torch.logspace(-4, 0, 200, dtype=torch.float64)
    noise = 0.3 * torch.randn(200, dtype=torch.float64, generator=generator)
    measured = torch.exp(math.log(0.5) + 0.8 * kl.log() + noise)
    found = Calibration.fit(kl.tolist(), measured.tolist())
    # four standard errors: spread / (sqrt(n) std of the logarithms) for the slope
    assert found.slope == pytest.approx(0.8, abs=0.04) and found.spread == pytest.approx(0.3, rel=0.2)
    assert found.rank_correlation > 0.95 and found.runs == 200
    low, middle, high = found.expected(0.01)
    assert low < middle < high and middle == pytest.approx(0.5 * 0.01**0.8, rel=0.2)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"optimizer": "lion"}, "one of adam"),
        ({"steps": 0}, "positive"),
        ({"learning_rate": math.nan}, "positive"),
        ({"new": []}, "at least two"),
    ],
)
def test_bad_questions_are_refused(options: dict, told: str) -> None:
    given = {"new": new(), "learning_rate": 0.1, "steps": 1, **options}
    with pytest.raises(NsrlError, match=told):
        forecast_cost(TinyLM(), batches(), given.pop("new"), loss, **given)
    with pytest.raises(NsrlError, match="three pairs"):
        Calibration.fit([1.0], [1.0])
