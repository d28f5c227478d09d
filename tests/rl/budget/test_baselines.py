"""The rivals add to the gradient what their papers say."""

from __future__ import annotations

import pytest
import torch

from nsrl import NullSpacePPO
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
