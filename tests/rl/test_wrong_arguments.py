"""Arguments of every wrong kind, to everything that is public: one sentence that names the argument, or it is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.env_util import make_vec_env

from nsrl import NullSpacePPO, NullSpaceTRPO, RetentionBuffer, protect
from nsrl.errors import NsrlError
from nsrl.rl import agents
from nsrl.rl.agents import rl_zoo

ENV = "CartPole-v1"
SMALL: dict[str, Any] = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What there is to pass, by name: the right things, and every wrong one."""
    folder = tmp_path_factory.mktemp("given")
    model = PPO("MlpPolicy", make_vec_env(ENV, 2), **SMALL)
    model.save(folder / "agent.zip")
    model.policy.save(str(folder / "policy.zip"))
    buffer = RetentionBuffer.collect(model, ENV, n_states=16, n_envs=2)
    buffer.save(folder / "buffer.npz")
    (folder / "empty").mkdir()
    (folder / "text.txt").write_text("text")
    return {
        "a model": model,
        "a model's policy": model.policy,
        "a model off policy": DQN("MlpPolicy", ENV, buffer_size=10, device="cpu"),
        "an agent's zip": folder / "agent.zip",
        "a policy's file": folder / "policy.zip",
        "a buffer's file": folder / "buffer.npz",
        "a text file": folder / "text.txt",
        "a folder": folder / "empty",
        "a buffer": buffer,
        "an environment": gym.make(ENV),
        "a VecEnv": model.get_env(),
        "gymnasium's vector": gym.make_vec(ENV, 2),
        "None": None,
        "True": True,
        "3": 3,
        "-1": -1,
        "0.5": 0.5,
        "NaN": float("nan"),
        "nonsense": "nonsense",
        "an empty text": "",
        "bytes": b"abc",
        "a list": [1],
        "a mapping": {1: 2},
        "a class": PPO,
        "an array": np.zeros(3),
        "a tensor": torch.zeros(2),
        "an object": object(),
    }


def zipped(given: dict[str, Any]) -> Path:
    return given["an agent's zip"]


def loaded(given: dict[str, Any]) -> PPO:
    return PPO.load(zipped(given), env=given["a VecEnv"], device="cpu")


#: Of each argument: a call with it, and what is taken for it beside None.
Call = Callable[[dict[str, Any], Any], Any]
AGENTS = ("a model", "an agent's zip")
ENVS = ("an environment", "a VecEnv")


def pretrained(name: str) -> Call:
    return lambda g, x: NullSpacePPO.from_pretrained(zipped(g), ENV, retain=g["a buffer"], **{name: x})


def protected(name: str) -> Call:
    return lambda g, x: protect(loaded(g), **{"retain": g["a buffer"], name: x})


def collected(name: str) -> Call:
    options: dict[str, Any] = {"n_states": 8, "n_envs": 1, "select": "advantage"}
    return lambda g, x: RetentionBuffer.collect(g["a model"], ENV, **{**options, name: x})


def evaluated(name: str) -> Call:
    return lambda g, x: agents.evaluate(g["a model"], ENV, **{"episodes": 1, name: x})


TRIED: dict[str, tuple[Call, tuple[str, ...]]] = {
    "from_pretrained agent": (lambda g, x: NullSpacePPO.from_pretrained(x, ENV), AGENTS),
    "from_pretrained env": (lambda g, x: NullSpacePPO.from_pretrained(zipped(g), x), ENVS),
    "from_pretrained retain": (lambda g, x: NullSpacePPO.from_pretrained(zipped(g), ENV, retain=x), ("a buffer",)),
    "from_pretrained of TRPO": (lambda g, x: NullSpaceTRPO.from_pretrained(x, ENV), AGENTS),
    **{f"from_pretrained {name}": (pretrained(name), ("3", "0.5")) for name in ("kl_budget", "penalty")},
    **{f"from_pretrained {name}": (pretrained(name), ("3",)) for name in ("n_envs", "seed", "n_steps", "batch_size")},
    **{f"from_pretrained {name}": (pretrained(name), ()) for name in ("config", "method", "preserve", "projection")},
    "from_pretrained gamma": (pretrained("gamma"), ("0.5",)),
    "from_pretrained learning_rate": (pretrained("learning_rate"), ("3", "0.5")),
    "from_pretrained policy_kwargs": (pretrained("policy_kwargs"), ()),
    "from_pretrained device": (pretrained("device"), ()),
    "protect model": (lambda g, x: protect(x, retain=g["a buffer"]), ("a model",)),
    "protect retain": (protected("retain"), ("a buffer",)),
    "protect kl_budget": (protected("kl_budget"), ("3", "0.5")),
    "protect opening": (protected("opening"), ("0.5",)),
    **{f"protect {name}": (protected(name), ()) for name in ("config", "critic", "task_budgets")},
    "attach_env source": (lambda g, x: agents.attach_env(x, ENV), AGENTS),
    "attach_env env": (lambda g, x: agents.attach_env(zipped(g), x), ENVS),
    "attach_env n_envs": (lambda g, x: agents.attach_env(zipped(g), ENV, n_envs=x), ("3",)),
    "attach_env seed": (lambda g, x: agents.attach_env(zipped(g), ENV, seed=x), ("3",)),
    "collect agent": (lambda g, x: RetentionBuffer.collect(x, ENV, n_states=8, n_envs=1), AGENTS),
    "collect env": (lambda g, x: RetentionBuffer.collect(zipped(g), x, n_states=8, n_envs=1), ENVS),
    **{f"collect {name}": (collected(name), ("3",)) for name in ("n_states", "n_envs", "seed", "oversample")},
    **{f"collect {name}": (collected(name), ("0.5",)) for name in ("quantile", "heldout")},
    "collect reward_scale": (collected("reward_scale"), ("3", "0.5")),
    "collect task": (collected("task"), ("nonsense", "an empty text")),
    "from_arrays agent": (lambda g, x: RetentionBuffer.from_arrays(np.eye(8, 4, dtype=np.float32), x), AGENTS),
    "from_arrays observations": (lambda g, x: RetentionBuffer.from_arrays(x, g["a model"]), ()),
    "from_agents agents": (lambda g, x: RetentionBuffer.from_agents(x, [ENV]), ()),
    "from_agents an agent": (lambda g, x: RetentionBuffer.from_agents([x], [ENV], 8, n_envs=1), AGENTS),
    "from_agents envs": (lambda g, x: RetentionBuffer.from_agents([g["a model"]], x, 8), ENVS),
    "from_minari": (lambda g, x: RetentionBuffer.from_minari(x, g["a model"]), ()),
    "merge": (lambda g, x: RetentionBuffer.merge(x), ()),
    "merge a buffer": (lambda g, x: RetentionBuffer.merge([g["a buffer"], x]), ("a buffer",)),
    "buffer load": (lambda g, x: RetentionBuffer.load(x), ("a buffer's file",)),
    "buffer check": (lambda g, x: g["a buffer"].check(x), ("a model",)),
    "buffer check env": (lambda g, x: g["a buffer"].check(g["a model"], x), ENVS),
    "NullSpacePPO env": (lambda g, x: NullSpacePPO("MlpPolicy", x, **SMALL), ENVS),
    "NullSpaceTRPO env": (lambda g, x: NullSpaceTRPO("MlpPolicy", x, n_steps=16, batch_size=16), ENVS),
    "NullSpacePPO policy": (lambda g, x: NullSpacePPO(x, g["a VecEnv"], **SMALL), ()),
    "NullSpacePPO load": (lambda g, x: NullSpacePPO.load(x, device="cpu"), ("an agent's zip",)),
    "NullSpaceTRPO load": (lambda g, x: NullSpaceTRPO.load(x, device="cpu"), ()),
    "NullSpacePPO load env": (lambda g, x: NullSpacePPO.load(zipped(g), env=x, device="cpu"), ENVS),
    "NullSpacePPO load retain": (lambda g, x: NullSpacePPO.load(zipped(g), retain=x, device="cpu"), ()),
    "agents load": (lambda g, x: agents.load(x), AGENTS),
    "agents load env": (lambda g, x: agents.load(zipped(g), env=x), ENVS),
    "evaluate model": (lambda g, x: agents.evaluate(x, ENV, episodes=1), AGENTS),
    "evaluate env": (lambda g, x: agents.evaluate(g["a model"], x, episodes=1), ENVS),
    **{f"evaluate {name}": (evaluated(name), ("3",)) for name in ("episodes", "n_envs", "seed")},
    "evaluate normalizer": (evaluated("normalizer"), ()),
    "export model": (lambda g, x: agents.export(x, g["a folder"] / "new"), ("a model",)),
    "export_run model": (lambda g, x: rl_zoo.export_run(x, g["a folder"]), ("a model",)),
    "export_run folder": (lambda g, x: rl_zoo.export_run(g["a model"], x), ("a folder", "nonsense", "an empty text")),
    "export_run settings": (lambda g, x: rl_zoo.export_run(g["a model"], g["a folder"], settings=x), ("a mapping",)),
    "fingerprint": (lambda g, x: agents.fingerprint(x), ("a model's policy",)),
    "Agent": (lambda g, x: agents.Agent(x), ("a model", "a model off policy")),
    "check_spaces model": (lambda g, x: agents.check_spaces(x, g["an environment"]), ("a model", "a model off policy")),
    "check_spaces env": (lambda g, x: agents.check_spaces(g["a model"], x), ENVS),
    "ObservationNormalizer.load": (lambda g, x: agents.ObservationNormalizer.load(x), ()),
}
#: Where stock SB3 or gymnasium has a sentence of its own.
#: SB3 compares it with names before anything of ours is asked.
NOT_OURS = {("NullSpacePPO policy", "an array")}
THEIRS = (ValueError, gym.error.Error, FileNotFoundError)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", TRIED)
def test_a_wrong_kind_of_argument_is_told_in_one_sentence(call, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attempt, taken = TRIED[call]
    for name, value in given.items():
        own_sentence = call.startswith(("NullSpace", "from_pretrained device")) and isinstance(value, str | Path)
        if name in taken or value is None or (call, name) in NOT_OURS:
            continue
        try:
            attempt(given, value)
        except NsrlError as error:
            assert "\n" not in str(error) and 20 < len(str(error)) < 600, (name, str(error))
        except THEIRS as error:
            assert own_sentence, f"{name}: {error!r}"
        else:
            raise AssertionError(f"{call} took {name}")
    for name in taken:
        attempt(given, given[name])
