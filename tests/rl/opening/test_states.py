"""States of the new task: what is visited, what is exchanged, and what stays as it was."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from nsrl.rl.opening.states import NewStates, exchanged_states, random_states, visited_states
from tests.rl.builders import NEW, SMALL, trained


class Watched(gym.Env):
    """Remembers its actions, whether each was valid, and the observations that it showed."""

    def __init__(self, action_space: spaces.Space, dict_observations: bool = False):
        vector = spaces.Box(-1.0, 1.0, (3,), np.float32)
        self.observation_space = spaces.Dict({"v": vector}) if dict_observations else vector
        self.action_space = action_space
        self.actions: list[Any] = []
        self.shown: list[Any] = []
        self.valid: list[bool] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self._steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        self._steps += 1
        self.actions.append(action)
        choices = np.ravel(action)
        starts = np.cumsum([0, *self._sizes()[:-1]])
        self.valid.append(bool(self.mask[starts + choices].all()) if len(self._sizes()) else True)
        return self._observe(), 0.0, False, self._steps % 9 == 0, {}

    def _sizes(self) -> list[int]:
        if isinstance(self.action_space, spaces.MultiDiscrete):
            return [int(n) for n in self.action_space.nvec]
        return [int(self.action_space.n)] if isinstance(self.action_space, spaces.Discrete) else []

    def _observe(self) -> Any:
        random.random(), np.random.rand(), torch.rand(1)  # some environments draw from the global generators
        sizes = self._sizes()
        self.mask = self.np_random.random(sum(sizes)) < 0.3
        for start, size in zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=False):
            self.mask[start + self.np_random.integers(size)] = True
        found = self.np_random.uniform(-1.0, 1.0, 3).astype(np.float32)
        self.shown.append(found)
        return {"v": found} if isinstance(self.observation_space, spaces.Dict) else found


class Masked(Watched):
    def action_masks(self) -> np.ndarray:
        return self.mask


ACTIONS = {
    "discrete": spaces.Discrete(4),
    "multi discrete": spaces.MultiDiscrete([3, 2]),
    "box": spaces.Box(-1.0, 1.0, (2,)),
    "binary": spaces.MultiBinary(3),
}


def learner(actions: str, masked: bool = False, dict_observations: bool = False, seed: int = 0) -> Any:
    algorithm, env = (MaskablePPO, Masked) if masked else (PPO, Watched)
    envs = DummyVecEnv([partial(env, ACTIONS[actions], dict_observations)] * 2)
    policy = "MultiInputPolicy" if dict_observations else "MlpPolicy"
    return algorithm(policy, envs, n_steps=8, batch_size=8, seed=seed, device="cpu")


def global_generators() -> tuple[Any, ...]:
    return (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2],
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("play", [random_states, visited_states])
@pytest.mark.parametrize(("actions", "masked"), [*((name, False) for name in ACTIONS), ("discrete", True)])
def test_states_are_those_that_the_environments_showed_and_steps_are_counted(
    play: Any, actions: str, masked: bool
) -> None:
    model = learner(actions, masked)
    model.num_timesteps = 5
    before = global_generators()
    found = play(model, 7, seed=3)
    assert global_generators() == before
    assert len(found) == 8 and model.num_timesteps == 5 + 8
    envs = model.env.envs
    shown = np.stack([env.unwrapped.shown[step] for step in range(4) for env in envs])
    assert np.array_equal(np.asarray(found.inputs), shown)
    assert (found.valid is None) == (not masked)
    # the run goes on from a reset, as `learn` begins
    assert np.array_equal(model._last_obs, np.stack([env.unwrapped.shown[-1] for env in envs]))
    assert model._last_episode_starts.all()


@pytest.mark.parametrize("play", [random_states, visited_states])
@pytest.mark.parametrize("actions", ["discrete", "multi discrete"])
def test_only_valid_actions_are_tried(play: Any, actions: str) -> None:
    model = learner(actions, masked=True)
    found = play(model, 60, seed=0)
    envs = [env.unwrapped for env in model.env.envs]
    assert all(all(env.valid) for env in envs) and sum(len(env.valid) for env in envs) == 60
    assert found.valid.shape == (60, model.policy.action_net.out_features) and not bool(found.valid.all())
    assert len({str(action) for env in envs for action in env.actions}) > 1


@pytest.mark.parametrize("play", [random_states, visited_states])
def test_the_seed_decides(play: Any) -> None:
    runs = []
    for seed in (1, 1, 2):
        model = learner("discrete")
        play(model, 40, seed)
        runs.append([action for env in model.env.envs for action in env.unwrapped.actions])
    assert runs[0] == runs[1] != runs[2]


def test_dict_observations_and_normalised_ones_are_what_the_policy_takes() -> None:
    found = random_states(learner("discrete", dict_observations=True), 6, seed=0)
    assert found.inputs["v"].shape == (6, 3) and len(found) == 6
    env = VecNormalize(DummyVecEnv([partial(Watched, ACTIONS["discrete"])] * 2), training=False)
    env.obs_rms.mean, env.obs_rms.var = np.full(3, 5.0), np.full(3, 4.0)
    model = PPO("MlpPolicy", env, n_steps=8, batch_size=8, device="cpu")
    found = random_states(model, 4, seed=0)
    shown = np.stack([inner.unwrapped.shown[step] for step in range(2) for inner in env.venv.envs])
    np.testing.assert_allclose(np.asarray(found.inputs), (shown - 5.0) / np.sqrt(4.0 + env.epsilon), rtol=1e-6)


def test_random_actions_are_spread_over_the_space() -> None:
    model = learner("box")
    random_states(model, 200, seed=0)
    actions = np.stack([action for env in model.env.envs for action in env.unwrapped.actions])
    assert actions.min() < -0.8 and actions.max() > 0.8


# -- exchanged ---------------------------------------------------------------------------------------------------------


@given(
    free=st.sets(st.integers(0, 4)), same=st.sets(st.integers(0, 4)), count=st.integers(1, 30), seed=st.integers(0, 99)
)
def test_only_inputs_that_never_moved_on_the_buffer_are_exchanged(
    free: set[int], same: set[int], count: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    old, new = torch.rand(20, 5, generator=generator), torch.rand(9, 5, generator=generator)
    constant = sorted(free | same)
    old[:, constant] = 0.5
    new[:, sorted(same - free)] = 0.5
    before = old.clone(), new.clone(), torch.get_rng_state()
    found = exchanged_states(old, NewStates(new, None), None, count, seed)
    assert torch.equal(old, before[0]) and torch.equal(new, before[1]) and torch.equal(torch.get_rng_state(), before[2])
    if not free:
        assert found is None
        return
    assert found is not None and found.valid is None and len(found) == min(count, 20)
    assert found.inputs.dtype == old.dtype
    moving = [column for column in range(5) if column not in constant]
    rows = {tuple(row.tolist()) for row in old[:, moving]}
    assert all(tuple(row.tolist()) in rows for row in found.inputs[:, moving])
    if moving:  # no state twice
        assert len({tuple(row.tolist()) for row in found.inputs[:, moving]}) == len(found)
    values = {tuple(row.tolist()) for row in new[:, constant]}  # together, as one new state has them
    assert all(tuple(row.tolist()) in values for row in found.inputs[:, constant])
    assert bool((found.inputs[:, sorted(free)] != 0.5).any())


def test_exchanged_states_keep_the_masks_of_their_situations() -> None:
    old, new = torch.rand(10, 3), torch.rand(6, 3)
    old[:, 2], new[:, 2] = 0.0, 1.0
    valid = torch.rand(10, 4) < 0.5
    theirs = torch.ones(6, 4, dtype=torch.bool)
    found = exchanged_states(old, NewStates(new, theirs), valid, 8, seed=0)
    for inputs, mask in zip(found.inputs, found.valid, strict=True):
        source = int((old[:, :2] == inputs[:2]).all(1).nonzero()[0])
        assert torch.equal(mask, valid[source])
    assert bool(exchanged_states(old, NewStates(new, theirs), None, 8, seed=0).valid.all())


def test_in_dict_observations_every_part_is_exchanged_by_itself() -> None:
    old = {"a": torch.rand(10, 3), "b": torch.zeros(10, 2), "i": torch.zeros(10, 1, 4, 4, dtype=torch.uint8)}
    new = {"a": torch.rand(6, 3), "b": torch.rand(6, 2), "i": torch.ones(6, 1, 4, 4, dtype=torch.uint8)}
    found = exchanged_states(old, NewStates(new, None), None, 8, seed=0)
    rows = {tuple(row.tolist()) for row in old["a"]}
    assert all(tuple(row.tolist()) in rows for row in found.inputs["a"])
    assert {tuple(row.tolist()) for row in found.inputs["b"]} <= {tuple(row.tolist()) for row in new["b"]}
    assert not found.inputs["i"].any()  # an image's pixels say nothing one by one
    old["b"] = torch.rand(10, 2)
    assert exchanged_states(old, NewStates(new, None), None, 8, seed=0) is None


def test_joined_and_selected_states() -> None:
    one, other = (NewStates(torch.rand(3, 2), torch.ones(3, 4, dtype=torch.bool)) for _ in range(2))
    both = one.joined(other)
    assert len(both) == 6 and both.valid.shape == (6, 4)
    assert torch.equal(both.select(torch.tensor([4])).inputs[0], other.inputs[1])


def test_a_swapped_cartpole_shows_its_context_and_an_old_one_never_did() -> None:
    _, buffer = trained()
    model = PPO("MlpPolicy", make_vec_env(NEW["discrete"], 2, seed=0), seed=0, device="cpu", **SMALL)
    new = random_states(model, 20, seed=0)
    found = exchanged_states(buffer.inputs(), new, None, 50, seed=0)
    assert bool((buffer.inputs()[:, -1] == 0.0).all()) and bool((found.inputs[:, -1] == 1.0).all())


def test_stretches_are_as_long_as_they_are_asked_for() -> None:
    """A policy that stays up longer than it is watched has stretches too."""
    model = learner("discrete")
    steps = 8
    found = random_states(model, steps * model.n_envs, seed=0, stretch=4)
    assert len(found.returns) >= 2 * model.n_envs and max(found.returns) <= 4.0  # one a step
    assert len(random_states(model, steps * model.n_envs, seed=0, stretch=64).returns) < len(found.returns)
