"""Policies of many actions: nothing of N x C x C, the budget kept, the report bounded."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import TRPO, MaskablePPO
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv
from torch.utils._python_dispatch import TorchDispatchMode

from nsrl import RetentionBuffer, protect
from nsrl.projection.budget import enforcement
from nsrl.rl.budget.engine import DIAGNOSED, SHOWN, shown_rows
from nsrl.rl.policies.actor_critic import policy_outputs
from nsrl.rl.retention.constraint import RetentionConstraint
from tests.rl.oracles import independent_kl, within
from tests.tolerances import assert_near

BUDGET = 1e-4


class Board(gym.Env):
    """Random squares, random rewards, as many moves as are asked for."""

    observation_space = spaces.Box(-1.0, 1.0, (6,))

    def __init__(self, moves: spaces.Space):
        self.action_space = moves
        self.random = np.random.default_rng(0)
        self.steps = 0

    def reset(self, **options: Any) -> tuple[np.ndarray, dict]:
        self.steps = 0
        return self._look(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        return self._look(), 5.0 * float(self.random.standard_normal()), self.steps % 20 == 0, False, {}

    def action_masks(self) -> np.ndarray:
        return self.random.random(self.action_space.n) < 0.3

    def _look(self) -> np.ndarray:
        return self.random.uniform(-1.0, 1.0, 6).astype(np.float32)


class Largest(TorchDispatchMode):
    """The most numbers that any tensor had."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for part in out if isinstance(out, list | tuple) else [out]:
            if isinstance(part, torch.Tensor) and part.layout == torch.strided:
                self.numbers = max(self.numbers, part.untyped_storage().nbytes() // part.element_size())
        return out


def build(algorithm: Any, moves: spaces.Space, states: int, width: int = 16) -> tuple[Any, RetentionBuffer]:
    options: dict[str, Any] = {} if algorithm is TRPO else {"n_epochs": 3, "learning_rate": 3e-3}
    model = algorithm(
        "MlpPolicy",
        DummyVecEnv([lambda: Board(moves)] * 2),
        n_steps=32,
        batch_size=64,
        seed=0,
        device="cpu",
        policy_kwargs={"net_arch": [width]},
        **options,
    )
    random = np.random.default_rng(0)
    masks = {"action_masks": random.random((states, moves.n)) < 0.3} if algorithm is MaskablePPO else {}
    observations = random.uniform(-1.0, 1.0, (states, 6)).astype(np.float32)
    return model, RetentionBuffer.from_arrays(observations, model, **masks)


@pytest.mark.parametrize("algorithm", [PPO, MaskablePPO, TRPO])
def test_learning_with_many_actions_keeps_the_budget_without_a_matrix_a_state(
    algorithm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many actions as chess has; rows of 80 states would be 1.4e9 numbers."""
    actions, states = 4672, 100
    monkeypatch.setattr(enforcement, "MANY", 0)
    model, buffer = build(algorithm, spaces.Discrete(actions), states)
    with Largest() as largest:
        protect(model, buffer, kl_budget=BUDGET)
        model.learn(128)
        report = model.retention_report()
    assert model.retention.updates == 2 and 0.0 < independent_kl(model, buffer) <= within(BUDGET, buffer)
    assert 0 < report.rank <= SHOWN
    # 8 states x 64 rows x 4,672 actions of the report, and the same again where it is transformed
    assert largest.numbers <= 2 * SHOWN * actions


@pytest.mark.parametrize("moves", [spaces.MultiDiscrete([40, 50]), spaces.MultiBinary(80)])
@pytest.mark.parametrize("algorithm", [PPO, TRPO])
def test_several_choices_and_bits_keep_theirs(algorithm: Any, moves: spaces.Space) -> None:
    model, buffer = build(algorithm, moves, 100)
    protect(model, buffer, kl_budget=BUDGET).learn(128)
    assert 0.0 < independent_kl(model, buffer) <= within(BUDGET, buffer)


@pytest.mark.parametrize("algorithm", [PPO, MaskablePPO])
def test_the_model_of_a_restoration_is_that_of_the_rows(algorithm: Any) -> None:
    model, buffer = build(algorithm, spaces.Discrete(70), 20, width=5)
    constraint = RetentionConstraint(model.policy, buffer)
    with torch.no_grad():
        for parameter in constraint.parameters.parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))
    products, rows = constraint.restoration(), constraint.linearise(constraint.train)
    assert products.jacobian.shape == rows.jacobian.shape
    vector = torch.randn(rows.jacobian.shape[1])
    cotangent = torch.randn(rows.jacobian.shape[0])
    terms = rows.jacobian.shape[0]
    assert_near(products.jacobian.matvec(vector), rows.jacobian.matvec(vector), terms=terms)
    assert_near(products.jacobian.rmatvec(cotangent), rows.jacobian.rmatvec(cotangent), terms=terms)
    assert_near(products.residual, rows.residual, terms=terms)
    assert products.divergence == pytest.approx(rows.divergence, rel=1e-5)


def test_few_rows_are_those_of_the_likeliest_actions() -> None:
    model, buffer = build(PPO, spaces.Discrete(70), 12, width=5)
    constraint = RetentionConstraint(model.policy, buffer)
    few, all_rows = constraint.linearise(constraint.train, rows=7), constraint.linearise(constraint.train)
    n = len(constraint.train)
    with torch.no_grad():
        likely = policy_outputs(model.policy, buffer.inputs(constraint.train.numpy()))[:, 1:].topk(7).indices
    where = (torch.arange(n).unsqueeze(1) * 69 + likely).flatten()
    dense = all_rows.jacobian.dense()[where]
    assert_near(few.jacobian.dense(), dense, terms=70)
    assert_near(few.residual, all_rows.residual[where], terms=70, scale=1.0)


@pytest.mark.parametrize(("rows", "states"), [(1, 64), (17, 64), (24, 64), (49, 10), (99, 8), (4671, 8)])
def test_the_report_s_rows_are_bounded(rows: int, states: int) -> None:
    count, each = shown_rows(64, rows)
    assert count == states and count * (each or rows) <= DIAGNOSED
    assert each is None or count * each <= SHOWN
