"""protect(): any SB3 on-policy algorithm, in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO, SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from nsrl import RetentionBuffer, protect
from nsrl.errors import NsrlError
from tests.rl.builders import NEW, OLD, SMALL, trained
from tests.rl.oracles import independent_kl, within


@pytest.mark.parametrize("kind", ["discrete", "box"])
@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_a_protected_model_stays_within_the_budget(algorithm: type, kind: str, tmp_path: Path) -> None:
    settings = {**SMALL, "n_steps": 16} if algorithm is PPO else {"n_steps": 16, "learning_rate": 0.01}
    model = algorithm("MlpPolicy", make_vec_env(OLD[kind], 2, seed=0), seed=0, device="cpu", **settings).learn(64)
    buffer = RetentionBuffer.collect(model, OLD[kind], n_states=100, n_envs=2)
    model.set_env(make_vec_env(NEW[kind], 2, seed=0))
    before = model.policy.state_dict()["action_net.weight"].clone()
    assert protect(model, retain=buffer, kl_budget=1e-3) is model
    assert isinstance(model, algorithm)
    model.learn(320)
    report = model.retention_report()
    assert independent_kl(model, buffer) <= within(1e-3, buffer) and report.updates == 10
    assert not torch.equal(before, model.policy.state_dict()["action_net.weight"])
    model.save(tmp_path / "agent.zip")
    stock = algorithm.load(tmp_path / "agent.zip", device="cpu")
    observations = np.asarray(buffer.observations)
    assert np.array_equal(
        stock.predict(observations, deterministic=True)[0], model.predict(observations, deterministic=True)[0]
    )


def test_what_cannot_be_protected_is_refused_in_a_sentence() -> None:
    agent, buffer = trained()
    with pytest.raises(NsrlError, match="SAC cannot be protected"):
        protect(SAC("MlpPolicy", "Pendulum-v1", device="cpu", buffer_size=10), buffer)
    stranger = PPO("MlpPolicy", OLD["discrete"], seed=8, device="cpu")
    with pytest.raises(NsrlError):
        protect(stranger, buffer)
    with pytest.raises(NsrlError, match="over the budget"):
        protect(stranger, buffer, kl_budget=1e-9, trust_buffer=True)
    with pytest.raises(NsrlError, match="did you mean project_every"):
        protect(agent, buffer, projectevery=2)


def test_a_refused_model_is_left_as_it_was() -> None:
    _, buffer = trained("box")
    stranger = PPO("MlpPolicy", OLD["box"], seed=8, device="cpu")
    before = {key: value.clone() for key, value in stranger.policy.state_dict().items()}
    for options in ({}, {"kl_budget": 1e-9, "trust_buffer": True}):
        with pytest.raises(NsrlError):
            protect(stranger, buffer, critic="reset", preserve="mode", log_std_init=-1.0, **options)
        assert type(stranger) is PPO
        assert all(torch.equal(value, before[key]) for key, value in stranger.policy.state_dict().items())


def test_observation_statistics_stop_where_they_are_and_have_to_be_the_buffer_s() -> None:
    env = VecNormalize(make_vec_env(OLD["box"], 2, seed=0))
    model = PPO("MlpPolicy", env, seed=0, device="cpu", **SMALL).learn(256)
    buffer = RetentionBuffer.collect(model, n_states=60)
    raw = RetentionBuffer.from_arrays(
        buffer.observations, outputs=buffer.outputs, action_space=model.action_space, log_std=buffer.log_std
    )
    with pytest.raises(NsrlError, match="other observation statistics than the buffer"):
        protect(model, raw)
    mean, rewards = env.obs_rms.mean.copy(), env.ret_rms.count
    protect(model, buffer, kl_budget=1e-3).learn(256)
    assert np.array_equal(env.obs_rms.mean, mean) and env.ret_rms.count > rewards
    buffer.check(model, trust_agent=True)
    protect(model, buffer, kl_budget=1e-2, trust_buffer=True).learn(128)
    assert np.array_equal(env.obs_rms.mean, mean)
    stranger = PPO("MlpPolicy", VecNormalize(make_vec_env(OLD["box"], 2, seed=0)), seed=0, device="cpu", **SMALL)
    stranger.learn(512)
    stranger.policy.load_state_dict(model.policy.state_dict())
    with pytest.raises(NsrlError, match="other observation statistics than the buffer"):
        protect(stranger, buffer)


@pytest.mark.parametrize("retain", ["mode", Path("buffer.npz"), {}])
def test_what_is_no_buffer_is_refused(retain: object) -> None:
    with pytest.raises(NsrlError, match=r"RetentionBuffer\.load"):
        protect(PPO("MlpPolicy", OLD["box"], device="cpu"), retain)  # type: ignore[arg-type]


class Extractor(BaseFeaturesExtractor):
    """A layer of the user's own, then one that may behave otherwise in train mode."""

    def __init__(self, space: spaces.Box, last: nn.Module):
        super().__init__(space, 6)
        self.layers = nn.Sequential(nn.Linear(5, 6), last)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return self.layers(observations)


@pytest.mark.parametrize("algorithm", [PPO, TRPO])
@pytest.mark.parametrize("last", [nn.BatchNorm1d(6), nn.Dropout(0.2), nn.LayerNorm(6), nn.Dropout(0.0)])
def test_what_acts_otherwise_in_train_mode_is_refused_where_updates_use_it(algorithm: type, last: nn.Module) -> None:
    network = {"features_extractor_class": Extractor, "features_extractor_kwargs": {"last": last}, "net_arch": [4]}
    model = algorithm(
        "MlpPolicy",
        make_vec_env(OLD["discrete"], 2, seed=0),
        seed=0,
        device="cpu",
        n_steps=32,
        batch_size=32,
        learning_rate=0.01,
        policy_kwargs=network,
    ).learn(64)
    buffer = RetentionBuffer.collect(model, OLD["discrete"], n_states=40, n_envs=2)
    if algorithm is PPO and (isinstance(last, nn.BatchNorm1d) or getattr(last, "p", 0.0) > 0.0):
        with pytest.raises(NsrlError, match=rf"layers\.1 is {type(last).__name__}.*NullSpaceTRPO"):
            protect(model, buffer)
        return
    protect(model, buffer, kl_budget=1e-3).learn(3 * 64)
    model.policy.set_training_mode(False)
    assert model.retention.updates == 3 and 0.0 < independent_kl(model, buffer) <= within(1e-3, buffer)


class OwnNetwork(nn.Module):
    """Actor and critic under names of the user's own."""

    latent_dim_pi = latent_dim_vf = 5

    def __init__(self, width: int) -> None:
        super().__init__()
        self.actor, self.judge = nn.Linear(width, 5), nn.Linear(width, 5)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.actor(features))

    def forward_critic(self, features: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.judge(features))


class OwnPolicy(ActorCriticPolicy):
    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = OwnNetwork(self.features_dim)


def test_a_critic_that_cannot_be_found_is_not_reset_and_everything_else_works() -> None:
    envs = make_vec_env(OLD["box"], 2, seed=0)
    model = PPO(OwnPolicy, envs, seed=0, device="cpu", **SMALL).learn(128)
    buffer = RetentionBuffer.collect(model, OLD["box"], n_states=60, n_envs=2)
    before = {key: value.clone() for key, value in model.policy.state_dict().items()}
    with pytest.raises(NsrlError, match=r"critic of OwnPolicy with OwnNetwork cannot be reset.*critic='keep'"):
        protect(model, buffer, critic="reset", preserve="mode", log_std_init=-1.0)
    assert type(model) is PPO
    assert all(torch.equal(value, before[key]) for key, value in model.policy.state_dict().items())
    protect(model, buffer, kl_budget=1e-3).learn(256)
    assert 0.0 < independent_kl(model, buffer) <= within(1e-3, buffer)
