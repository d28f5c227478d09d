"""Copies of two tasks as one vectorised environment, against the parts alone."""

from __future__ import annotations

import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from nsrl.rl.playing.joined import JoinedEnvs

TASKS = ("nsrl/CartPole-v0", "nsrl/CartPoleSwapped-v0")


def parts() -> list:
    return [make_vec_env(task, count, seed=3) for task, count in zip(TASKS, (2, 3), strict=True)]


def test_it_steps_as_its_parts_do() -> None:
    alone, joined = parts(), JoinedEnvs(parts())
    assert joined.num_envs == 5
    assert np.array_equal(joined.reset(), np.concatenate([part.reset() for part in alone]))
    ends = 0
    for step in range(60):
        actions = np.random.default_rng(step).integers(0, 2, 5)
        found = joined.step(actions)
        wanted = [part.step(rows) for part, rows in zip(alone, (actions[:2], actions[2:]), strict=True)]
        for number in range(3):
            assert np.array_equal(found[number], np.concatenate([one[number] for one in wanted]))
        infos = [info for one in wanted for info in one[3]]
        assert [info.keys() for info in found[3]] == [info.keys() for info in infos]
        ends += int(found[2].sum())
    assert ends > 0


def test_attributes_and_methods_are_those_of_the_copies_asked() -> None:
    joined = JoinedEnvs(parts())
    assert [spec.id for spec in joined.get_attr("spec")] == [TASKS[0]] * 2 + [TASKS[1]] * 3
    assert [spec.id for spec in joined.get_attr("spec", [4, 0])] == [TASKS[1], TASKS[0]]
    joined.set_attr("mark", 7, [1, 2])
    assert joined.get_attr("mark", [2, 1]) == [7, 7]
    assert joined.env_is_wrapped(type(None)) == [False] * 5
    assert len(joined.env_method("get_wrapper_attr", "spec", indices=[3])) == 1


def test_sb3_learns_on_it() -> None:
    model = PPO("MlpPolicy", JoinedEnvs(parts()), n_steps=16, batch_size=40, device="cpu", seed=0).learn(160)
    assert model.num_timesteps == 160
