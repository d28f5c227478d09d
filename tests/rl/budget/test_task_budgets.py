"""A budget for each task of a merged buffer: what counts, what is enforced, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from nsrl import NullSpacePPO, RetentionBuffer
from nsrl.errors import NsrlError
from nsrl.rl.budget.config import RetentionConfig
from nsrl.rl.retention.constraint import RetentionConstraint
from tests.rl.builders import NEW, OLD, SHARED, SMALL, build_agent, generators_left_alone, unzipped, zipped
from tests.rl.oracles import state_kls, within
from tests.tolerances import relative

BUDGETS = {"first": 0.002, "second": 0.02}


def merged() -> tuple[PPO, RetentionBuffer]:
    """An agent, and its states on two tasks, of which the second has fewer; copies for every test."""
    with generators_left_alone():
        content, buffer = _merged()
        return unzipped(content), copy.deepcopy(buffer)


@lru_cache(maxsize=1)
def _merged() -> tuple[bytes, RetentionBuffer]:
    agent = build_agent("discrete")
    buffers = [
        RetentionBuffer.collect(agent, env["discrete"], n_states=states, n_envs=2, task=task)
        for env, states, task in ((OLD, 120, "first"), (NEW, 80, "second"))
    ]
    return zipped(agent), RetentionBuffer.merge(buffers)


def moved(budgets: dict[str, float] | None) -> RetentionConstraint:
    """A constraint whose policy has moved away from the reference."""
    agent, buffer = merged()
    policy = type(agent.policy)(**agent.policy._get_constructor_parameters())
    policy.load_state_dict(agent.policy.state_dict())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return RetentionConstraint(policy, buffer, task_budgets=budgets)


def build(budgets: dict[str, float], **options) -> NullSpacePPO:
    agent, buffer = merged()
    envs = make_vec_env(NEW["discrete"], 2, seed=0)
    return NullSpacePPO.from_pretrained(agent, envs, retain=buffer, task_budgets=budgets, **{**SHARED, **options})


def test_the_mean_weighs_tasks_by_their_budgets_and_the_worst_share_counts() -> None:
    constraint = moved(BUDGETS)
    with torch.no_grad():
        kl = state_kls(constraint.policy, constraint.buffer).numpy()
    means = {task: kl[constraint.buffer.source == index].mean() for index, task in enumerate(BUDGETS)}
    shares = {task: means[task] / budget for task, budget in BUDGETS.items()}
    unit = 2 / (1 / 0.002 + 1 / 0.02)
    measured = constraint.measure()
    assert measured.kl_by_task == pytest.approx(means, rel=1e-4)
    assert measured.kl_mean == pytest.approx(unit * sum(shares.values()) / 2, rel=1e-4)
    assert constraint.divergence() == pytest.approx(measured.kl_mean, rel=1e-12)
    assert constraint.binding_divergence() == pytest.approx(unit * max(shares.values()), rel=1e-4)
    assert constraint.divergences()[0] == constraint.binding_divergence() > measured.kl_mean
    config = RetentionConfig(task_budgets=BUDGETS).with_overall_budget()
    assert config.kl_budget == pytest.approx(unit)


def test_the_gradient_is_that_of_the_weighted_mean() -> None:
    constraint = moved(BUDGETS)
    everything = torch.arange(len(constraint.buffer))
    _, gradient = constraint.gradient(everything)
    expected = torch.zeros_like(gradient)
    for index, (task, share) in enumerate(constraint.shares.items()):
        states = torch.as_tensor((constraint.buffer.source == index).nonzero()[0])
        expected += moved({name: 1.0 for name in BUDGETS}).gradient(states)[1] / share / 2
        assert share == pytest.approx(BUDGETS[task] * (1 / 0.002 + 1 / 0.02) / 2)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-8)


def test_equal_budgets_of_equally_many_states_change_nothing_but_what_counts() -> None:
    _, buffer = merged()
    half = RetentionBuffer.merge([replace(buffer, source=None, provenance={**buffer.origins[i]}) for i in (0, 1)])
    policy = moved(None).policy
    plain = RetentionConstraint(policy, half)
    ours = RetentionConstraint(policy, half, task_budgets={"first": 0.01, "second": 0.01})
    measured, expected = ours.measure(), plain.measure()
    # the mean of a task over its share adds up other states than the mean of all, in float64
    assert measured.kl_bound == pytest.approx(expected.kl_bound, rel=relative(torch.float64, len(half)))
    assert replace(measured, kl_bound=expected.kl_bound) == expected
    assert torch.equal(ours.gradient(ours.train)[1], plain.gradient(plain.train)[1])
    assert plain.binding_divergence() == plain.divergence()


@pytest.mark.parametrize("options", [{}, {"projection": "euclidean", "gradient": "projected"}])
def test_every_task_stays_within_its_own_budget(options: dict[str, str]) -> None:
    budgets = {"first": 1e-5, "second": 1e-3}
    model = build(budgets, **options)
    buffer, shares = model.retention.constraint.buffer, []

    class Watch:
        def __init__(self) -> None:
            self.end = model.retention.end
            model.retention.end = self

        def __call__(self) -> dict[str, float]:
            scalars = self.end()
            with torch.no_grad():
                kl = state_kls(model.policy, buffer)
            means = {task: float(kl[buffer.source == index].mean()) for index, task in enumerate(budgets)}
            shares.append(max(means[task] / within(budget, buffer) for task, budget in budgets.items()))
            assert scalars["retain/first/kl_mean"] == model.retention.last.kl_by_task["first"]
            assert model.retention.last.kl_by_task == pytest.approx(means, rel=1e-2)
            return scalars

    Watch()
    model.learn(640)
    assert len(shares) == 5 and 0.3 < max(shares) <= 1.0
    report = model.retention_report()
    assert report.budget == pytest.approx(2 / (1e5 + 1e3)) and report.kl_mean <= report.budget
    # one overall budget of the same size would not have kept the smaller one
    assert report.kl_by_task["first"] <= 1e-5


def test_a_single_task_has_its_budget_and_its_name_too() -> None:
    agent, _ = merged()
    alone = RetentionBuffer.collect(agent, OLD["discrete"], n_states=40, n_envs=2, task="first")
    policy = moved(None).policy
    constraint = RetentionConstraint(policy, alone, task_budgets={"first": 0.5})
    measured = constraint.measure()
    assert measured.kl_by_task == {"first": measured.kl_mean}
    assert constraint.binding_divergence() == measured.kl_mean
    assert RetentionConstraint(policy, alone).measure().kl_by_task == {}


def test_bad_budgets_are_refused() -> None:
    with pytest.raises(NsrlError, match="for the tasks first, but the buffer holds states of first, second"):
        build({"first": 0.1})
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(NsrlError, match="task_budgets must be numbers of nats > 0"):
            RetentionConfig(task_budgets={"first": value})
    for options in ({"kl_budget": 1e-12}, {"task_budgets": {"first": 0.1, "second": 9e-11}}):
        with pytest.raises(NsrlError, match="less than single precision can measure"):
            RetentionConfig(**options)
    assert RetentionConfig(kl_budget=0.0).tolerance == 1e-6 and RetentionConfig(kl_budget=1e-9).tolerance == 1e-9


def test_a_policy_that_is_over_the_budget_of_one_task_is_refused() -> None:
    agent, buffer = merged()
    outputs = buffer.outputs.copy()
    outputs[buffer.source == 0, 0] += 1.0
    envs = make_vec_env(NEW["discrete"], 2, seed=0)
    with pytest.raises(NsrlError, match="before any update, over the budget"):
        NullSpacePPO.from_pretrained(
            agent,
            envs,
            retain=replace(buffer, outputs=outputs),
            trust_buffer=True,
            task_budgets={"first": 0.01, "second": 10.0},
            **SMALL,
        )
