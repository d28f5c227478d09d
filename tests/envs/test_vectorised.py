"""Copies stepped as arrays against SB3's DummyVecEnv of gymnasium's environments: the same bits."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.wrappers import TimeLimit
from numpy._core import _multiarray_umath as umath
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

import nsrl_envs  # noqa: F401  registers the ids
from nsrl_envs.vectorised.batch import SWITCH
from nsrl_envs.vectorised.vec_env import ArrayVecEnv, side_by_side
from tests.envs.bits import assert_same_bits

TASKS = (
    "nsrl/CartPole-v0",
    "nsrl/CartPoleSwapped-v0",
    "nsrl/CartPoleTrio-v0",
    "nsrl/CartPoleTrioSwapped-v0",
    "nsrl/CartPoleTrioReversedAngle-v0",
    "nsrl/Pendulum-v0",
    "nsrl/PendulumReversed-v0",
    "nsrl/Acrobot-v0",
    "nsrl/AcrobotSwapped-v0",
    "CartPole-v1",
    "Pendulum-v1",
    "Acrobot-v1",
    "MountainCar-v0",
)


def both(task: str, count: int = 5, seed: int = 0, **kwargs) -> tuple[DummyVecEnv, ArrayVecEnv]:
    stock = make_vec_env(task, count, seed=seed, **kwargs)
    arrays = make_vec_env(task, count, seed=seed, vec_env_cls=ArrayVecEnv, **kwargs)
    assert type(stock) is DummyVecEnv and type(arrays) is ArrayVecEnv
    return stock, arrays


def drawn(env, rng: np.random.Generator) -> np.ndarray:
    space = env.action_space
    if isinstance(space, gym.spaces.Discrete):
        return rng.integers(space.n, size=env.num_envs)
    return rng.uniform(-3.0, 3.0, (env.num_envs, *space.shape)).astype(np.float32)  # beyond the bounds, too


def play_both(stock, arrays, steps: int, seed: int = 0) -> int:
    """Step both by the same random actions; the episodes that ended."""
    rng, episodes = np.random.default_rng(seed), 0
    for _ in range(steps):
        actions = drawn(stock, rng)
        expected, found = stock.step(actions), arrays.step(actions)
        assert_same_bits(found, expected)
        assert_same_bits(arrays.reset_infos, stock.reset_infos)
        episodes += int(expected[2].sum())
    return episodes


@pytest.mark.parametrize("seed", [0, 12345])
@pytest.mark.parametrize("task", TASKS)
def test_equals_dummy_vec_env_bit_for_bit(task, seed):
    stock, arrays = both(task, seed=seed)
    assert arrays.observation_space == stock.observation_space
    assert arrays.action_space == stock.action_space
    assert (arrays.metadata, arrays.render_mode) == (stock.metadata, stock.render_mode)
    assert_same_bits(arrays.reset(), stock.reset())
    assert play_both(stock, arrays, 1100, seed) >= 10  # two an env, the last reset by its own generator
    assert arrays._ahead  # or nothing but DummyVecEnv has been compared with itself


@pytest.mark.parametrize("count", [2, 3, 8, 17, 33])
@pytest.mark.parametrize("task", ["nsrl/CartPole-v0", "nsrl/Pendulum-v0", "nsrl/Acrobot-v0"])
def test_any_number_of_copies(task, count):
    """Loops over arrays take whole vectors first and the rest one by one."""
    stock, arrays = both(task, count, seed=3)
    assert_same_bits(arrays.reset(), stock.reset())
    play_both(stock, arrays, 60)


@pytest.mark.parametrize("task", ["nsrl/Acrobot-v0", "MountainCar-v0"])
def test_episodes_that_reach_the_goal(task):
    """Which random actions do not: these push along with the velocity."""
    stock, arrays = both(task)
    observations, ended = arrays.reset(), 0
    stock.reset()
    velocity = 5 if "Acrobot" in task else 1
    for _ in range(400):
        actions = np.where(observations[:, velocity] > 0, 2, 0)
        found, expected = arrays.step(actions), stock.step(actions)
        assert_same_bits(found, expected)
        observations = found[0]
        ended += sum("terminal_observation" in info and not info["TimeLimit.truncated"] for info in found[3])
    assert ended >= 5


@pytest.mark.parametrize("kept", [None, 1, 0])
def test_columns_step_as_single_numbers_on_every_instruction_set(kept):
    """NumPy as it is, with its first optional one (AVX2 and FMA on x86) and with none: each has loops of its own."""
    available = [name for name in umath.__cpu_dispatch__ if umath.__cpu_features__.get(name)]
    disabled = [] if kept is None else available[kept:]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("columns.py")],
        env={**os.environ, "NPY_DISABLE_CPU_FEATURES": " ".join(disabled)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not set(disabled) & set(found.pop("features"))
    assert found == {"CartPoleEnv": 0, "PendulumEnv": 0, "AcrobotEnv": 0, "MountainCarEnv": 0}


@pytest.mark.parametrize("task", TASKS[3:8])
def test_answers_as_the_copies_would_in_mid_episode(task):
    stock, arrays = both(task)
    arrays.reset(), stock.reset()
    for name in ("np_random", "_elapsed_steps", "total_steps", "spec", "render_mode"):
        play_both(stock, arrays, 7, seed=len(name))
        found, expected = arrays.get_attr(name), stock.get_attr(name)
        if name == "np_random":
            found, expected = ([generator.bit_generator.state for generator in one] for one in (found, expected))
        assert found == expected
    play_both(stock, arrays, 1)
    assert arrays._ahead
    assert arrays.env_is_wrapped(Monitor) == stock.env_is_wrapped(Monitor) == [True] * 5
    play_both(stock, arrays, 300)
    assert_same_bits(arrays.env_method("get_episode_rewards"), stock.env_method("get_episode_rewards"))
    assert arrays.get_attr("has_reset") == stock.get_attr("has_reset")
    assert not arrays.has_attr("action_masks")
    for seed in (5, 6):  # a generator put back, and a reset with seed in mid-episode
        for env in (stock, arrays):
            env.set_attr("np_random", np.random.default_rng(seed), 1)
            env.seed(seed)
        assert_same_bits(arrays.reset(), stock.reset())
        play_both(stock, arrays, 30)
    assert arrays._ahead


def test_whoever_gets_hold_of_a_copy_may_change_it():
    changes = (
        lambda env: setattr(env.envs[2].unwrapped, "gravity", 3.0),
        lambda env: setattr(env.get_attr("unwrapped", 2)[0], "gravity", 3.0),
        lambda env: env.env_method("set_wrapper_attr", "gravity", 3.0, indices=2),
        lambda env: env.set_attr("step", lambda action: (np.ones(5, np.float32), 2.0, True, False, {}), 2),
        lambda env: env.get_attr("state", 2)[0].__setitem__(slice(None), 0.125),
    )
    for change in changes:
        stock, arrays = both("nsrl/CartPole-v0")
        arrays.reset(), stock.reset()
        play_both(stock, arrays, 9)
        change(stock), change(arrays)
        play_both(stock, arrays, 50)
        assert not arrays._ahead


def test_actions_of_other_kinds_are_taken_or_refused_as_by_the_copies():
    for task, actions in (
        ("nsrl/CartPole-v0", [0, 1, 0, 1, 1]),
        ("nsrl/Acrobot-v0", np.array([0, -1, 2, -2, 1])),  # Python indexes from the end, and so does Acrobot
        ("nsrl/Pendulum-v0", np.linspace(-3.0, 3.0, 5)[:, None]),  # float64
    ):
        stock, arrays = both(task)
        arrays.reset(), stock.reset()
        play_both(stock, arrays, 3)
        assert_same_bits(arrays.step(actions), stock.step(actions))
        play_both(stock, arrays, 3)
        assert arrays._ahead
    for env in both("nsrl/CartPole-v0"):
        with pytest.raises(RuntimeError, match="needs reset"):
            env.step(np.zeros(5, dtype=int))
        env.reset()
        with pytest.raises(AssertionError, match="invalid"):
            env.step(np.full(5, 2))


def test_options_and_statistics_pass_through():
    stock, arrays = (VecNormalize(env) for env in both("nsrl/CartPole-v0"))
    for env in (stock, arrays):
        env.set_options({"low": -0.01, "high": 0.02})
    assert_same_bits(arrays.reset(), stock.reset())
    play_both(stock, arrays, 60)
    assert arrays.venv._ahead


def test_rendering_shows_the_present_state():
    pytest.importorskip("pygame")
    stock, arrays = both("nsrl/Pendulum-v0", 2)
    arrays.reset(), stock.reset()
    play_both(stock, arrays, 5)
    assert np.array_equal(arrays.render("rgb_array"), stock.render("rgb_array"))
    play_both(stock, arrays, 5)
    assert arrays._ahead


class Heavier(CartPoleEnv):
    """A subclass, which may do anything."""


def test_what_is_not_known_is_stepped_one_by_one(monkeypatch, tmp_path):
    def limited(**kwargs):
        return TimeLimit(CartPoleEnv(**kwargs), 50)

    def light(gravity=1.0):
        env = limited()
        env.unwrapped.gravity = gravity
        return env

    def chosen(*makers) -> type:
        return type(side_by_side(list(makers)))

    assert chosen(*[limited] * 4) is chosen(*[light] * 4) is ArrayVecEnv
    for makers in (
        [light, limited] * 2,  # no copies of each other
        [limited] * 3,  # nothing to gain
        [lambda: limited(sutton_barto_reward=True)] * 4,
        [CartPoleEnv] * 4,  # no time limit
        [lambda: TimeLimit(Heavier(), 50)] * 4,
        [lambda: gym.wrappers.ClipReward(limited(), 0, 1)] * 4,
        [lambda: Monitor(limited(), str(tmp_path / "episodes"))] * 4,
    ):
        assert chosen(*makers) is DummyVecEnv
    with pytest.raises(ValueError, match="side_by_side"):
        ArrayVecEnv([light, limited])
    monkeypatch.setenv(SWITCH, "0")
    assert chosen(*[limited] * 4) is DummyVecEnv


def test_other_physics_are_stepped_by_their_own_constants():
    def light():
        env = TimeLimit(CartPoleEnv(), 50)
        env.unwrapped.gravity, env.unwrapped.force_mag = 3.0, 2.0
        return env

    stock, arrays, plain = DummyVecEnv([light] * 3), ArrayVecEnv([light] * 3), both("CartPole-v1", 3)[1]
    for env in (stock, arrays, plain):
        env.seed(0)
        env.reset()
    assert play_both(stock, arrays, 200) >= 3
    assert not np.array_equal(arrays.step(np.ones(3, int))[0], plain.step(np.ones(3, int))[0])


def test_arrays_handed_out_are_never_written_to_again():
    _, arrays = both("nsrl/CartPole-v0")
    seen = [arrays.reset()] + [arrays.step(np.ones(5, dtype=int))[0] for _ in range(12)]
    kept = [array.copy() for array in seen]
    for _ in range(12):
        arrays.step(np.zeros(5, dtype=int))
    assert all(np.array_equal(one, other) for one, other in zip(seen, kept, strict=True))
    assert not any(np.shares_memory(one, other) for one, other in pairwise(seen))
