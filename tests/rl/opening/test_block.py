"""The free block: whatever moves in it, the old task is as it was, and what puts it right is nothing to the new one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.env_util import make_vec_env
from torch import Tensor, nn

from nsrl import NullSpacePPO, NullSpaceTRPO, RetentionBuffer
from nsrl.errors import NsrlError
from nsrl.reading.limits import Unreadable
from nsrl.rl.opening.block import OFF, FreeBlock
from nsrl.rl.opening.units import free_units
from nsrl.rl.policies.actor_critic import policy_outputs
from nsrl.rl.training import checkpoint
from tests.rl.builders import NEW, OLD, trained
from tests.rl.opening.builders import ACTIVATIONS, measured, policy_of, states
from tests.rl.policy_builders import ACTIONS, joint_kl
from tests.tolerances import relative

SETTINGS: dict[type, dict[str, Any]] = {
    NullSpacePPO: {"n_steps": 64, "batch_size": 64, "learning_rate": 1e-2},
    NullSpaceTRPO: {"n_steps": 64, "target_kl": 0.05},
}


def opened(
    activation: type[nn.Module], widths: list[int], silence: bool = True
) -> tuple[Any, FreeBlock, Tensor, Tensor]:
    policy = policy_of(activation, widths)
    old, new = states(policy, 0.0), states(policy, 1.0, seed=1)
    block = free_units(policy, old, new, measured(policy, old), 1e-3, seed=0, go_on=not silence)
    assert block is not None
    return policy, block, old, new


def move(policy: Any, block: FreeBlock, old: Tensor, size: float) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter, mask in block.masks(policy, old):
            parameter += size * torch.randn(parameter.shape, generator=generator) * mask


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("widths", [[48], [48, 40], [40, 32, 40]])
@pytest.mark.parametrize("silence", [True, False])
def test_a_large_step_is_in_the_null_space(activation: type[nn.Module], widths: list[int], silence: bool) -> None:
    policy, block, old, new = opened(activation, widths, silence)
    with torch.no_grad():
        before, constant = policy_outputs(policy, old), block.constant(policy, old)
        move(policy, block, old, 2.0)
        there = policy_outputs(policy, new)
        moved = float((policy_outputs(policy, old) - before).abs().max())
        block.settle(policy, old, constant)
        left = float((policy_outputs(policy, old) - before).abs().max())
        on_new = float((policy_outputs(policy, new) - there).abs().max())
    # what a unit says that is off: below -OFF, activations differ by no more from what they say further below
    idle = activation()(torch.linspace(-10.0 * OFF, -OFF, 1000, dtype=torch.float64))
    spread = float(idle.max() - idle.min())
    head = float(block.layers.linears[-1].weight[:, block.free[-1]].detach().abs().sum(1).max())
    rounding = 64.0 * relative(torch.float32) * float(there.abs().max() + before.abs().max())
    # through further layers of fresh units, which are off too, nothing adds up
    assert left <= 2.0 * spread * head + rounding
    assert moved > 0.1 > left, "the step would have been felt"
    # the switch of an inner layer is off by as much from what it is taken to say
    assert on_new <= rounding + (0.0 if activation is nn.ReLU else 1e-4 * head)


@pytest.mark.parametrize("actions", ACTIONS)
def test_it_is_so_for_every_kind_of_action(actions: str) -> None:
    policy = policy_of(actions=ACTIONS[actions])
    old, new = states(policy, 0.0), states(policy, 1.0, seed=1)
    block = free_units(policy, old, new, lambda: 0.0, 1e-3, seed=0)
    assert block is not None
    with torch.no_grad():
        reference, constant = copy.deepcopy(policy.get_distribution(old)), block.constant(policy, old)
        move(policy, block, old, 0.3)
        there = policy_outputs(policy, new)
        block.settle(policy, old, constant)
        kl = joint_kl(reference, policy.get_distribution(old))
    # outputs of size 1000 in single precision, one step behind another
    assert float(kl.mean()) < 1e-6
    torch.testing.assert_close(policy_outputs(policy, new).detach(), there, rtol=1e-5, atol=1e-4)


def test_what_the_old_task_is_computed_with_does_not_move() -> None:
    policy, block, old, _ = opened(nn.Tanh, [48, 40])
    masks = dict(block.masks(policy, old))
    for number, layer in enumerate(block.layers.linears):
        kept = torch.ones(layer.out_features, dtype=torch.bool)
        if number < len(block.free):
            kept[block.free[number][1:]] = False
            assert not masks[layer.weight][kept].any() and not masks[layer.bias][kept].any()
            assert masks[layer.bias][~kept].all()
        else:
            assert not masks[layer.bias].any()
    heads = masks[block.layers.linears[-1].weight]
    assert heads[:, block.free[-1]].all() and int(heads.sum()) == heads.shape[0] * len(block.free[-1])


def test_it_is_written_and_read() -> None:
    policy, block, old, _ = opened(nn.Tanh, [48, 40])
    again = FreeBlock.read(json.loads(json.dumps(block.written())), policy, old)
    assert all(torch.equal(one, other) for one, other in zip(again.free, block.free, strict=True))
    assert torch.equal(again.switch.weights, block.switch.weights) and again.heard is block.heard
    assert torch.equal(again.switch.origin, block.switch.origin) and again.units == block.units


@pytest.mark.parametrize(
    "change",
    [
        {"free": [[0, 1]]},
        {"free": [[0, 1], [0, 0]]},
        {"free": [[1, 0], [0, 1]]},
        {"free": [[0, 1], [0, 40]]},
        {"free": [[0, 1], [True, 2]]},
        {"columns": []},
        {"columns": [0]},
        {"columns": [4]},
        {"weights": [1.0, 2.0]},
        {"weights": [float("nan")]},
        {"heard": 1},
        {"silent": None},
        {"flicker": -1.0},
        {"more": 0},
    ],
)
def test_what_it_cannot_have_written_is_refused(change: dict[str, Any]) -> None:
    policy, block, old, _ = opened(nn.Tanh, [48, 40])
    with pytest.raises(Unreadable):
        FreeBlock.read({**block.written(), **change}, policy, old)


def learner(kind: str, algorithm: type, **options: Any) -> tuple[Any, RetentionBuffer]:
    agent, _ = trained(kind)
    buffer = RetentionBuffer.collect(agent, OLD[kind], n_states=256, n_envs=2)
    envs = make_vec_env(NEW[kind], 2, seed=1)
    settings = {**SETTINGS[algorithm], **options}
    return algorithm.from_pretrained(agent, envs, retain=buffer, seed=1, kl_budget=0.01, **settings), buffer


@pytest.mark.parametrize("kind", ["discrete", "box"])
@pytest.mark.parametrize("algorithm", SETTINGS)
def test_updates_spend_nothing_of_the_budget(kind: str, algorithm: type) -> None:
    model, _ = learner(kind, algorithm)
    model.learn(1500)
    record, report = model.retention.opening.record, model.retention_report()
    assert record.units > 0 and report.updates > 5
    moved = model.retention._start - model.retention.constraint.parameters.read()
    assert float(moved.norm()) > 0.1
    # outputs of size 10 in single precision, behind as many updates, and squared
    assert report.kl_most <= record.kl + 1e-8
    assert report.held == report.updates and report.restored == report.rollbacks == 0


@pytest.mark.parametrize("kind", ["discrete", "box"])
@pytest.mark.parametrize("algorithm", SETTINGS)
def test_what_keeps_the_old_task_is_nothing_to_the_new_one(kind: str, algorithm: type) -> None:
    """The policy that an update ends with is, on the roll-out, the one that the algorithm itself has come to."""
    model, _ = learner(kind, algorithm, settle=0.0)
    model.learn(400)
    engine, reached = model.retention, []
    enforce = engine.end
    states = torch.as_tensor(model.rollout_buffer.observations).view(-1, *model.observation_space.shape)

    def end() -> dict[str, float]:
        reached.append(policy_outputs(model.policy, states).detach())
        return enforce()

    engine.end = end
    before = engine._feasible
    model.train()
    with torch.no_grad():
        behind = policy_outputs(model.policy, states)
    assert len(reached) == 1 and not torch.equal(engine._feasible, before)
    # single precision, weights of size 16 that cancel in the switch
    torch.testing.assert_close(behind, reached[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_without_it_updates_do(algorithm: type) -> None:
    model, _ = learner("discrete", algorithm, confine="off")
    model.learn(1500)
    report = model.retention_report()
    assert report.opening.units > 0 and report.kl_most > 1e-5 and report.held == report.updates


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_a_model_that_is_loaded_is_confined_too(algorithm: type, tmp_path: Path) -> None:
    model, buffer = learner("discrete", algorithm)
    model.learn(600)
    model.save(tmp_path / "m.zip")
    loaded = algorithm.load(tmp_path / "m.zip", env=model.get_env(), retain=buffer)
    block = loaded.retention.opening.block
    assert all(torch.equal(a, b) for a, b in zip(block.free, model.retention.opening.block.free, strict=True))
    before = loaded.retention.last.kl_mean
    loaded.learn(600, reset_num_timesteps=False)
    assert loaded.retention_report().kl_most <= before + 1e-8


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_a_checkpoint_holds_what_the_old_task_is_held_to(algorithm: type, tmp_path: Path) -> None:
    """The constant is remembered from update to update; a resumed run goes on with it, to the same bits."""
    model, _ = learner("discrete", algorithm)
    model.learn(600)
    constant = model.retention.state_dict()["constant"]
    assert constant is not None
    checkpoint.save(tmp_path / "c", model)
    fresh, _ = learner("discrete", algorithm)
    checkpoint.restore(tmp_path / "c", fresh)
    assert torch.equal(fresh.retention.state_dict()["constant"], constant)
    fresh.set_logger(model.logger)
    fresh.rollout_buffer = copy.deepcopy(model.rollout_buffer)
    for one in (model, fresh):
        np.random.seed(0)
        torch.manual_seed(0)
        one.train()
    for name, value in model.policy.state_dict().items():
        assert torch.equal(fresh.policy.state_dict()[name], value), name
    assert torch.equal(model.retention.state_dict()["constant"], constant)
    for damaged in (constant.float(), constant[:1], constant * float("nan"), 1.0):
        with pytest.raises(Unreadable):
            fresh.retention.check_state({**fresh.retention.state_dict(), "constant": damaged})
    with torch.no_grad():  # weights that somebody else has set have a constant of their own
        model.policy.action_net.weight.mul_(1.0 + 1e-7)
        model.policy.action_net.bias.add_(1e-6)
    model.train()
    assert not torch.equal(model.retention.state_dict()["constant"], constant)


def test_a_zip_with_a_damaged_block_is_refused(tmp_path: Path) -> None:
    model, buffer = learner("discrete", NullSpacePPO)
    model.learn(300)
    model.retention.opening.block.free[0][0] = 10_000
    model.save(tmp_path / "m.zip")
    with pytest.raises(NsrlError, match="block"):
        NullSpacePPO.load(tmp_path / "m.zip", env=model.get_env(), retain=buffer)


def test_a_checkpoint_from_before_there_was_a_block_is_read(tmp_path: Path) -> None:
    model, _ = learner("discrete", NullSpacePPO)
    model.learn(300)
    state = model.retention.state_dict()
    del state["opening"]["block"]
    fresh, _ = learner("discrete", NullSpacePPO)
    fresh.retention.check_state(state)
    fresh.retention.load_state_dict(state)
    assert fresh.retention.opening.block is None and fresh.retention.opening.record.units > 0
    checkpoint.save(tmp_path / "c", fresh)
