"""Every kind of SB3 on-policy policy through `policy_outputs`: the outputs, and their Jacobian against jacrev."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from torch import Tensor, nn

from nsrl.projection import jacobian
from nsrl.rl.policies.actor_critic import policy_outputs
from tests.projection.builders import jacrev_matrix

VECTOR = spaces.Box(-1.0, 1.0, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)
MIXED = spaces.Dict({"z": VECTOR, "a": spaces.Discrete(4)})

POLICIES = {
    "mlp": (ActorCriticPolicy, VECTOR, {"net_arch": [5, 4]}),
    "mlp relu": (ActorCriticPolicy, VECTOR, {"net_arch": {"pi": [5], "vf": [3]}, "activation_fn": nn.ReLU}),
    "linear": (ActorCriticPolicy, VECTOR, {"net_arch": []}),
    "discrete states": (ActorCriticPolicy, spaces.Discrete(5), {"net_arch": [4]}),
    "multi-discrete states": (ActorCriticPolicy, spaces.MultiDiscrete([3, 2]), {"net_arch": [4]}),
    "cnn": (ActorCriticCnnPolicy, IMAGE, {"net_arch": [3], "features_extractor_kwargs": {"features_dim": 4}}),
    "dict": (MultiInputActorCriticPolicy, MIXED, {"net_arch": [4]}),
}
ACTIONS = {
    "discrete": spaces.Discrete(3),
    "multi-discrete": spaces.MultiDiscrete([2, 3]),
    "multi-binary": spaces.MultiBinary(2),
    "box": spaces.Box(-1.0, 1.0, (2,), np.float32),
}
every_policy = pytest.mark.parametrize("kind", POLICIES)
shared_or_not = pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])


def build(kind: str, action_space: gym.Space, shared: bool) -> ActorCriticPolicy:
    torch.manual_seed(0)
    policy_class, observation_space, options = POLICIES[kind]
    # unit gain: SB3's 0.01 on the action net would hide errors in the layers below
    policy = policy_class(
        observation_space, action_space, lambda _: 1e-3, share_features_extractor=shared, ortho_init=False, **options
    )
    policy.set_training_mode(False)
    return policy


def observe(kind: str, samples: int = 3) -> Tensor | dict[str, Tensor]:
    space = POLICIES[kind][1]
    space.seed(1)
    rows = [space.sample() for _ in range(samples)]
    if isinstance(space, spaces.Dict):
        return {key: torch.as_tensor(np.stack([row[key] for row in rows])) for key in space.spaces}
    return torch.as_tensor(np.stack(rows))


def actor_parameters(policy: ActorCriticPolicy, observations: Tensor | dict[str, Tensor]) -> list[str]:
    named = [(name, p) for name, p in policy.named_parameters()]
    total = distribution_parameters(policy, observations).sum()
    grads = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
    return [name for (name, _), grad in zip(named, grads, strict=True) if grad is not None]


def distribution_parameters(policy: ActorCriticPolicy, observations: Tensor | dict[str, Tensor]) -> Tensor:
    """The oracle: logits or mean of SB3's own distribution object (logits up to their normalisation)."""
    distribution = policy.get_distribution(observations)
    inner = getattr(distribution, "distribution", None) or distribution.distributions
    if isinstance(inner, list):
        return torch.cat([part.logits for part in inner], -1)
    return inner.mean if hasattr(inner, "scale") else inner.logits


def normalised(outputs: Tensor, action_space: gym.Space) -> Tensor:
    if isinstance(action_space, spaces.Discrete):
        return outputs.log_softmax(-1)
    if isinstance(action_space, spaces.MultiDiscrete):
        return torch.cat([head.log_softmax(-1) for head in outputs.split(action_space.nvec.tolist(), -1)], -1)
    return outputs


@shared_or_not
@pytest.mark.parametrize("action", ACTIONS)
@every_policy
def test_outputs_are_those_of_the_distribution(kind, action, shared):
    policy, observations = build(kind, ACTIONS[action], shared), observe(kind)
    result = normalised(policy_outputs(policy, observations), ACTIONS[action])
    torch.testing.assert_close(result, distribution_parameters(policy, observations))


@shared_or_not
@pytest.mark.parametrize("action", ["discrete", "box"])
@every_policy
def test_jacobian_of_the_actor(kind, action, shared):
    policy, observations = build(kind, ACTIONS[action], shared), observe(kind)
    names = actor_parameters(policy, observations)
    assert not any("value" in name or name == "log_std" for name in names)
    result = jacobian(policy, observations, forward=policy_outputs, parameters=names)
    expected = jacrev_matrix(policy, observations, policy_outputs, names)
    torch.testing.assert_close(result.dense(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.gram(), expected.double() @ expected.double().T, rtol=1e-4, atol=1e-5)


@shared_or_not
@every_policy
def test_jacobian_of_all_parameters(kind, shared):
    """Value net and log_std own columns too: zeros."""
    policy, observations = build(kind, ACTIONS["box"], shared), observe(kind)
    result = jacobian(policy, observations, forward=policy_outputs)
    assert result.shape == (3 * 2, sum(p.numel() for p in policy.parameters()))
    expected = jacrev_matrix(policy, observations, policy_outputs, actor_parameters(policy, observations))
    dense, start = result.dense(), 0
    columns = []
    for name, p in policy.named_parameters():
        block = dense[:, start : start + p.numel()]
        start += p.numel()
        if name in actor_parameters(policy, observations):
            columns.append(block)
        else:
            assert not block.any(), name
    torch.testing.assert_close(torch.cat(columns, 1), expected, rtol=1e-4, atol=1e-5)


def test_value_loss_reaches_protected_columns_only_through_a_shared_extractor():
    """DESIGN, trap 9: with a shared CNN the value loss moves what the actor's Jacobian protects."""
    moved = {}
    for shared in (True, False):
        policy, observations = build("cnn", ACTIONS["discrete"], shared), observe("cnn")
        names = actor_parameters(policy, observations)
        policy.predict_values(observations).sum().backward()
        moved[shared] = any(
            p.grad is not None and bool(p.grad.any()) for name, p in policy.named_parameters() if name in names
        )
    assert moved == {True: True, False: False}
