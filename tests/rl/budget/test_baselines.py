"""The rivals add to the gradient what their papers say."""

from __future__ import annotations

import pytest
import torch

from nsrl import NullSpacePPO, NullSpaceTRPO
from nsrl.errors import NsrlError
from nsrl.rl.policies.actor_critic import policy_outputs
from tests.rl.builders import NEW, SMALL, trained
from tests.tolerances import assert_near


@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_output_replay_adds_the_gradient_of_the_squared_distance(kind: str) -> None:
    agent, buffer = trained(kind)
    model = NullSpacePPO.from_pretrained(agent, NEW[kind], retain=buffer, method="der", penalty=0.3, **SMALL)
    constraint = model.retention.constraint
    with torch.no_grad():
        for parameter in constraint.parameters.parameters:
            parameter.add_(0.05 * torch.randn_like(parameter))
    rows = constraint.train[:17]
    found = constraint.output_errors(rows)
    outputs = policy_outputs(model.policy, constraint.inputs[rows])
    loss = 0.5 * (outputs - constraint.reference[rows]).square().sum(1).mean()
    wanted = torch.autograd.grad(loss, constraint.parameters.parameters, allow_unused=True)
    for name, mine, other in zip(constraint.names, found, wanted, strict=True):
        expected = torch.zeros_like(mine) if other is None else other
        assert_near(mine, expected, dtype=torch.float32, terms=17 * 64), name


def test_a_coefficient_is_at_least_0_and_trpo_has_no_minibatch_steps() -> None:
    agent, buffer = trained()
    with pytest.raises(NsrlError, match="penalty must be a coefficient >= 0"):
        NullSpacePPO.from_pretrained(agent, NEW["discrete"], retain=buffer, method="der", penalty=-1.0, **SMALL)


@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_agem_leaves_no_part_that_raises_the_kl_of_its_minibatch(kind: str) -> None:
    agent, buffer = trained(kind)
    model = NullSpacePPO.from_pretrained(agent, NEW[kind], retain=buffer, method="agem", batch_states=512, **SMALL)
    engine, constraint = model.retention, model.retention.constraint
    flat = constraint.parameters
    with torch.no_grad():
        for parameter in flat.parameters:
            parameter.add_(0.05 * torch.randn_like(parameter))
    # all training states are one minibatch: what the engine draws is known
    _, retained = constraint.gradient(constraint.train)
    engine.begin()
    other = torch.randn_like(retained)
    for sign, name in ((1.0, "helps"), (-1.0, "harms")):
        flat.set_gradient(sign * retained + 0.1 * other - 0.1 * (other @ retained) / (retained @ retained) * retained)
        before = flat.gradient()
        engine._before_step()
        after = flat.gradient()
        assert torch.equal(after, before) is (name == "helps")
        if name == "harms":
            size = float(before.norm() * retained.norm())
            assert abs(float(after @ retained)) <= 1e-4 * size  # a dot product of float32, of thousands of terms
            expected = before.double() - (before.double() @ retained.double()) / retained.double().square().sum() * (
                retained.double()
            )
            torch.testing.assert_close(after.double(), expected, rtol=1e-3, atol=1e-5 * float(before.abs().max()))
    engine.abandon()


def test_projected_gradients_see_no_linearised_state_and_the_budget_is_not_kept() -> None:
    agent, buffer = trained()
    model = NullSpacePPO.from_pretrained(
        agent, NEW["discrete"], retain=buffer, method="gradient_only", seed=0, **{**SMALL, "learning_rate": 0.03}
    )
    engine = model.retention
    assert not engine.enforces
    engine.begin()
    flat = engine.constraint.parameters
    flat.set_gradient(torch.randn(sum(flat.sizes)))
    before = flat.gradient()
    engine._before_step()
    jacobian = engine._projector.jacobian
    # projected in float64 from float32 rows: what is left is their rounding
    assert float(jacobian.matvec(flat.gradient()).norm()) <= 1e-3 * float(jacobian.matvec(before).norm())
    engine.abandon()
    model.learn(512)
    assert model.retention_report().kl_most > 0.01  # Adam leaves the null space again


def test_a_method_without_a_coefficient_takes_none_and_trpo_refuses_it() -> None:
    agent, buffer = trained()
    for method in ("agem", "gradient_only"):
        with pytest.raises(NsrlError, match="first-order optimizer"):
            NullSpaceTRPO.from_pretrained(agent, NEW["discrete"], retain=buffer, method=method)
