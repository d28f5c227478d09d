"""protect(): any SB3 on-policy algorithm, in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, PPO, SAC
from stable_baselines3.common.env_util import make_vec_env

from nsrl import RetentionBuffer, protect
from nsrl.errors import NsrlError
from tests.rl.builders import NEW, OLD, SMALL, cached_buffer


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
    assert report.kl_mean <= 1e-3 and report.updates == 10
    assert not torch.equal(before, model.policy.state_dict()["action_net.weight"])
    model.save(tmp_path / "agent.zip")
    stock = algorithm.load(tmp_path / "agent.zip", device="cpu")
    observations = np.asarray(buffer.observations)
    assert np.array_equal(
        stock.predict(observations, deterministic=True)[0], model.predict(observations, deterministic=True)[0]
    )


def test_what_cannot_be_protected_is_refused_in_a_sentence() -> None:
    agent, buffer = cached_buffer()
    with pytest.raises(NsrlError, match="SAC cannot be protected"):
        protect(SAC("MlpPolicy", "Pendulum-v1", device="cpu", buffer_size=10), buffer)
    stranger = PPO("MlpPolicy", OLD["discrete"], seed=8, device="cpu")
    with pytest.raises(NsrlError):
        protect(stranger, buffer)
    with pytest.raises(NsrlError, match="over the budget"):
        protect(stranger, buffer, kl_budget=1e-9, trust_buffer=True)
    with pytest.raises(NsrlError, match="did you mean project_every"):
        protect(agent, buffer, projectevery=2)
