"""How the tasks reach gymnasium: in fresh interpreters, worker processes, and without optional packages."""

import importlib.metadata
import subprocess
import sys
import textwrap

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import namespace, registry
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

import nsrl_envs
from nsrl_envs import MissingExtra
from nsrl_envs.optional import load_environment


def _run(code: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_a_fresh_interpreter_makes_a_task_without_an_import_of_its_own():
    out = _run("""
        import gymnasium
        env = gymnasium.make("nsrl_envs:nsrl/CartPoleSwapped-v0")
        print(env.spec.id, *env.reset(seed=0)[0][4:])
    """)
    assert out.split() == ["nsrl/CartPoleSwapped-v0", "1.0"]


def test_importing_the_package_registers_but_loads_no_simulator_and_no_torch():
    out = _run("""
        import sys, gymnasium, nsrl_envs
        print(*sorted({"torch", "mujoco", "Box2D", "pygame", "nsrl", "stable_baselines3"} & set(sys.modules)))
        print(sum(id.startswith("nsrl/") for id in gymnasium.registry))
    """)
    loaded, count = out.split("\n")[:2]
    assert loaded == ""
    paired = {t for p in nsrl_envs.PAIRS.values() for t in (p.retained, p.new)}
    assert int(count) == len(paired | {t for s in nsrl_envs.SEQUENCES.values() for t in s.tasks})


def test_worker_processes_find_the_task():
    # two workers that start as new interpreters: nothing that this process imported is there
    env = make_vec_env(
        "nsrl_envs:nsrl/CartPole-v0",
        n_envs=2,
        vec_env_cls=SubprocVecEnv,
        vec_env_kwargs={"start_method": "spawn"},
    )
    assert env.reset().shape == (2, 5)
    env.close()


def test_entry_point_registers_under_the_namespace(monkeypatch):
    (entry_point,) = importlib.metadata.entry_points(group="gymnasium.envs", name="nsrl")
    # tasks with a context are registered by whoever asks for them
    before = {id: spec for id, spec in registry.items() if id.startswith("nsrl/") and ".context" not in id}
    for id in before:
        monkeypatch.delitem(registry, id)
    with namespace("nsrl"):  # as plugin loaders call it
        entry_point.load()()
    assert {id: spec for id, spec in registry.items() if id.startswith("nsrl/") and ".context" not in id} == before


def test_registering_again_changes_nothing(recwarn):
    spec = gym.spec("nsrl/CartPole-v0")
    nsrl_envs.register_all()
    assert gym.spec("nsrl/CartPole-v0") is spec
    assert not recwarn


@pytest.mark.parametrize(
    "package, extra, task",
    [("mujoco", "mujoco", "nsrl/Ant-v0"), ("Box2D", "box2d", "nsrl/LunarLanderWind-v0")],
)
def test_missing_package_is_told_when_the_task_is_made(package, extra, task):
    out = _run(f"""
        import sys
        sys.modules[{package!r}] = None  # makes its import fail
        import gymnasium, nsrl_envs
        try:
            gymnasium.make({task!r})
        except nsrl_envs.MissingExtra as error:
            print(error)
    """)
    assert f'pip install "nsrl[{extra}]"' in out


def test_missing_extra_is_a_value_error_and_gymnasiums_own_error():
    with pytest.raises(MissingExtra) as told:
        load_environment("no_such_module:Environment", extra="mujoco")
    assert isinstance(told.value, ValueError)
    assert isinstance(told.value, gym.error.DependencyNotInstalled)


@pytest.mark.parametrize("task", ["nsrl/CartPoleSwapped-v0", "nsrl/PendulumReversed-v0"])
def test_render_mode_passes_through(task):
    assert gym.make(task, render_mode="rgb_array").unwrapped.render_mode == "rgb_array"


def test_rendering_draws_the_base_environment():
    pytest.importorskip("pygame")
    env, stock = (gym.make(id, render_mode="rgb_array") for id in ("nsrl/CartPoleSwapped-v0", "CartPole-v1"))
    env.reset(seed=0)
    stock.reset(seed=0)
    np.testing.assert_array_equal(env.render(), stock.render())


@pytest.fixture
def clean_registry():
    """What is registered on the way is gone behind the test."""
    before = set(registry)
    yield
    for id in set(registry) - before:
        del registry[id]


@pytest.mark.usefixtures("clean_registry")
def test_a_task_is_told_which_one_it_is():
    ids = nsrl_envs.told("CartPole-v1", 0), nsrl_envs.told("nsrl/CartPole-v0", 1)
    assert ids == ("nsrl/CartPole-v1.context0", "nsrl/nsrl.CartPole-v0.context1")
    for id, plain, value in zip(ids, ("CartPole-v1", "nsrl/CartPole-v0"), (0.0, 1.0), strict=True):
        env, base = gym.make(id), gym.make(plain)
        seen, _ = env.reset(seed=3)
        np.testing.assert_array_equal(seen, [*base.reset(seed=3)[0], value])
        for _ in range(600):  # beyond the task's own limit
            steps = env.step(0), base.step(0)
            np.testing.assert_array_equal(steps[0][0], [*steps[1][0], value])
            assert steps[0][1:4] == steps[1][1:4]
            if steps[0][2] or steps[0][3]:
                break
        assert env.observation_space.high[-1] == 1.0
    spec = gym.spec(ids[0])
    assert nsrl_envs.told("CartPole-v1", 0) == ids[0]
    assert gym.spec(ids[0]) is spec
    with pytest.raises(nsrl_envs.TaskError, match="value of a context is 2"):
        nsrl_envs.told("CartPole-v1", 2)


@pytest.mark.usefixtures("clean_registry")
def test_a_told_task_is_found_by_its_id_in_another_process():
    for id in ("nsrl/CartPole-v1.context1", "nsrl/nsrl.CartPole-v0.context0"):
        assert id not in registry
        nsrl_envs.find_told(id)
        gym.make(id).close()
    for id in ("nsrl/Nothing-v0.context0", "CartPole-v1.context0", "nsrl/CartPole-v0"):
        before = set(registry)
        nsrl_envs.find_told(id)
        assert set(registry) == before
