"""The layout of rl-zoo3: found, configured and played as its enjoy script does it, with Stable-Baselines3 alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml
from gymnasium import spaces
from sb3_contrib import TRPO, MaskablePPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from nsrl import NullSpacePPO, RetentionBuffer, protect
from nsrl.errors import NsrlError
from nsrl.rl import agents
from nsrl.rl.agents import rl_zoo
from nsrl.rl.agents.normalization import RetainingVecNormalize

OLD, NEW = "nsrl/Pendulum-v0", "nsrl/PendulumReversed-v0"
SMALL: dict[str, Any] = {"n_steps": 32, "device": "cpu", "policy_kwargs": {"net_arch": [8]}}
STOCK = {"ppo": PPO, "a2c": A2C, "trpo": TRPO}


def enjoyed(folder: Path, algo: str, env_id: str, exp_id: int) -> tuple[Any, VecEnv]:
    """Agent and environment as `rl_zoo3/enjoy.py` and `rl_zoo3/utils.py` (2.9) put them together."""
    name = env_id.replace("/", "-")
    log_path = folder / algo / f"{name}_{exp_id}"
    config = yaml.safe_load((log_path / name / "config.yml").read_text())
    arguments = yaml.safe_load((log_path / name / "args.yml").read_text())
    assert arguments["env"] == env_id and arguments["algo"] == algo
    spec = gym.spec(env_id)
    env: VecEnv = make_vec_env(lambda **kwargs: spec.make(**kwargs), 1, seed=0, env_kwargs=arguments["env_kwargs"])
    if config.get("normalize", False):
        env = VecNormalize.load(str(log_path / name / "vecnormalize.pkl"), env)
        env.training = env.norm_reward = False
    kwargs = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}
    return STOCK[algo].load(log_path / f"{name}.zip", custom_objects=kwargs, device="cpu"), env


def test_a_fine_tuned_normalised_agent_is_played_as_it_was_trained(tmp_path: Path) -> None:
    pretrained = PPO("MlpPolicy", VecNormalize(make_vec_env(OLD, 2, seed=0)), batch_size=32, seed=0, **SMALL).learn(128)
    buffer = RetentionBuffer.collect(pretrained, OLD, n_states=64, n_envs=2)
    own = pretrained.get_vec_normalize_env()
    model = NullSpacePPO.from_pretrained(pretrained, NEW, retain=buffer, kl_budget=1e-2, n_envs=2, seed=0)
    around = model.get_vec_normalize_env()
    assert isinstance(around, RetainingVecNormalize) and around.ret_rms.count < 1.0, "reward statistics begin anew"
    model.learn(128)
    assert around.ret_rms.count > 100 and around.ret_rms.var != own.ret_rms.var
    assert np.array_equal(around.obs_rms.mean, own.obs_rms.mean) and np.array_equal(around.obs_rms.var, own.obs_rms.var)

    path = rl_zoo.export_run(model, tmp_path)
    assert path == tmp_path / "ppo" / "nsrl-PendulumReversed-v0_1" / "nsrl-PendulumReversed-v0.zip"
    played, env = enjoyed(tmp_path, "ppo", NEW, 1)
    seen: Any = env.reset()
    for _ in range(20):
        raw = env.get_original_obs()
        expected = model.predict(around.normalize_obs(raw), deterministic=True)[0]
        actions = played.predict(seen, deterministic=True)[0]
        assert np.array_equal(actions, expected)
        seen = env.step(actions)[0]
    assert np.array_equal(env.obs_rms.mean, own.obs_rms.mean), "playing moves nothing"

    again = agents.load(path.parent)  # and the other way: our own loader takes such a folder
    assert again.path == path and agents.fingerprint(again.model.policy) == agents.fingerprint(model.policy)
    assert np.array_equal(again.model.predict(again.normalizer.normalize(raw), deterministic=True)[0], expected)


@pytest.mark.parametrize("algo", STOCK)
def test_every_algorithm_has_its_folder_and_runs_are_counted(algo: str, tmp_path: Path) -> None:
    env = make_vec_env("CartPole-v1", 2)
    model = STOCK[algo]("MlpPolicy", env, gamma=0.9, **SMALL).learn(64)
    if algo == "a2c":
        protect(model, RetentionBuffer.collect(model, "CartPole-v1", n_states=20, n_envs=2))
    (tmp_path / algo / "CartPole-v1_7").mkdir(parents=True)
    (tmp_path / algo / "CartPole-v1_x").mkdir()
    first, second = (rl_zoo.export_run(model, tmp_path) for _ in range(2))
    assert [path.parent.name for path in (first, second)] == ["CartPole-v1_8", "CartPole-v1_9"]
    assert sorted(file.name for file in (first.parent / "CartPole-v1").iterdir()) == ["args.yml", "config.yml"]
    config = yaml.safe_load((first.parent / "CartPole-v1" / "config.yml").read_text())
    assert config["gamma"] == 0.9 and config["policy"] == "MlpPolicy" and config["n_envs"] == 2
    assert config["n_timesteps"] == 64 and config["normalize"] is False
    played, again = enjoyed(tmp_path, algo, "CartPole-v1", 8)
    observations = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    assert np.array_equal(*(m.predict(observations, deterministic=True)[0] for m in (played, model)))
    assert again.reset().shape == (1, 4) and agents.load(first.parent).normalizer is None


def test_the_environment_is_made_with_its_arguments_again(tmp_path: Path) -> None:
    env = DummyVecEnv([lambda: gym.make("Pendulum-v1", g=3.0, render_mode="rgb_array")])
    model = PPO("MlpPolicy", env, batch_size=32, **SMALL)
    rl_zoo.export_run(model, tmp_path)
    _, played = enjoyed(tmp_path, "ppo", "Pendulum-v1", 1)
    assert played.get_attr("g") == [3.0]
    rl_zoo.export_run(model, tmp_path, env_kwargs={"g": 5.0}, settings={"frame_stack": 4})
    _, played = enjoyed(tmp_path, "ppo", "Pendulum-v1", 2)
    assert played.get_attr("g") == [5.0]
    folder = tmp_path / "ppo" / "Pendulum-v1_2" / "Pendulum-v1"
    assert yaml.safe_load((folder / "config.yml").read_text())["frame_stack"] == 4
    rl_zoo.export_run(model, tmp_path, "Pendulum-v1")
    assert yaml.safe_load((tmp_path / "ppo/Pendulum-v1_3/Pendulum-v1/args.yml").read_text())["env_kwargs"] is None


class Nameless(gym.Env):
    observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def action_masks(self) -> np.ndarray:
        return np.ones(2, dtype=bool)


def test_what_rl_zoo3_could_not_play_is_refused(tmp_path: Path) -> None:
    unregistered = PPO("MlpPolicy", DummyVecEnv([Nameless]), batch_size=32, **SMALL)
    with pytest.raises(NsrlError, match="not made from an id; pass env"):
        rl_zoo.export_run(unregistered, tmp_path)
    with pytest.raises(NsrlError, match="no name for MaskablePPO"):
        rl_zoo.export_run(MaskablePPO("MlpPolicy", DummyVecEnv([Nameless]), **SMALL), tmp_path)
    model = PPO("MlpPolicy", make_vec_env("CartPole-v1"), batch_size=32, **SMALL)
    with pytest.raises(NsrlError, match="cannot be written as YAML"):
        rl_zoo.export_run(model, tmp_path, env_kwargs={"size": np.float64(1.0)})
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    (tmp_path / "ppo").touch()
    with pytest.raises(NsrlError, match="cannot make a run folder"):
        rl_zoo.export_run(model, tmp_path)
    assert rl_zoo.export_run(unregistered, tmp_path / "logs", "CartPole-v1").is_file()
