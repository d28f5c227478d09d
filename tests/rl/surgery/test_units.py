"""Units that nothing reads yet: the agent is the old one, and the opening makes them the new task's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import MlpExtractor
from torch import nn

from nsrl import NullSpacePPO, RetentionBuffer
from nsrl.errors import NsrlError
from nsrl.rl import agents, surgery
from tests.rl.builders import NEW, SMALL, certain
from tests.rl.oracles import WIDTHS, independent_kl, within
from tests.rl.surgery.builders import build, function_of, normal
from tests.tolerances import assert_near

BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"actions": BOX},
        {"algorithm": A2C, "net_arch": {"pi": [8], "vf": [16, 16]}, "activation_fn": nn.ReLU},
    ],
    ids=["discrete", "box", "a2c"],
)
def test_the_function_is_the_old_one_and_the_zip_is_stocks(options: dict[str, Any], tmp_path: Any) -> None:
    old = build(**options)
    new = surgery.add_units(old, 5)
    observations = normal(40, 4)
    assert_near(function_of(new, observations), function_of(old, observations), terms=WIDTHS)
    widths = [layer.out_features for layer in new.policy.mlp_extractor.policy_net if isinstance(layer, nn.Linear)]
    before = [layer.out_features for layer in old.policy.mlp_extractor.policy_net if isinstance(layer, nn.Linear)]
    assert widths == [width + 5 for width in before]
    assert same_critic(old, new)
    agents.save_agent(new, tmp_path / "wide.zip")
    stock = type(old).load(tmp_path / "wide.zip")
    assert torch.equal(function_of(stock, observations), function_of(new, observations))


def same_critic(one: Any, other: Any) -> bool:
    first, second = (model.policy.mlp_extractor.value_net.parameters() for model in (one, other))
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_spread_of_gsde_is_the_old_one() -> None:
    old = PPO("MlpPolicy", "Pendulum-v1", use_sde=True, n_steps=8, batch_size=8, seed=0, device="cpu")
    new = surgery.add_units(old, 7)
    states = torch.as_tensor(normal(30, 3))
    with torch.no_grad():
        one, other = (model.policy.get_distribution(states).distribution for model in (old, new))
    # seven more squares of size 1 times exp(-24): 3e-10 beside SB3's 1e-6
    torch.testing.assert_close(other.stddev, one.stddev, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other.mean, one.mean, rtol=1e-5, atol=1e-6)


def test_the_new_task_gets_them_where_the_old_one_needs_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsrl.rl.opening.units.KEPT", (0.5,))
    agent, _ = certain(gap=8.0)
    with torch.no_grad():  # every unit says something of its own: half of them are too few
        for layer in (agent.policy.mlp_extractor.policy_net[0], agent.policy.mlp_extractor.policy_net[2]):
            nn.init.orthogonal_(layer.weight, gain=20.0, generator=torch.Generator().manual_seed(0))
    found = {}
    wide = surgery.add_units(agent, 64)
    for name, model, room in (("narrow", agent, "off"), ("wide", wide, "off"), ("by itself", agent, "auto")):
        buffer = RetentionBuffer.collect(model, "nsrl/CartPole-v0", n_states=256, n_envs=2)
        learner = NullSpacePPO.from_pretrained(model, NEW["discrete"], retain=buffer, seed=1, room=room, **SMALL)
        learner.learn(1000)
        record = learner.retention_report().opening
        found[name] = record.units, record.added
        assert independent_kl(learner, buffer) <= within(0.01, buffer)
    assert found == {"narrow": (0, 0), "wide": (128, 0), "by itself": (128, 64)}


def test_an_actor_with_units_to_spare_is_left_alone() -> None:
    agent, buffer = certain(gap=8.0)
    before = {name: value.clone() for name, value in agent.policy.state_dict().items()}
    learner = NullSpacePPO.from_pretrained(agent, NEW["discrete"], retain=buffer, seed=1, **SMALL)
    assert learner.retention.opening.added == 0
    assert all(torch.equal(value, before[name]) for name, value in agent.policy.state_dict().items())
    actor = [name for name in before if "value" not in name]  # the critic is a fresh one
    assert all(torch.equal(learner.policy.state_dict()[name], before[name]) for name in actor)


def test_what_cannot_be_widened_is_told() -> None:
    with pytest.raises(NsrlError, match="at least one unit"):
        surgery.add_units(build(), 0)
    with pytest.raises(NsrlError, match="no hidden layer"):
        surgery.add_units(build(net_arch={"pi": [], "vf": [8]}), 4)


class Fixed(ActorCriticPolicy):
    """A network that net_arch says nothing of."""

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = MlpExtractor(self.features_dim, net_arch=[16, 16], activation_fn=nn.Tanh)


def test_a_network_that_does_not_grow_is_no_wider_one() -> None:
    model = PPO(Fixed, "CartPole-v1", n_steps=8, batch_size=8, seed=0, device="cpu")
    with pytest.raises(NsrlError, match="without regard to net_arch"):
        surgery.add_units(model, 4)
