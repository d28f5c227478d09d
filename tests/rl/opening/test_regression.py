"""Opening the outputs: the wanted share where the budget leaves room, the budget at every step in any case."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stable_baselines3 import PPO

from nsrl import RetentionBuffer
from nsrl.rl.opening.columns import redraw_columns
from nsrl.rl.opening.regression import open_outputs
from nsrl.rl.opening.stage import targets_of
from nsrl.rl.opening.states import NewStates
from nsrl.rl.policies.actor_critic import policy_outputs
from nsrl.rl.retention.constraint import RetentionConstraint
from tests.rl.builders import certain
from tests.rl.oracles import independent_kl, within
from tests.tolerances import assert_near


def entropy_share(agent: PPO, states: torch.Tensor) -> float:
    """By SB3's own distribution."""
    with torch.no_grad():
        entropy = agent.policy.get_distribution(states).entropy()
    return float(entropy.mean()) / float(torch.log(torch.tensor(2.0)))


def under_the_new_context(buffer: RetentionBuffer) -> torch.Tensor:
    states = buffer.inputs().clone()
    states[:, -1] = 1.0
    return states


def opened(
    agent: PPO, buffer: RetentionBuffer, states: torch.Tensor, share: float, budget: float, columns: bool = True
) -> tuple[int, list[float], list[float]]:
    """Steps, shares and independently measured KLs, those behind the last step included."""
    constraint = RetentionConstraint(agent.policy, buffer)
    shares: list[float] = []
    kls: list[float] = []

    def look(told: float, kl: float) -> None:
        shares.append(told)
        kls.append(independent_kl(agent, buffer))
        assert kl <= budget
        # a share is a mean of x log x of float32 logits
        assert_near(torch.tensor(told), torch.tensor(entropy_share(agent, states)), terms=256, scale=32.0)

    if columns:
        redraw_columns(agent.policy, constraint.inputs, states, seed=0)
    targets = targets_of(constraint)
    steps = open_outputs(agent.policy, constraint, NewStates(states, None), targets, share, budget, look)
    look(entropy_share(agent, states), constraint.binding_divergence())
    return steps, shares, kls


@pytest.mark.parametrize("budget", [0.01, 1e-3])
def test_a_certain_policy_tries_things_on_the_new_task_and_the_budget_holds_at_every_step(budget: float) -> None:
    agent, buffer = certain(gap=30.0)
    states = under_the_new_context(buffer)
    start = entropy_share(agent, states)
    steps, shares, kls = opened(agent, buffer, states, 0.9, budget)
    assert steps == len(shares) - 2  # it looks before every step and, here, once behind the last
    assert max(kls) <= within(budget, buffer)
    assert start < 0.3 and shares[-1] >= 0.9


def test_a_budget_of_nothing_is_kept_too() -> None:
    """`RetentionConfig.tolerance` is what counts as zero."""
    agent, buffer = certain(gap=30.0)
    _, _, kls = opened(agent, buffer, under_the_new_context(buffer), 0.9, 1e-6)
    assert len(kls) >= 2 and max(kls) <= within(0.0, buffer)


@pytest.mark.parametrize("budget", [1e-4, 1e-2])
def test_where_both_tasks_look_alike_the_budget_holds_and_the_share_is_out_of_reach(budget: float) -> None:
    """By Pinsker's inequality a policy within 0.01 nats of a certain one is not open."""
    agent, buffer = certain(gap=30.0)
    _, shares, kls = opened(agent, buffer, buffer.inputs().clone(), 0.9, budget, columns=False)
    assert len(kls) >= 2 and max(kls) <= within(budget, buffer) and shares[-1] < 0.9


def test_an_open_policy_is_left_as_it_is() -> None:
    agent, buffer = certain(gap=0.1)
    before = {name: value.clone() for name, value in agent.policy.state_dict().items()}
    told: list[Any] = []
    constraint = RetentionConstraint(agent.policy, buffer)
    states = NewStates(under_the_new_context(buffer), None)
    targets = targets_of(constraint)
    assert open_outputs(agent.policy, constraint, states, targets, 0.5, 0.01, lambda *seen: told.append(seen)) == 0
    assert len(told) == 1 and told[0][0] > 0.5
    assert all(torch.equal(value, before[name]) for name, value in agent.policy.state_dict().items())
    assert policy_outputs(agent.policy, states.inputs).requires_grad  # nothing is left switched off
