"""Buffer refresh: states that the policy visits by now, with what the reference does there, under the same budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from nsrl import NullSpacePPO, NullSpaceTRPO, RetentionBuffer
from nsrl.errors import NsrlError
from nsrl.rl.policies.actor_critic import policy_outputs
from nsrl.rl.training import BufferRefresh, TaskEvaluation, checkpoint
from tests.rl.builders import NEW, OLD, SMALL, build_agent, trained
from tests.rl.clockwork import AtBoundary, Clockwork
from tests.rl.oracles import independent_kl, same, within

BUDGET = 0.01
SETTINGS: dict[type, dict[str, Any]] = {
    NullSpacePPO: SMALL,
    NullSpaceTRPO: {"n_steps": 64, "batch_size": 64, "n_critic_updates": 2},
}


def learner(agent: Any, buffer: RetentionBuffer, algorithm: type = NullSpacePPO, **options: Any) -> Any:
    return algorithm.from_pretrained(
        agent, NEW["discrete"], retain=buffer, seed=1, **{"kl_budget": BUDGET, **SETTINGS[algorithm], **options}
    )


class Watch(BaseCallback):
    """States that are held to, the KL there and what it may be, before every roll-out."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, float, float]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        held = self.model.retention.constraint.buffer
        self.rows.append((len(held), independent_kl(self.model, held), within(BUDGET, held)))


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_the_budget_holds_on_states_that_the_policy_visits(algorithm: type) -> None:
    agent, buffer = trained()
    model = learner(agent, buffer, algorithm)
    refresh, watch = BufferRefresh(OLD["discrete"], agent, every=200, states=32), Watch()
    model.learn(700, callback=[refresh, watch])
    held = model.retention.constraint.buffer
    assert refresh.taken == model.retention.refreshes == 3 and len(held) == len(buffer) + 3 * 32
    assert sorted({row[0] for row in watch.rows}) == [len(buffer) + number * 32 for number in range(4)]
    assert max(kl for _, kl, _ in watch.rows) > 0.0 and all(kl <= limit for _, kl, limit in watch.rows)
    # the first states are the buffer's own, and all outputs the reference's
    np.testing.assert_array_equal(held.observations[: len(buffer)], buffer.observations)
    with torch.no_grad():
        expected = policy_outputs(agent.policy, held.inputs()).numpy()
    np.testing.assert_allclose(held.outputs, expected, rtol=1e-5, atol=1e-5)
    assert 0 < held.heldout[len(buffer) :].sum() < 96 and held.tasks == (buffer.tasks[0],) * 4


def test_a_policy_over_the_budget_on_the_new_states_is_brought_inside() -> None:
    agent, buffer = trained()
    model = learner(agent, buffer, opening="off")
    model.learn(256)
    shifted = buffer.outputs + np.float32([0.4, -0.4])  # another reference's, which this policy is not inside of yet
    other = RetentionBuffer.merge(
        [
            buffer,
            RetentionBuffer.from_arrays(
                buffer.observations,
                outputs=shifted,
                action_space=agent.action_space,
                observation_space=agent.observation_space,
            ),
        ]
    )
    before = model.retention.constraint.parameters.read()
    assert independent_kl(model, other) > BUDGET
    # nothing is inside that budget on both, so that nothing is taken, and no weight has moved
    assert not model.retention.hold_to(other)
    assert torch.equal(model.retention.constraint.parameters.read(), before)
    assert model.retention.constraint.buffer is buffer and model.retention.refreshes == 0
    near = RetentionBuffer.from_arrays(
        buffer.observations,
        outputs=buffer.outputs + np.float32([0.05, -0.05]),
        action_space=agent.action_space,
        observation_space=agent.observation_space,
    )
    assert model.retention.hold_to(near)
    assert independent_kl(model, near) <= within(BUDGET, near)


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_a_resumed_run_is_the_uninterrupted_one(algorithm: type, tmp_path: Path) -> None:
    agent = PPO("MlpPolicy", DummyVecEnv([Clockwork] * 2), seed=0, device="cpu", **{**SMALL, "n_steps": 32}).learn(128)
    buffer = RetentionBuffer.collect(agent, DummyVecEnv([Clockwork] * 2), n_states=64, seed=0)

    def build() -> Any:
        envs = DummyVecEnv([Clockwork] * 2)
        settings = {**SETTINGS[algorithm], "n_steps": 32}
        return algorithm.from_pretrained(agent, envs, retain=buffer, kl_budget=BUDGET, seed=1, **settings)

    def refresh() -> BufferRefresh:
        return BufferRefresh(DummyVecEnv([Clockwork] * 2), agent, every=100, states=16)

    model = build()
    save = AtBoundary(320, lambda model: checkpoint.save(tmp_path / "middle", model))
    model.learn(640, callback=[refresh(), save])
    resumed = build()
    checkpoint.restore(tmp_path / "middle", resumed)
    assert resumed.retention.refreshes > 0
    resumed.learn(checkpoint.remaining(resumed, 640), callback=[refresh()], reset_num_timesteps=False)
    assert resumed.retention.refreshes == model.retention.refreshes > 1
    assert resumed.retention.constraint.buffer.digest() == model.retention.constraint.buffer.digest()
    assert same(resumed.policy.state_dict(), model.policy.state_dict())
    assert same(resumed.policy.optimizer.state_dict(), model.policy.optimizer.state_dict())


def test_a_damaged_buffer_in_a_checkpoint_is_refused() -> None:
    agent, buffer = trained()
    model = learner(agent, buffer)
    model.learn(300, callback=BufferRefresh(OLD["discrete"], agent, every=100, states=16))
    state, fresh = model.retention.state_dict(), learner(agent, buffer)
    fresh.retention.check_state(state)
    content = state["refreshed"]
    for damaged in (3, content.float(), content[: len(content) // 2], content.flip(0), content[None]):
        with pytest.raises(NsrlError):
            fresh.retention.check_state({**state, "refreshed": damaged})
    # queues name states of the refreshed buffer, which the first one does not have
    with pytest.raises(NsrlError):
        fresh.retention.check_state({**state, "minibatches_queue": torch.tensor([10_000])})


def test_who_retains_nothing_or_another_agent_is_told() -> None:
    agent, buffer = trained()
    refresh = BufferRefresh(OLD["discrete"], agent)
    with pytest.raises(NsrlError, match="nothing is retained"):
        NullSpacePPO("MlpPolicy", NEW["discrete"], **SMALL).learn(64, callback=refresh)
    stranger = build_agent(seed=9)
    with pytest.raises(NsrlError, match="another agent"):
        learner(agent, buffer).learn(64, callback=BufferRefresh(OLD["discrete"], stranger))
    for wrong in ({"every": 0}, {"states": 0}, {"n_envs": 0}, {"seed": -1}, {"every": 1.5}):
        with pytest.raises(NsrlError, match=next(iter(wrong))):
            BufferRefresh(OLD["discrete"], agent, **wrong)


def test_a_refreshed_checkpoint_that_does_not_fit_leaves_the_first_buffer(tmp_path: Path) -> None:
    agent, buffer = trained()
    model = learner(agent, buffer)
    model.learn(300, callback=BufferRefresh(OLD["discrete"], agent, every=100, states=16))
    state, tensors = checkpoint.read_checkpoint(checkpoint.save(tmp_path / "whole", model))
    state["retention"]["kl_mean"] = 9.0  # found out when everything is in its place already
    checkpoint.write_checkpoint(tmp_path / "other", state, tensors)
    fresh = learner(agent, buffer)
    before = {name: value.clone() for name, value in fresh.policy.state_dict().items()}
    with pytest.raises(NsrlError, match="says that the policy's KL is 9"):
        checkpoint.restore(tmp_path / "other", fresh)
    assert fresh.retention.refreshes == 0 and fresh.retention.constraint.buffer is buffer
    assert same(fresh.policy.state_dict(), before)
    fresh.learn(64)  # and it learns on, held to that one
    assert independent_kl(fresh, buffer) <= within(BUDGET, buffer)


def test_a_refresh_that_is_left_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, buffer = trained()
    model = learner(agent, buffer, opening="off")
    monkeypatch.setattr(type(model.retention), "hold_to", lambda *_: False)
    refresh = BufferRefresh(OLD["discrete"], agent, every=100, states=16)
    with pytest.warns(UserWarning, match="left out"):
        model.learn(200, callback=refresh)
    assert refresh.taken == 0 and model.retention.constraint.buffer is buffer


def test_what_has_changed_since_the_budget_was_put_in_force_is_not_taken_for_what_it_rests_on() -> None:
    agent, buffer = trained()
    model = learner(agent, buffer, opening="off")
    model.policy.mlp_extractor.policy_net[1] = torch.nn.ReLU()
    with pytest.raises(NsrlError, match="was replaced after the budget was put in force"):
        model.retention.hold_to(buffer)


def own(model: Any) -> list[Any]:
    return [None, model.env, model.env.unwrapped, model.env.unwrapped.envs[0]]


@pytest.mark.parametrize("which", range(4))
def test_the_environment_that_is_learnt_on_is_not_played_in_meanwhile(which: int) -> None:
    agent, buffer = trained()
    envs = DummyVecEnv([lambda: gym.make(NEW["discrete"])])
    model = NullSpacePPO.from_pretrained(agent, envs, retain=buffer, kl_budget=BUDGET, **SMALL, opening="off")
    env = own(model)[which]
    refresh = BufferRefresh(env, agent, every=64, states=8)
    evaluation = TaskEvaluation(None, {"old": (env, None)})
    for callback in (refresh, evaluation):
        with pytest.raises(NsrlError, match="give it one of its own"):
            model.learn(128, callback=callback)


def test_the_sentence_for_the_first_buffer_of_a_refreshed_run_says_which_one_is_wanted(tmp_path: Path) -> None:
    agent, buffer = trained()
    model = learner(agent, buffer, opening="off")
    model.learn(300, callback=BufferRefresh(OLD["discrete"], agent, every=64, states=8))
    model.save(tmp_path / "model.zip")
    with pytest.raises(NsrlError, match=r"retention\.constraint\.buffer\.save"):
        NullSpacePPO.load(tmp_path / "model.zip", retain=buffer)
    path = model.retention.constraint.buffer.save(tmp_path / "refreshed.npz")
    assert NullSpacePPO.load(tmp_path / "model.zip", retain=RetentionBuffer.load(path)).retention is not None
