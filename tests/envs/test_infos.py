"""Infos of copies stepped one by one: those of SB3's DummyVecEnv, and nobody's but the caller's."""

import copy

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv

from nsrl_envs.vectorised.infos import Infos
from nsrl_envs.vectorised.vec_env import side_by_side
from tests.envs.bits import assert_same_bits


class Talkative(gym.Env):
    """Tells numbers, and things that it goes on changing."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (2,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self):
        self.told = {"count": 0, "trace": [0], "place": np.zeros(2)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.told["count"] += 1
        self.told["trace"].append(self.told["count"])
        self.told["place"] += 1.0
        self.told |= {"x": np.float32(0.1), "ok": np.bool_(True), "name": "it", "none": None, "nested": {"y": [1.5]}}
        return np.zeros(2, np.float32), 0.0, self.told["count"] % 4 == 0, False, self.told


def test_they_are_stock_s_and_stay_what_they_were_when_the_environment_goes_on():
    makers = [Talkative] * 2
    stock, ours = DummyVecEnv(makers), side_by_side(makers)
    assert type(ours) is DummyVecEnv
    for envs in (stock, ours):
        envs.reset()
    kept, texts = [], []
    for _ in range(6):
        found = [envs.step(np.zeros(2, int)) for envs in (stock, ours)]
        assert_same_bits(found[1], found[0])
        kept.append(found[1][3])
        texts.append(repr(found[1][3]))
    assert [repr(infos) for infos in kept] == texts
    kept[-1][0]["trace"].append(7)
    kept[-1][0]["nested"]["y"][0] = 0.0
    assert ours.envs[0].told["trace"][-1] == 6 and ours.envs[0].told["nested"]["y"] == [1.5]


def test_what_is_shared_stays_shared():
    shared = {"x": [1]}
    alike = Infos([shared, shared, {"x": shared["x"], "whole": shared}])
    found, expected = copy.deepcopy(alike), copy.deepcopy(list(alike))
    for copies in (found, expected):
        assert type(copies) is list and copies == list(alike)
        assert copies[0] is copies[1] is copies[2]["whole"] and copies[0]["x"] is copies[2]["x"] is not shared["x"]


def test_steps_of_a_simulator_are_stock_s():
    pytest.importorskip("mujoco")
    both = [
        make_vec_env("nsrl/HalfCheetahBackward-v0", 2, seed=3, vec_env_cls=kind) for kind in (DummyVecEnv, side_by_side)
    ]
    assert isinstance(both[1].buf_infos, Infos)
    for envs in both:
        envs.reset()
    draw = np.random.default_rng(0)
    for _ in range(5):
        actions = draw.uniform(-1.0, 1.0, (2, 6)).astype(np.float32)
        stock, ours = (envs.step(actions) for envs in both)
        assert_same_bits(ours, stock)
