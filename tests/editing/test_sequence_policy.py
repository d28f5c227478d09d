"""A policy that is a transformer: what it computes, and that NullSpacePPO takes it like any other."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from nsrl import NullSpacePPO, RetentionBuffer
from nsrl.editing.post_training.sequence_policy import SequenceExtractor
from nsrl.errors import NsrlError
from nsrl.projection import jacobian

SPACE = gymnasium.spaces.Box(-1, 1, (5, 3), np.float32)


def extractor() -> SequenceExtractor:
    torch.manual_seed(0)
    return SequenceExtractor(SPACE, features_dim=8, blocks=2, heads=2)


def test_it_attends_backwards_only_and_tells_the_order() -> None:
    model, x = extractor(), torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))
    positions = model.blocks(model.embed(x) + model.places)
    later = x.clone()
    later[:, 3:] += 1.0
    changed = model.blocks(model.embed(later) + model.places)
    torch.testing.assert_close(positions[:, :3], changed[:, :3], rtol=0, atol=0)
    assert float((model(x) - model(x.flip(1))).detach().abs().max()) > 1e-3
    assert float((model(x) - model(later)).detach().abs().max()) > 1e-3


def test_its_jacobian_is_that_of_autograd() -> None:
    model = extractor().double()
    x = torch.randn(3, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    named = dict(model.named_parameters())

    def outputs(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (x,))

    dense = torch.func.jacrev(outputs)(named)
    expected = torch.cat([dense[name].reshape(24, -1) for name in named], 1)
    # float64, sums of a few hundred products
    torch.testing.assert_close(jacobian(model, x).dense(), expected, rtol=1e-9, atol=1e-11)


def test_it_is_finetuned_inside_a_budget() -> None:
    def env():
        return gymnasium.wrappers.FrameStackObservation(gymnasium.make("nsrl_envs:nsrl/CartPole-v0"), 4)

    torch.manual_seed(0)
    kwargs = {"features_extractor_class": SequenceExtractor, "features_extractor_kwargs": {"features_dim": 16}}
    agent = PPO("MlpPolicy", env(), n_steps=64, batch_size=32, n_epochs=2, policy_kwargs=kwargs, seed=0)
    agent.learn(128)
    buffer = RetentionBuffer.collect(agent, env(), n_states=64, seed=0)
    model = NullSpacePPO.from_pretrained(
        agent, env(), retain=buffer, kl_budget=0.01, n_steps=64, batch_size=32, n_epochs=2, seed=0, opening="off"
    )
    model.learn(128)
    assert 0.0 < model.retention_report().kl_mean <= 0.01


def test_what_is_no_sequence_is_refused() -> None:
    with pytest.raises(NsrlError, match="FrameStackObservation"):
        SequenceExtractor(gymnasium.spaces.Box(-1, 1, (3,)))
    with pytest.raises(NsrlError, match="do not divide"):
        SequenceExtractor(SPACE, features_dim=9, heads=2)
