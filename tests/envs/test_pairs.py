"""The task pairs: what each changes against the stock environment, and what it leaves alone."""

import dataclasses
import importlib.util
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3
from stable_baselines3.common.env_util import make_vec_env

from nsrl_envs import PAIRS, SEQUENCES, TaskError, pair
from nsrl_envs.registration import _TASKS

_MODULES = {None: "gymnasium", "mujoco": "mujoco", "box2d": "Box2D"}
_BASES = {
    "CartPole": "CartPole-v1",
    "Pendulum": "Pendulum-v1",
    "Acrobot": "Acrobot-v1",
    "MountainCarContinuous": "MountainCarContinuous-v0",
    "MountainCar": "MountainCar-v0",
    "HalfCheetah": "HalfCheetah-v5",
    "Swimmer": "Swimmer-v5",
    "Hopper": "Hopper-v5",
    "Ant": "Ant-v5",
    "LunarLanderContinuous": "LunarLanderContinuous-v3",
    "LunarLander": "LunarLander-v3",
}


def _of_extra(extra: str | None, *values):
    missing = importlib.util.find_spec(_MODULES[extra]) is None
    return pytest.param(*values, marks=pytest.mark.skipif(missing, reason=f"extra {extra} is not installed"))


every_pair = pytest.mark.parametrize("pair_", [_of_extra(p.extra, p) for p in PAIRS.values()], ids=lambda p: p.name)
every_task = pytest.mark.parametrize(
    "task",
    [
        _of_extra(extra, t)
        for extra, t in sorted(
            {(p.extra, t) for p in PAIRS.values() for t in (p.retained, p.new)}
            | {(s.extra, t) for s in SEQUENCES.values() for t in s.tasks},
            key=str,
        )
    ],
)


def _base(task: str) -> str:
    return next(base for name, base in _BASES.items() if task.startswith(f"nsrl/{name}"))


@every_pair
def test_tasks_of_a_pair_have_equal_spaces(pair_):
    retained, new = gym.make(pair_.retained), gym.make(pair_.new)
    assert retained.observation_space == new.observation_space
    assert retained.action_space == new.action_space


@every_pair
def test_context_is_zero_for_the_retained_and_one_for_the_new_task(pair_):
    stock = gym.make(_base(pair_.retained))
    for value, task in enumerate([pair_.retained, pair_.new]):
        observation, _ = gym.make(task).reset(seed=4)
        if pair_.visible:
            assert observation[-1] == value
            observation = observation[:-1]
        assert observation.shape == stock.observation_space.shape
        if pair_.extra != "box2d":  # where gravity and wind already act on the first observation
            np.testing.assert_array_equal(observation, stock.reset(seed=4)[0])


@every_task
def test_time_limit_is_that_of_the_base_environment(task):
    assert gym.spec(task).max_episode_steps == gym.spec(_base(task)).max_episode_steps


@every_task
def test_environment_checkers_pass(task):
    env = gym.make(task, disable_env_checker=True)
    while isinstance(env, gym.wrappers.TimeLimit | gym.wrappers.OrderEnforcing):
        env = env.env
    with warnings.catch_warnings():
        # that wrappers are wrappers, and that the base environments leave observations unbounded, is known
        warnings.simplefilter("ignore")
        check_env(env, skip_render_check=True)
        check_env_for_sb3(env, skip_render_check=True)


def test_swapped_cartpole_is_stock_cartpole_with_the_other_action():
    stock, swapped = gym.make("CartPole-v1"), gym.make("nsrl/CartPoleSwapped-v0")
    rng = np.random.default_rng(0)
    for _ in range(50):
        stock.reset(seed=0)
        swapped.reset(seed=0)
        state = rng.uniform(-0.15, 0.15, size=4)
        stock.unwrapped.state = swapped.unwrapped.state = tuple(state)
        action = int(rng.integers(2))
        expected, *outcome = stock.step(1 - action)
        got, *got_outcome = swapped.step(action)
        np.testing.assert_array_equal(got[:4], expected)
        assert got_outcome[:3] == outcome[:3]


def test_reversed_pendulum_is_stock_pendulum_with_the_negated_torque():
    stock, reversed_ = gym.make("Pendulum-v1"), gym.make("nsrl/PendulumReversed-v0")
    stock.reset(seed=0)
    reversed_.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(50):
        action = rng.uniform(-2, 2, size=1).astype(np.float32)
        expected, reward, *_ = stock.step(-action)
        got, got_reward, *_ = reversed_.step(action)
        np.testing.assert_array_equal(got[:3], expected)
        assert got_reward == reward


@pytest.mark.parametrize(
    "task, swap",
    [
        ("MountainCarSwapped", lambda action: 2 - action),
        ("MountainCarContinuousReversed", np.negative),
        _of_extra("box2d", "LunarLanderSwapped", lambda action: 3 - action),
        _of_extra("box2d", "LunarLanderContinuousReversed", np.negative),
    ],
)
def test_the_base_task_under_other_actions(task, swap):
    stock, turned = gym.make(_base(f"nsrl/{task}-v0")), gym.make(f"nsrl/{task}-v0")
    stock.reset(seed=3)
    turned.reset(seed=3)
    stock.action_space.seed(0)
    for _ in range(40):
        action = stock.action_space.sample()
        expected, reward, *_ = stock.step(swap(action))
        got, got_reward, *_ = turned.step(action)
        np.testing.assert_array_equal(got[:-1], expected)
        assert got_reward == reward and got[-1] == 1.0


@pytest.mark.parametrize("body", [_of_extra("mujoco", body) for body in ("HalfCheetah", "Swimmer", "Ant")])
def test_backward_negates_the_forward_reward_and_nothing_else(body):
    forward, backward = gym.make(f"{body}-v5"), gym.make(f"nsrl/{body}Backward-v0")
    forward.reset(seed=0)
    backward.reset(seed=0)
    forward.action_space.seed(0)
    speeds = []
    for _ in range(20):
        action = forward.action_space.sample()
        expected, reward, *_, info = forward.step(action)
        got, got_reward, *_, got_info = backward.step(action)
        np.testing.assert_array_equal(got[:-1], expected)
        assert got_info["reward_forward"] == -info["reward_forward"]
        assert got_reward == pytest.approx(reward - 2 * info["reward_forward"], abs=1e-9)
        speeds.append(info["reward_forward"])
    assert np.max(np.abs(speeds)) > 0.01


@pytest.mark.parametrize(
    "task, factor",
    [_of_extra("mujoco", "HalfCheetahPlain", 1), _of_extra("mujoco", "HalfCheetahHeavyTorso", 4)],
)
def test_heavy_torso_is_four_times_as_heavy(task, factor):
    stock = gym.make("HalfCheetah-v5").unwrapped.model.body("torso").mass
    np.testing.assert_allclose(gym.make(f"nsrl/{task}-v0").unwrapped.model.body("torso").mass, factor * stock)


@pytest.mark.parametrize(
    "task, gravity, wind",
    [
        _of_extra("box2d", "LunarLander", -10.0, False),
        _of_extra("box2d", "LunarLanderLowGravity", -2.5, False),
        _of_extra("box2d", "LunarLanderWind", -10.0, True),
    ],
)
def test_lunar_lander_gravity_and_wind(task, gravity, wind):
    env = gym.make(f"nsrl/{task}-v0").unwrapped
    assert (env.gravity, env.enable_wind) == (gravity, wind)


def test_every_registered_task_belongs_to_a_pair_or_a_sequence_and_the_other_way_round():
    paired = {t for p in PAIRS.values() for t in (p.retained, p.new)}
    assert {task[0] for task in _TASKS} == paired | {t for s in SEQUENCES.values() for t in s.tasks}


def test_pair_is_found_by_name_and_does_not_change():
    assert all(pair(name) is p and p.name == name for name, p in PAIRS.items())
    with pytest.raises(dataclasses.FrozenInstanceError):
        pair("cartpole_swapped").new = "CartPole-v1"


def test_unknown_pair_suggests_the_nearest_name():
    with pytest.raises(TaskError, match="'cartpole_swaped': did you mean 'cartpole_swapped'"):
        pair("cartpole_swaped")
    with pytest.raises(ValueError, match="'chess': the pairs are cartpole_swapped, "):
        pair("chess")


@pytest.mark.parametrize("task", ["nsrl/CartPoleSwapped-v0", _of_extra("mujoco", "nsrl/HalfCheetahHeavyTorso-v0")])
def test_vectorised(task):
    env = make_vec_env(task, n_envs=2, seed=0)
    observation = env.reset()
    assert observation.shape == (2, *env.observation_space.shape)
    observation, reward, *_ = env.step(np.stack([env.action_space.sample() for _ in range(2)]))
    assert observation.dtype == env.observation_space.dtype and reward.shape == (2,)
    env.close()
