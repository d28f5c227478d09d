"""The task sequences: what each task changes against the stock environment, and what it leaves alone."""

import copy
import dataclasses

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from nsrl_envs import SEQUENCES, ReverseSensors, TaskError
from nsrl_envs.cartpole import cartpole_of_trio

every_sequence = pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=lambda sequence: sequence.name)


class Echo(gym.Env):
    """Observes random numbers of a given space, and says in the info which they were."""

    def __init__(self, space: spaces.Box):
        self.observation_space, self.action_space = space, spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        observation = self.observation_space.sample()
        return observation, {"observation": observation.copy()}


@every_sequence
def test_tasks_of_a_sequence_have_equal_spaces_and_contexts_of_their_own(sequence):
    envs = [gym.make(task) for task in sequence.tasks]
    assert all(env.observation_space == envs[0].observation_space for env in envs)
    assert all(env.action_space == envs[0].action_space for env in envs)
    contexts = [tuple(env.get_wrapper_attr("context")) for env in envs]
    assert not any(contexts[0]) and len(set(contexts)) == len(contexts)
    assert all(sum(context) == 1 for context in contexts[1:])


@pytest.mark.parametrize(
    "task, swapped, angle",
    [("CartPoleTrio", False, 1), ("CartPoleTrioSwapped", True, 1), ("CartPoleTrioReversedAngle", False, -1)],
)
def test_a_task_of_the_trio_is_stock_cartpole_but_for_what_it_says(task, swapped, angle):
    stock, ours = gym.make("CartPole-v1"), gym.make(f"nsrl/{task}-v0")
    sign = np.array([1, 1, angle, 1], np.float32)
    np.testing.assert_array_equal(ours.reset(seed=7)[0][:4], sign * stock.reset(seed=7)[0])
    rng = np.random.default_rng(0)
    for _ in range(50):
        stock.reset(seed=0)
        ours.reset(seed=0)
        stock.unwrapped.state = ours.unwrapped.state = tuple(rng.uniform(-0.15, 0.15, size=4))
        action = int(rng.integers(2))
        expected, *outcome = stock.step(1 - action if swapped else action)
        got, *got_outcome = ours.step(action)
        np.testing.assert_array_equal(got[:4], sign * expected)
        assert got_outcome[:3] == outcome[:3]


def test_no_single_rule_balances_two_tasks_of_the_trio():
    """What balances one of them by looking at angle and angular velocity drops the pole at once on the others."""

    def steps(task: str, angle: float, velocity: float) -> int:
        env = cartpole_of_trio(task)
        observation, _ = env.reset(seed=0)
        for step in range(200):
            observation, _, terminated, *_ = env.step(int(angle * observation[2] + velocity * observation[3] > 0))
            if terminated:
                return step
        return 200

    rules = {"stock": (1.0, 0.5), "swapped": (-1.0, -0.5), "reversed_angle": (-1.0, 0.5)}
    lengths = {(task, rule): steps(task, *rules[rule]) for task in rules for rule in rules}
    assert all((length == 200) == (task == rule) for (task, rule), length in lengths.items())
    assert all(length < 60 for (task, rule), length in lengths.items() if task != rule)


def test_an_unknown_task_of_the_trio_is_refused():
    with pytest.raises(TaskError, match="no CartPole task 'long' in the trio; its tasks are stock, swapped"):
        cartpole_of_trio("long")


@given(st.sets(st.integers(0, 3), min_size=1), st.sampled_from([np.float32, np.float64]))
def test_reversed_sensors_show_the_negative_and_keep_the_space(entries, dtype):
    space = spaces.Box(-np.array([1, 2, np.inf, 3], dtype), np.array([1, 2, np.inf, 3], dtype), dtype=dtype)
    env = ReverseSensors(Echo(space), sorted(entries))
    observation, info = env.reset(seed=0)
    sign = np.where(np.isin(np.arange(4), list(entries)), -1, 1)
    np.testing.assert_array_equal(observation, sign * info["observation"])
    assert observation.dtype == dtype and env.observation_space == space and observation in env.observation_space


@pytest.mark.parametrize(
    "space, entries, told",
    [
        (spaces.Discrete(3), [0], "flat floating-point Box"),
        (spaces.Box(-1, 1, (2, 2)), [0], "flat floating-point Box"),
        (spaces.Box(0, 1, (2,)), [0], "symmetric about zero"),
        (spaces.Box(-1, 1, (2,)), [2], "some of 0 to 1"),
        (spaces.Box(-1, 1, (2,)), [-1], "some of 0 to 1"),
        (spaces.Box(-1, 1, (2,)), [], "some of 0 to 1"),
    ],
)
def test_reversed_sensors_refuse_what_does_not_fit(space, entries, told):
    with pytest.raises(TaskError, match=told):
        ReverseSensors(Echo(space), entries)


def test_only_what_is_reversed_needs_symmetric_bounds():
    space = spaces.Box(np.array([0, -1], np.float32), np.array([5, 1], np.float32))
    assert ReverseSensors(Echo(space), [1]).observation_space == space


def test_reversed_sensors_are_made_again_from_their_spec():
    env = ReverseSensors(gym.make("CartPole-v1"), (2,))
    again = gym.make(copy.deepcopy(env.spec))
    np.testing.assert_array_equal(env.reset(seed=3)[0], again.reset(seed=3)[0])


def test_sequences_do_not_change():
    assert all(sequence.name == name for name, sequence in SEQUENCES.items())
    with pytest.raises(dataclasses.FrozenInstanceError):
        SEQUENCES["cartpole_trio"].tasks = ()
