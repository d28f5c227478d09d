"""A spread for exploration alone: actions are drawn widely, and whoever looks sees the retained policy."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sb3_contrib import TRPO
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from torch.distributions import Normal

from nsrl import NullSpacePPO, NullSpaceTRPO, RetentionBuffer
from nsrl.errors import NsrlError
from nsrl.rl.opening.spread import ExplorationSpread, wide_log_std
from nsrl.rl.training import checkpoint
from tests.rl.builders import NEW, SMALL, narrow, trained
from tests.rl.oracles import independent_kl, same_policies, within
from tests.tolerances import assert_near

BUDGET = 0.01
STOCK = {NullSpacePPO: PPO, NullSpaceTRPO: TRPO}
SETTINGS: dict[type, dict[str, Any]] = {
    NullSpacePPO: SMALL,
    NullSpaceTRPO: {"n_steps": 64, "batch_size": 64, "n_critic_updates": 2},
}
every_algorithm = pytest.mark.parametrize("algorithm", SETTINGS)


def learner(agent: PPO, buffer: RetentionBuffer, algorithm: type = NullSpacePPO, **options: Any) -> Any:
    envs = make_vec_env(NEW["box"], 2, seed=1)
    options = {"kl_budget": BUDGET, **SETTINGS[algorithm], **options}
    return algorithm.from_pretrained(agent, envs, retain=buffer, seed=1, **options)


class Onlooker(BaseCallback):
    """Looks at the policy whenever SB3 lets anybody look."""

    def __init__(self, buffer: RetentionBuffer):
        super().__init__()
        self.buffer = buffer
        self.spreads: list[torch.Tensor] = []
        self.kls: list[float] = []
        self.explored: list[torch.Tensor] = []
        self.standard: list[torch.Tensor] = []
        self.log_probs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def _look(self) -> bool:
        self.spreads.append(self.model.policy.log_std.detach().clone())
        self.kls.append(independent_kl(self.model, self.buffer))
        return True

    def _on_training_start(self) -> None:
        self._look()

    def _on_rollout_start(self) -> None:
        self._look()
        self.explored.append(self.model.retention.exploration.log_std.clone())

    def _on_step(self) -> bool:
        return self._look()

    def _on_rollout_end(self) -> None:
        self._look()
        rollout = self.model.rollout_buffer
        observations = torch.as_tensor(rollout.observations).flatten(0, 1)
        actions = torch.as_tensor(rollout.actions).flatten(0, 1)
        with torch.no_grad():
            mean = self.model.policy.get_distribution(observations).distribution.mean
        wide = Normal(mean, self.explored[-1].exp())
        self.standard.append((actions - mean) / self.explored[-1].exp())
        self.log_probs.append((torch.as_tensor(rollout.log_probs).flatten(), wide.log_prob(actions).sum(-1)))

    def _on_training_end(self) -> None:
        self._look()


@every_algorithm
def test_the_retained_spread_is_there_bit_for_bit_and_actions_have_the_wide_one(algorithm: type) -> None:
    agent, buffer = narrow()
    reference = agent.policy.log_std.detach().clone()
    model, seen = learner(agent, buffer, algorithm), Onlooker(buffer)
    train, after = model.train, []

    def watched() -> None:
        train()
        after.append((model.policy.log_std.detach().clone(), independent_kl(model, buffer)))

    model.train = watched
    model.learn(4 * 128, callback=seen)
    assert len(after) == 4 and len(seen.spreads) > 4 * 64
    assert all(torch.equal(spread, reference) for spread in [*seen.spreads, *(spread for spread, _ in after)])
    assert max(seen.kls) <= within(BUDGET, buffer) and max(kl for _, kl in after) <= within(BUDGET, buffer)
    assert bool((seen.explored[0] > reference + 1.0).all())
    # the new task teaches it: it moves at every update
    moved = zip(seen.explored, [*seen.explored[1:], model.retention.exploration.log_std], strict=True)
    assert all(not torch.equal(one, other) for one, other in moved)
    # 128 standard normal numbers: their root mean square is off by 1 / 16 for one standard deviation
    for standard in seen.standard:
        assert 0.6 < float(standard.square().mean().sqrt()) < 1.4
    for told, expected in seen.log_probs:  # a square of numbers below 5, and logs, in single precision
        assert_near(told, expected, terms=64, scale=30.0)
    assert not same_policies(model, agent)


@every_algorithm
def test_what_is_saved_and_exported_has_the_retained_spread(algorithm: type, tmp_path: Path) -> None:
    agent, buffer = narrow()
    model = learner(agent, buffer, algorithm)
    model.learn(256)
    stream = io.BytesIO()
    model.save(stream)
    stream.seek(0)
    for loaded in (
        STOCK[algorithm].load(model.export(tmp_path / "agent"), device="cpu"),
        STOCK[algorithm].load(stream, device="cpu"),
    ):
        assert torch.equal(loaded.policy.log_std, agent.policy.log_std)
        assert independent_kl(loaded, buffer) == independent_kl(model, buffer) <= within(BUDGET, buffer)


def test_a_roll_out_that_fails_gives_the_retained_spread_back() -> None:
    agent, buffer = narrow()
    model = learner(agent, buffer)
    reference = model.policy.log_std.detach().clone()
    spread = model.retention.exploration
    with spread.sampling():
        assert torch.equal(model.policy.log_std, reference)
        with pytest.raises(RuntimeError):
            model.policy(torch.zeros(2, 9))
        assert torch.equal(model.policy.log_std, reference)
        with torch.no_grad():
            _, _, log_prob = model.policy(torch.zeros(4000, *model.observation_space.shape))
    assert torch.equal(model.policy.log_std, reference) and not model.policy._forward_hooks
    assert not model.policy._forward_pre_hooks
    # the entropy of the wide Gaussian, by 4,000 samples
    entropy = Normal(torch.zeros(1), spread.log_std.exp()).entropy().sum()
    assert -float(log_prob.mean()) == pytest.approx(float(entropy), abs=5 * 0.71 / 4000**0.5)
    with pytest.raises(ZeroDivisionError), spread.in_force():
        assert torch.equal(model.policy.log_std, spread.log_std)
        raise ZeroDivisionError
    assert torch.equal(model.policy.log_std, reference)


def test_the_parameter_stays_the_same_object_for_the_optimizer() -> None:
    agent, buffer = narrow()
    model = learner(agent, buffer)
    parameter = model.policy.log_std
    model.learn(128)
    assert model.policy.log_std is parameter
    state = model.policy.optimizer.state[parameter]
    assert bool(state["exp_avg"].any())  # its moments are those of the exploration's gradients


def test_a_wide_spread_is_taken_over_as_it_is() -> None:
    agent, _ = trained("box")
    wide = torch.as_tensor(wide_log_std(agent.action_space))
    with torch.no_grad():
        agent.policy.log_std.copy_(wide + 0.1)
    assert torch.equal(ExplorationSpread.wide(agent.policy).log_std, agent.policy.log_std)


def test_who_asks_for_another_treatment_has_no_spread_of_its_own() -> None:
    agent, buffer = narrow()
    for options in ({"opening": "off"}, {"preserve": "mode"}, {"method": "finetune"}, {"method": "kl_penalty"}):
        assert learner(agent, buffer, **options).retention.exploration is None
    for opening in ("auto", 0.5):
        assert learner(agent, buffer, opening=opening).retention.exploration is not None
    frozen, buffer = narrow()
    frozen.policy.log_std.requires_grad_(False)
    discrete, states = trained()
    envs = make_vec_env(NEW["discrete"], 2, seed=0)
    assert NullSpacePPO.from_pretrained(discrete, envs, retain=states, **SMALL).retention.exploration is None


def test_wide_is_a_share_of_the_action_space() -> None:
    from gymnasium import spaces

    space = spaces.Box(np.array([-1.0, -10.0, -np.inf], np.float32), np.array([1.0, 10.0, np.inf], np.float32))
    wide = np.exp(wide_log_std(space))
    assert wide.shape == (3,) and wide.dtype == np.float32
    assert wide[1] == pytest.approx(10.0 * wide[0], rel=1e-6) and 0.0 < wide[0] < 1.0 and wide[2] == 1.0
    agent, _ = narrow()
    found = ExplorationSpread.wide(agent.policy)
    assert bool((found.log_std >= agent.policy.log_std).all())
    assert found.log_std.data_ptr() != agent.policy.log_std.data_ptr()


@every_algorithm
def test_a_checkpoint_has_both(algorithm: type, tmp_path: Path) -> None:
    agent, buffer = narrow()
    model = learner(agent, buffer, algorithm)
    model.learn(256)
    checkpoint.save(tmp_path / "c", model)
    fresh = learner(agent, buffer, algorithm)
    checkpoint.restore(tmp_path / "c", fresh)
    assert torch.equal(fresh.retention.exploration.log_std, model.retention.exploration.log_std)
    assert torch.equal(fresh.policy.log_std, agent.policy.log_std)
    model.retention.exploration.log_std = torch.zeros(3)
    checkpoint.save(tmp_path / "damaged", model)
    with pytest.raises(NsrlError, match="standard deviation is damaged"):
        checkpoint.restore(tmp_path / "damaged", fresh)
