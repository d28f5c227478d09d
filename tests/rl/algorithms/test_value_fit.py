"""The critic's fit against the plain loop of SB3: autograd, and the optimizer's own step."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from stable_baselines3.common.policies import ActorCriticPolicy

from nsrl.rl.algorithms.value_fit import fit_values
from nsrl.rl.policies.actor_critic import policy_outputs, reached_parameters, select
from tests.rl.policy_builders import build_policy, draw_rollout


def plain_fit(policy: ActorCriticPolicy, rollout: object, actor: list, epochs: int, batch_size: int) -> float:
    errors = []
    for _ in range(epochs):
        for batch in torch.randperm(len(rollout.returns)).split(batch_size):
            values = policy.predict_values(select(rollout.observations, batch)).flatten()
            loss = F.mse_loss(values, rollout.returns[batch])
            errors.append((values - rollout.returns[batch]).detach())
            policy.optimizer.zero_grad()
            loss.backward()
            for parameter in actor:
                parameter.grad = None
            policy.optimizer.step()
    return float(torch.cat(errors).square().mean())


def use_optimizer(policy: ActorCriticPolicy, name: str) -> None:
    kinds = {
        "adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-5),
        "adam with decay": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, betas=(0.8, 0.99)),
        "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    }
    policy.optimizer = kinds[name](policy.parameters())


@pytest.mark.parametrize(
    ("network", "optimizer"),
    [
        ("tanh", "adam"),
        ("relu", "adam with decay"),
        ("silu", "amsgrad"),
        ("dict", "rmsprop"),
        ("linear", "sgd"),
        ("shared cnn", "adam"),
    ],
)
def test_it_is_the_plain_loop(network: str, optimizer: str) -> None:
    ours = build_policy("box", network)
    rollout = draw_rollout(ours, 10)
    use_optimizer(ours, optimizer)
    plain = copy.deepcopy(ours)
    actors = [reached_parameters(p, policy_outputs(p, rollout.observations)) for p in (ours, plain)]
    before = [parameter.clone() for parameter in ours.parameters()]
    reached = reached_parameters(ours, ours.predict_values(rollout.observations))
    own = [parameter for parameter in reached if all(parameter is not other for other in actors[0])]
    losses = []
    for _ in range(2):  # the second time on the optimizer's state of the first
        torch.manual_seed(1)
        losses.append(fit_values(ours, rollout.observations, rollout.returns, own, epochs=3, batch_size=4))
        torch.manual_seed(1)
        losses.append(plain_fit(plain, rollout, actors[1], 3, 4))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9) and losses[2] == pytest.approx(losses[3], rel=1e-9)
    assert losses[2] < losses[0]
    for (name, one), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    moved = [not torch.equal(old, new) for old, new in zip(before, ours.parameters(), strict=True)]
    assert moved == [any(parameter is other for other in own) for parameter in ours.parameters()]
    states = ours.optimizer.state_dict(), plain.optimizer.state_dict()
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for key, state in states[0]["state"].items():
        for entry, value in state.items():
            torch.testing.assert_close(value, states[1]["state"][key][entry], rtol=1e-8, atol=1e-9)


def test_gradients_left_from_before_move_nothing() -> None:
    policy = build_policy("discrete")
    rollout = draw_rollout(policy)
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    actor = [parameter.clone() for parameter in policy.action_net.parameters()]
    fit_values(policy, rollout.observations, rollout.returns, [policy.value_net.bias], epochs=1, batch_size=5)
    assert all(torch.equal(old, new) for old, new in zip(actor, policy.action_net.parameters(), strict=True))
