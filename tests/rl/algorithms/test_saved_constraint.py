"""Save, load, learn: the budget is in force again, or nothing is learnt."""

from __future__ import annotations

import io
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from nsrl import NullSpacePPO, NullSpaceTRPO, RetentionBuffer, protect
from nsrl.errors import NsrlError
from nsrl.rl import agents
from nsrl.rl.algorithms.saved_constraint import SavedConstraint
from nsrl.rl.budget.config import RetentionConfig
from tests.rl.builders import NEW, OLD, SMALL, SpikyReward, narrow, trained
from tests.rl.oracles import independent_kl, same_policies, within

BUDGET = 1e-3
SETTINGS: dict[type, dict[str, Any]] = {
    NullSpacePPO: {**SMALL, "gradient": "projected", "projection": "euclidean", "subset_states": 40, "opening": "off"},
    NullSpaceTRPO: {"n_steps": 64, "target_kl": 0.2, "opening": "off"},
}


def new_task() -> Any:
    return make_vec_env(NEW["discrete"], 2, seed=0, wrapper_class=SpikyReward)


def saved(algorithm: Any, **options: Any) -> tuple[io.BytesIO, Any, RetentionBuffer]:
    agent, buffer = trained()
    model = algorithm.from_pretrained(
        agent, new_task(), retain=buffer, kl_budget=BUDGET, **{**SETTINGS[algorithm], **options}
    )
    model.learn(256)
    stream = io.BytesIO()
    model.save(stream)
    stream.seek(0)
    return stream, model, buffer


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_a_loaded_model_does_not_learn_before_its_buffer_is_given_again(algorithm: Any) -> None:
    stream, model, buffer = saved(algorithm)
    loaded = algorithm.load(stream, env=new_task(), device="cpu")
    assert same_policies(loaded, model)
    before = {key: value.clone() for key, value in loaded.policy.state_dict().items()}
    for call in (lambda: loaded.learn(128), loaded.train):
        with pytest.raises(NsrlError, match=rf"{algorithm.__name__}\.load\(path, env=env, retain="):
            call()
    assert all(torch.equal(value, before[key]) for key, value in loaded.policy.state_dict().items())
    # moved since, but its zip names this buffer
    assert protect(loaded, buffer, kl_budget=2 * BUDGET, opening="off") is loaded
    loaded.learn(256)
    assert 0.0 < independent_kl(loaded, buffer) <= within(2 * BUDGET, buffer)


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_with_its_buffer_it_goes_on_under_the_same_settings(algorithm: Any) -> None:
    stream, model, buffer = saved(algorithm, critic="reset")
    loaded = algorithm.load(stream, env=new_task(), device="cpu", retain=buffer)
    assert same_policies(loaded, model)  # the critic too: it was reset once, at the start
    settings = asdict(model.retention.config)
    assert asdict(loaded.retention.config) == {**settings, "critic": "keep", "opening": "off"}
    assert independent_kl(loaded, buffer) > 0.0
    loaded.learn(256)
    assert 0.0 < independent_kl(loaded, buffer) <= within(BUDGET, buffer)
    again = io.BytesIO()
    loaded.save(again, include=["retention"])
    again.seek(0)
    with pytest.raises(NsrlError, match="retain="):
        algorithm.load(again, env=new_task(), device="cpu").learn(128)


@pytest.mark.parametrize("method", ["kl_penalty", "finetune"])
def test_a_baseline_goes_on_as_the_baseline_that_it_was(method: str) -> None:
    stream, model, buffer = saved(NullSpacePPO, method=method, penalty=3.0)
    loaded = NullSpacePPO.load(stream, env=new_task(), device="cpu", retain=buffer)
    assert type(loaded.retention) is type(model.retention)
    assert getattr(loaded.retention, "coefficient", 3.0) == 3.0


def test_another_buffer_is_refused() -> None:
    stream, _, buffer = saved(NullSpacePPO)
    agent, _ = trained()
    other = RetentionBuffer.collect(agent, OLD["discrete"], n_states=60, seed=7, n_envs=2)
    with pytest.raises(NsrlError, match=f"another buffer .digest {buffer.digest()[:12]}"):
        NullSpacePPO.load(stream, env=new_task(), device="cpu", retain=other)
    stream.seek(0)
    loaded = NullSpacePPO.load(stream, env=new_task(), device="cpu")
    with pytest.raises(NsrlError, match="outputs of another agent"):
        protect(loaded, other)
    with pytest.raises(NsrlError, match=r"retain takes the buffer"):
        stream.seek(0)
        NullSpacePPO.load(stream, env=new_task(), device="cpu", retain="buffer.npz")


@pytest.mark.parametrize("algorithm", [PPO, A2C, TRPO])
def test_what_protect_has_made_of_stock_models_asks_for_its_buffer_too(algorithm: Any, tmp_path: Path) -> None:
    model = algorithm("MlpPolicy", make_vec_env(OLD["discrete"], 2, seed=0), seed=0, device="cpu", n_steps=64)
    model.learn(128)
    buffer = RetentionBuffer.collect(model, OLD["discrete"], n_states=60, n_envs=2)
    protect(model, buffer, kl_budget=BUDGET).learn(128)
    model.save(tmp_path / "agent.zip")
    loaded = type(model).load(tmp_path / "agent.zip", env=new_task(), device="cpu")
    with pytest.raises(NsrlError, match="has not been given again"):
        loaded.learn(128)
    stock = algorithm.load(tmp_path / "agent.zip", env=new_task(), device="cpu")
    protect(stock, buffer, kl_budget=2 * BUDGET).learn(128)
    assert independent_kl(stock, buffer) <= within(2 * BUDGET, buffer)
    rebuilt = agents.load(tmp_path / "agent.zip").model
    assert same_policies(rebuilt, model) and type(rebuilt) is algorithm


def test_an_exported_zip_says_nothing_of_it_and_a_stock_one_is_loaded_with_a_warning(tmp_path: Path) -> None:
    _, model, buffer = saved(NullSpacePPO)
    path = model.export(tmp_path / "agent.zip")
    assert "_saved_constraint" not in vars(PPO.load(path, device="cpu"))
    with pytest.raises(NsrlError, match="says nothing of a constraint"):
        NullSpacePPO.load(path, env=new_task(), device="cpu", retain=buffer)
    loaded = NullSpacePPO.load(path, env=new_task(), device="cpu")
    with pytest.warns(UserWarning, match="nothing is retained.*learns as stock PPO"):
        loaded.learn(128)
    stock = PPO.load(path, env=new_task(), device="cpu")
    stock.learn(128)
    assert loaded.num_timesteps == stock.num_timesteps


def test_the_statistics_have_to_be_the_buffer_s_after_loading_too(tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env(OLD["box"], 2, seed=0))
    model = PPO("MlpPolicy", env, seed=0, device="cpu", **SMALL).learn(256)
    buffer = RetentionBuffer.collect(model, n_states=60)
    model = NullSpacePPO.from_pretrained(model, make_vec_env(NEW["box"], 2, seed=0), retain=buffer, **SMALL)
    model.learn(128)
    model.save(tmp_path / "agent.zip")
    fresh = VecNormalize(make_vec_env(NEW["box"], 2, seed=0))
    with pytest.raises(NsrlError, match="other observation statistics than the buffer"):
        NullSpacePPO.load(tmp_path / "agent.zip", env=fresh, device="cpu", retain=buffer)
    loaded = NullSpacePPO.load(tmp_path / "agent.zip", env=model.env, device="cpu", retain=buffer)
    loaded.learn(128)
    assert np.array_equal(loaded.env.obs_rms.mean, buffer.normalizer.mean)


def test_the_record_goes_through_json_and_is_refused_where_it_was_changed() -> None:
    config = RetentionConfig(kl_budget=math.inf, preserve="mode", log_std_init=-1.0, task_budgets={"a": 0.1})
    record = SavedConstraint(config, "f" * 64, "kl_penalty", 2.0, True)
    assert SavedConstraint.read(record.written()) == record
    for text in ("", "[]", "null", "{}", '{"config": {"budget": 1}, "digest": "f"}', '{"config": {"seed": []}}'):
        with pytest.raises(NsrlError, match="cannot be read"):
            SavedConstraint.read(text)


def test_a_narrow_gaussian_that_goes_on_explores_widely_again_and_is_not_opened_twice(tmp_path: Path) -> None:
    agent, buffer = narrow()
    model = NullSpacePPO.from_pretrained(agent, NEW["box"], retain=buffer, kl_budget=BUDGET, **SMALL)
    model.learn(64)
    model.save(tmp_path / "model.zip")
    loaded = NullSpacePPO.load(tmp_path / "model.zip", env=model.get_env(), retain=buffer)
    assert model.retention.exploration is not None and loaded.retention.exploration is not None
    assert torch.equal(loaded.policy.log_std, model.policy.log_std)  # the retained one
    assert not loaded.retention.opening.pending
    steps = loaded.num_timesteps
    loaded.learn(128, reset_num_timesteps=False)
    assert loaded.num_timesteps == steps + 128  # none were played for an opening


def test_a_model_that_was_saved_before_it_learnt_is_opened_when_it_learns(tmp_path: Path) -> None:
    agent, buffer = narrow()
    model = NullSpacePPO.from_pretrained(agent, NEW["box"], retain=buffer, kl_budget=BUDGET, **SMALL)
    model.save(tmp_path / "model.zip")
    loaded = NullSpacePPO.load(tmp_path / "model.zip", env=model.get_env(), retain=buffer)
    assert loaded.retention.opening.pending
    loaded.learn(64)
    assert not loaded.retention.opening.pending and loaded.retention_report().opening.states > 0
