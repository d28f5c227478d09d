"""The wrappers, each against the environment that it wraps."""

import copy

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from nsrl_envs import ReverseActions, ScaleBodyMass, ScaleGravity, SwapActions, TaskContext, TaskError


class Echo(gym.Env):
    """Observes what it was told to, and returns the action that reached it as the info."""

    def __init__(self, observation_space=None, action_space=None):
        self.observation_space = observation_space or spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = action_space or spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {"action": action}


def _sent(env: gym.Env, action):
    return env.step(action)[4]["action"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value, size, expected", [(0, 1, [0]), (1, 2, [1, 1]), ([0, 0.5, 1], 3, [0, 0.5, 1])])
def test_context_is_appended_with_its_bounds_and_dtype(dtype, value, size, expected):
    inner = spaces.Box(np.array([-1, -np.inf], dtype), np.array([2, np.inf], dtype), dtype=dtype)
    env = TaskContext(Echo(inner), value, size)
    for observation in (env.reset(seed=0)[0], env.step(0)[0]):
        assert observation.dtype == dtype
        np.testing.assert_array_equal(observation[2:], expected)
        assert observation in env.observation_space
    np.testing.assert_array_equal(env.observation_space.low, [-1, -np.inf] + [0] * size)
    np.testing.assert_array_equal(env.observation_space.high, [2, np.inf] + [1] * size)
    assert env.observation_space.dtype == dtype
    env.context[:] = 7
    np.testing.assert_array_equal(env.context, expected)


@given(st.floats(0, 1), st.floats(0, 1))
def test_context_value_does_not_change_the_observation_space(first, second):
    env = Echo()
    assert TaskContext(env, first).observation_space == TaskContext(env, second).observation_space


@pytest.mark.parametrize(
    "value, size, told",
    [
        (2.0, 1, r"leaves \[0, 1\]"),
        (float("nan"), 1, r"leaves \[0, 1\]"),
        ([0, 1], 1, "pass size=2"),
        (0, 0, "at least 1"),
    ],
)
def test_context_refuses_values_that_do_not_fit(value, size, told):
    with pytest.raises(TaskError, match=told):
        TaskContext(Echo(), value, size)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(3),
        spaces.Box(0, 255, (4,), np.uint8),
        spaces.Box(0, 1, (2, 2)),
        spaces.Dict(a=spaces.Discrete(2)),
    ],
)
def test_context_refuses_observations_that_are_not_flat_floats(space):
    with pytest.raises(TaskError, match="flat floating-point Box"):
        TaskContext(Echo(space), 0)


@given(st.integers(1, 9), st.integers(-3, 3))
def test_swapping_reverses_the_actions(n, start):
    space = spaces.Discrete(n, start=start)
    env = SwapActions(Echo(action_space=space))
    base = list(range(start, start + n))
    assert [_sent(env, action) for action in base] == base[::-1]
    assert env.action_space == space
    assert space.contains(_sent(env, np.int64(start)))


@pytest.mark.parametrize("high", [2.0, np.inf])
def test_reversing_negates_the_actions(high):
    env = ReverseActions(Echo(action_space=spaces.Box(-high, high, (3,), np.float32)))
    action = np.array([1, 0, -2], np.float32)
    np.testing.assert_array_equal(_sent(env, action), [-1, 0, 2])
    assert _sent(env, action).dtype == np.float32


@pytest.mark.parametrize(
    "wrapper, space, told",
    [
        (SwapActions, spaces.Box(-1, 1), "use ReverseActions"),
        (ReverseActions, spaces.Discrete(2), "use SwapActions"),
        (ReverseActions, spaces.Box(0, 1), "symmetric about zero"),
    ],
)
def test_action_wrappers_refuse_spaces_that_do_not_fit(wrapper, space, told):
    with pytest.raises(TaskError, match=told):
        wrapper(Echo(action_space=space))


def test_wrapped_environment_is_made_again_from_its_spec():
    env = TaskContext(SwapActions(gym.make("CartPole-v1")), value=1)
    again = gym.make(copy.deepcopy(env.spec))
    action = 1
    env.reset(seed=3)
    again.reset(seed=3)
    np.testing.assert_array_equal(env.step(action)[0], again.step(action)[0])


class TestScaleBodyMass:
    @pytest.fixture(autouse=True)
    def _needs_mujoco(self):
        pytest.importorskip("mujoco")

    def test_mass_inertia_and_derived_constants(self):
        stock = gym.make("HalfCheetah-v5").unwrapped.model
        heavy = ScaleBodyMass(gym.make("HalfCheetah-v5"), body="torso", factor=4).unwrapped.model
        torso = stock.body("torso").id
        others = np.arange(stock.nbody) != torso
        np.testing.assert_allclose(heavy.body_mass[torso], 4 * stock.body_mass[torso])
        np.testing.assert_allclose(heavy.body_inertia[torso], 4 * stock.body_inertia[torso])
        np.testing.assert_array_equal(heavy.body_mass[others], stock.body_mass[others])
        np.testing.assert_array_equal(heavy.body_inertia[others], stock.body_inertia[others])
        # what MuJoCo derives from the masses has followed
        np.testing.assert_allclose(heavy.body_subtreemass[0], heavy.body_mass.sum())
        assert heavy.dof_invweight0[0] < stock.dof_invweight0[0]

    def test_other_environments_keep_their_masses(self):
        before = gym.make("HalfCheetah-v5")
        masses = before.unwrapped.model.body_mass.copy()
        ScaleBodyMass(gym.make("HalfCheetah-v5"), body="torso", factor=4)
        np.testing.assert_array_equal(before.unwrapped.model.body_mass, masses)
        np.testing.assert_array_equal(gym.make("HalfCheetah-v5").unwrapped.model.body_mass, masses)

    def test_initial_state_is_the_same(self):
        stock = gym.make("HalfCheetah-v5")
        heavy = ScaleBodyMass(gym.make("HalfCheetah-v5"), body="torso", factor=4)
        np.testing.assert_array_equal(stock.reset(seed=5)[0], heavy.reset(seed=5)[0])

    def test_refuses_what_does_not_fit(self):
        with pytest.raises(TaskError, match="its bodies are world, torso"):
            ScaleBodyMass(gym.make("HalfCheetah-v5"), body="tail", factor=2)
        with pytest.raises(TaskError, match="greater than 0"):
            ScaleBodyMass(gym.make("HalfCheetah-v5"), body="torso", factor=0)


def test_scaling_a_body_needs_a_mujoco_environment():
    with pytest.raises(TaskError, match="needs a MuJoCo environment"):
        ScaleBodyMass(gym.make("CartPole-v1"), body="torso", factor=2)


class TestScaleGravity:
    @pytest.fixture(autouse=True)
    def _needs_mujoco(self):
        pytest.importorskip("mujoco")

    def test_a_falling_body_gains_half_the_speed(self):
        speeds = []
        for env in (gym.make("Hopper-v5"), ScaleGravity(gym.make("Hopper-v5"), factor=0.5)):
            env.reset(seed=0)
            data, model = env.unwrapped.data, env.unwrapped.model
            qpos, qvel = data.qpos.copy(), np.zeros_like(data.qvel)
            qpos[1] += 5.0  # high above the ground
            env.unwrapped.set_state(qpos, qvel)
            env.unwrapped.do_simulation(np.zeros(model.nu), 20)
            speeds.append(data.qvel[1])
        # the joints' damping and limits act within the body only: its fall is that of a point
        np.testing.assert_allclose(speeds[1], 0.5 * speeds[0], rtol=0.02)
        assert speeds[0] < 0.0

    def test_other_environments_keep_theirs(self):
        before = gym.make("Hopper-v5")
        gravity = before.unwrapped.model.opt.gravity.copy()
        ScaleGravity(gym.make("Hopper-v5"), factor=0.5)
        np.testing.assert_array_equal(before.unwrapped.model.opt.gravity, gravity)
        np.testing.assert_array_equal(gym.make("Hopper-v5").unwrapped.model.opt.gravity, gravity)

    def test_refuses_what_does_not_fit(self):
        with pytest.raises(TaskError, match="greater than 0"):
            ScaleGravity(gym.make("Hopper-v5"), factor=0)
        with pytest.raises(TaskError, match="compiled model"):
            ScaleGravity(gym.make("CartPole-v1"), factor=2)
