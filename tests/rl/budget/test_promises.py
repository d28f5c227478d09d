"""Whatever changes once a budget is in force, and whatever is raised: the policy stays inside it, or it is said."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers import NormalizeObservation
from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from nsrl import NullSpacePPO, NullSpaceTRPO, RetentionBuffer, protect
from nsrl.errors import NsrlError
from nsrl.projection.budget.enforcement import Enforcement
from nsrl.rl.agents import rl_zoo
from nsrl.rl.agents.normalization import RetainingVecNormalize
from tests.rl.builders import NEW, OLD, SHARED, SMALL, SpikyReward, trained
from tests.rl.oracles import independent_kl, within

BUDGET = 1e-3


def protected(kind: str = "discrete", budget: float = BUDGET, **options: Any) -> tuple[NullSpacePPO, RetentionBuffer]:
    agent, buffer = trained(kind)
    envs = make_vec_env(NEW[kind], 2, seed=0, wrapper_class=SpikyReward)
    settings = {**SHARED, **options}
    return NullSpacePPO.from_pretrained(agent, envs, retain=buffer, kl_budget=budget, **settings), buffer


def trust_region(budget: float = BUDGET) -> tuple[NullSpaceTRPO, RetentionBuffer]:
    agent, buffer = trained()
    envs = make_vec_env(NEW["discrete"], 2, seed=0)
    return NullSpaceTRPO.from_pretrained(
        agent, envs, retain=buffer, kl_budget=budget, n_steps=64, target_kl=0.2, confine="off"
    ), buffer


class Failure(RuntimeError):
    """Raised on purpose."""


def failing(calls: int) -> Callable[..., Any]:
    """A function that raises from its `calls`-th call on, and calls the one it stands in for before."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        made = [0]

        def called(*args: Any, **kwargs: Any) -> Any:
            made[0] += 1
            if made[0] >= calls:
                raise Failure("on purpose")
            return original(*args, **kwargs)

        return called

    return wrap


# -- an exception in an update -------------------------------------------------------------------------------------

RAISED = [
    (protected, "constraint", "probe", 5),  # in a minibatch
    (protected, "constraint", "divergences", 1),  # in the measurement
    (protected, "constraint", "restoration", 1),
    (protected, "constraint", "binding_divergence", 1),  # in the restoration's line search
    (protected, "enforcement", "fall_back", 1),
    (protected, "constraint", "measure", 1),
    (trust_region, "constraint", "quadratic", 1),
    (trust_region, "constraint", "binding_divergence", 1),  # in the step's line search
    (trust_region, "constraint", "divergences", 1),
    (trust_region, "constraint", "measure", 1),
]


@pytest.mark.parametrize(("make", "part", "name", "calls"), RAISED)
def test_an_exception_in_an_update_leaves_the_last_feasible_policy(
    make: Callable[..., Any], part: str, name: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, buffer = make()
    model.learn(128)
    retention = model.retention
    feasible = retention.constraint.parameters.read()
    for group in model.policy.optimizer.param_groups:
        group["lr"] = 0.1
    monkeypatch.setattr(model, "lr_schedule", lambda _: 0.1)
    if name == "fall_back":  # nothing to restore with: the way back is next
        monkeypatch.setattr(Enforcement, "restore_inside", lambda self, kl: (kl, 0))
        monkeypatch.setattr(Enforcement, "fall_back", failing(calls)(Enforcement.fall_back))
    else:
        target = getattr(retention, part)
        monkeypatch.setattr(target, name, failing(calls)(getattr(target, name)))
    with pytest.raises(Failure):
        model.train()
    assert torch.equal(retention.constraint.parameters.read(), feasible)
    assert independent_kl(model, buffer) <= within(BUDGET, buffer)
    assert not model.policy.optimizer._optimizer_step_pre_hooks
    assert not model.policy.optimizer._optimizer_step_post_hooks


def test_a_baseline_promises_nothing_and_stays_where_an_exception_left_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = protected(method="finetune")
    model.learn(128)
    before = model.retention.constraint.parameters.read()
    monkeypatch.setattr(model.retention.constraint, "measure", failing(1)(model.retention.constraint.measure))
    with pytest.raises(Failure):
        model.train()
    assert not torch.equal(before, model.retention.constraint.parameters.read())


# -- weights -------------------------------------------------------------------------------------------------------


def disturbed(model: Any, size: float) -> dict[str, torch.Tensor]:
    """The model's weights, moved at random."""
    generator = torch.Generator().manual_seed(0)
    return {
        key: value + size * torch.randn(value.shape, generator=generator)
        for key, value in model.policy.state_dict().items()
    }


class Loading(BaseCallback):
    """Loads weights over the budget before every update, and notes what the policy's KL is after it."""

    def __init__(self, buffer: RetentionBuffer, weights: dict[str, torch.Tensor]):
        super().__init__()
        self.buffer, self.weights = buffer, weights
        self.kls: list[float] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.kls.append(independent_kl(self.model, self.buffer))

    def _on_rollout_end(self) -> None:
        self.model.policy.load_state_dict(self.weights)
        assert independent_kl(self.model, self.buffer) > 10 * BUDGET


@pytest.mark.parametrize("make", [protected, trust_region])
def test_weights_loaded_in_mid_run_are_brought_back_inside(make: Callable[..., Any]) -> None:
    model, buffer = make()
    loading = Loading(buffer, disturbed(model, 0.3))
    with pytest.warns(UserWarning, match=r"over the budget of 0.001; this update brings it back"):
        model.learn(5 * 128, callback=loading)
    kls = [*loading.kls, independent_kl(model, buffer)]
    assert len(kls) == 6 and max(kls) <= within(BUDGET, buffer)


def test_weights_over_the_budget_are_refused_before_learning_and_by_set_parameters() -> None:
    model, buffer = protected()
    model.learn(128)
    feasible = {key: value.clone() for key, value in model.policy.state_dict().items()}
    parameters = {**model.get_parameters(), "policy": disturbed(model, 0.3)}
    with pytest.raises(NsrlError, match=r"over the budget of 0\.001"):
        model.set_parameters(parameters)
    assert all(torch.equal(value, feasible[key]) for key, value in model.policy.state_dict().items())
    model.policy.load_state_dict(disturbed(model, 0.3))
    with pytest.raises(NsrlError, match=r"over the budget of 0\.001"):
        model.learn(128)
    with torch.no_grad():
        model.policy.action_net.bias.fill_(math.nan)
    with pytest.raises(NsrlError, match="mean KL of inf"):
        model.learn(128)
    model.set_parameters({**parameters, "policy": feasible})
    model.learn(128)
    assert independent_kl(model, buffer) <= within(BUDGET, buffer)


@pytest.mark.parametrize("damage", ["another shape", "a name missing", "an unknown name"])
def test_parameters_that_torch_refuses_halfway_are_not_taken_halfway(damage: str) -> None:
    model, _ = protected()
    model.learn(128)
    before = {key: value.clone() for key, value in model.policy.state_dict().items()}
    weights = disturbed(model, 0.3)
    if damage == "another shape":
        weights["action_net.bias"] = torch.zeros(3)
    elif damage == "a name missing":
        del weights["action_net.bias"]
    else:
        weights["nowhere"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match="Error"):
        model.set_parameters({**model.get_parameters(), "policy": weights})
    assert all(torch.equal(value, before[key]) for key, value in model.policy.state_dict().items())


@pytest.mark.parametrize("damage", ["weights", "layer", "statistics"])
def test_what_is_not_as_it_was_measured_is_neither_reported_nor_exported(damage: str, tmp_path: Path) -> None:
    envs = VecNormalize(make_vec_env(OLD["discrete"], 2, seed=0))
    agent = PPO("MlpPolicy", envs, seed=0, device="cpu", **SMALL).learn(256)
    buffer = RetentionBuffer.collect(agent, envs, n_states=96)
    new = RetainingVecNormalize(make_vec_env(NEW["discrete"], 2, seed=0), buffer.normalizer)
    model = NullSpacePPO.from_pretrained(agent, new, retain=buffer, kl_budget=BUDGET, **SMALL, opening="off")
    model.learn(128)
    model.export(tmp_path / "good" / "agent.zip")
    if damage == "weights":
        model.policy.load_state_dict(disturbed(model, 0.3))
    elif damage == "layer":
        replace_hidden_layer(model)
    else:
        model.get_vec_normalize_env().obs_rms.mean += 0.5
    exports = [lambda: model.export(tmp_path / "bad" / "agent.zip"), lambda: rl_zoo.export_run(model, tmp_path / "zoo")]
    for call in exports if damage == "weights" else [*exports, model.retention_report]:
        with pytest.raises(NsrlError, match="budget"):
            call()
    assert not any((tmp_path / "bad").glob("*")) and not any((tmp_path / "zoo").rglob("*.zip"))


def test_weights_inside_the_budget_are_where_the_next_update_starts_from() -> None:
    model, buffer = protected()
    small = disturbed(model, 1e-4)
    model.policy.load_state_dict(small)
    assert 0.0 < independent_kl(model, buffer) < BUDGET
    model.set_parameters({**model.get_parameters(), "policy": small})
    wanted = model.retention.constraint.parameters.read()
    model.learn(0)
    model.retention.begin()
    assert torch.equal(model.retention._feasible, wanted)
    model.retention.abandon()


# -- what the policy is made of ------------------------------------------------------------------------------------


def replace_layer(model: Any) -> None:
    model.policy.action_net = nn.Linear(64, 2)


def replace_hidden_layer(model: Any) -> None:
    model.policy.mlp_extractor.policy_net[0] = nn.Linear(4, 64)


def replace_parameter(model: Any) -> None:
    model.policy.action_net.weight = nn.Parameter(3.0 * model.policy.action_net.weight.detach())


def assign_weights(model: Any) -> None:
    model.policy.load_state_dict({k: v + 1.0 for k, v in model.policy.state_dict().items()}, assign=True)


def replace_policy(model: Any) -> None:
    model.policy = type(model.policy)(model.observation_space, model.action_space, model.lr_schedule)


def replace_extractor(model: Any) -> None:
    model.policy.pi_features_extractor = type(model.policy.features_extractor)(model.observation_space)


def add_spectral_norm(model: Any) -> None:
    nn.utils.parametrizations.spectral_norm(model.policy.action_net)


def freeze_layer(model: Any) -> None:
    model.policy.action_net.weight.requires_grad_(False)


def hook_layer(model: Any) -> None:
    model.policy.action_net.register_forward_hook(lambda module, args, output: 2.0 * output)


def in_double(model: Any) -> None:
    model.policy.double()


def read_images_otherwise(model: Any) -> None:
    model.policy.normalize_images = False


CHANGES = {
    replace_layer: "module action_net was replaced",
    replace_hidden_layer: "policy_net.0 was replaced",
    replace_parameter: "parameter action_net.weight was replaced",
    assign_weights: "was replaced",
    replace_policy: "the model's policy was replaced",
    replace_extractor: "pi_features_extractor was replaced",
    add_spectral_norm: "action_net",
    freeze_layer: "action_net.weight was trainable .* and is frozen now",
    hook_layer: "action_net was given a hook",
    in_double: "number format and device of",
    read_images_otherwise: "policy.normalize_images",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [protected, trust_region])
def test_another_policy_than_the_protected_one_is_refused_before_and_in_learning(
    change: Callable[[Any], None], make: Callable[..., Any]
) -> None:
    model, _ = make()
    model.learn(128)
    before = model.retention.updates
    change(model)
    with pytest.raises(NsrlError, match=CHANGES[change]):
        model.learn(128)
    with pytest.raises(NsrlError, match=CHANGES[change]):
        model.train()
    assert model.retention.updates == before


def test_after_a_replaced_layer_protect_measures_the_policy_anew() -> None:
    agent, buffer = trained()
    model = protect(agent, buffer, kl_budget=BUDGET)
    replace_layer(model)
    with pytest.raises(NsrlError, match="over the budget"):
        protect(model, buffer, kl_budget=BUDGET, trust_buffer=True)
    own = RetentionBuffer.collect(model, OLD["discrete"], n_states=60, n_envs=2)
    protect(model, own, kl_budget=BUDGET).learn(256)
    assert 0.0 < independent_kl(model, own) <= within(BUDGET, own)


def test_a_standard_deviation_that_is_thawed_later_is_refused() -> None:
    agent, buffer = trained("box")
    agent.policy.log_std.requires_grad_(False)
    agent.set_env(make_vec_env(NEW["box"], 2, seed=0, wrapper_class=SpikyReward))
    model = protect(agent, buffer, kl_budget=BUDGET)
    model.learn(128)
    model.policy.log_std.requires_grad_(True)
    with pytest.raises(NsrlError, match=r"log_std was frozen .* and is trainable now"):
        model.learn(128)
    model.policy.log_std.requires_grad_(False)
    with torch.no_grad():  # frozen for the optimizer, but not for its owner
        model.policy.log_std.add_(1.0)
    with pytest.raises(NsrlError, match="over the budget"):
        model.learn(128)


def test_with_mode_the_standard_deviation_is_its_owners() -> None:
    model, buffer = protected("box", preserve="mode")
    model.learn(128)
    model.policy.log_std.requires_grad_(False)
    with torch.no_grad():
        model.policy.log_std.fill_(-1.0)
    model.learn(128)
    assert bool((model.policy.log_std == -1.0).all())
    assert independent_kl(model, buffer, "mode") <= within(BUDGET, buffer)


# -- observation statistics ----------------------------------------------------------------------------------------


def normalised(kind: str = "box", **options: Any) -> tuple[PPO, RetentionBuffer]:
    env = VecNormalize(make_vec_env(OLD[kind], 2, seed=0), **options)
    model = PPO("MlpPolicy", env, seed=0, device="cpu", **SMALL).learn(256)
    return model, RetentionBuffer.collect(model, n_states=60)


@pytest.mark.parametrize("algorithm", [PPO, A2C, TRPO])
def test_an_environment_that_shows_observations_otherwise_is_refused(algorithm: type) -> None:
    model: Any = algorithm(
        "MlpPolicy", VecNormalize(make_vec_env(OLD["box"], 2, seed=0)), seed=0, device="cpu", n_steps=64
    )
    model.learn(128)
    buffer = RetentionBuffer.collect(model, n_states=60)
    protect(model, buffer, kl_budget=BUDGET)
    old = model.env
    bare = make_vec_env(NEW["box"], 2, seed=0)
    for other in (bare, VecNormalize(bare), VecNormalize(bare, norm_obs=False), VecNormalize(old)):
        with pytest.raises(NsrlError, match=r"statistics than it did|two VecNormalize"):
            model.set_env(other)
        assert model.env is old
    model.set_env(RetainingVecNormalize(bare, buffer.normalizer))
    model.learn(128)
    assert independent_kl(model, buffer) <= within(BUDGET, buffer)


def test_statistics_of_a_new_environment_are_frozen_where_they_are_the_same() -> None:
    model, buffer = normalised()
    protect(model, buffer, kl_budget=BUDGET)
    moving = VecNormalize(make_vec_env(NEW["box"], 2, seed=0))
    moving.obs_rms.mean, moving.obs_rms.var = buffer.normalizer.mean.copy(), buffer.normalizer.var.copy()
    moving.obs_rms.count = 10.0
    model.set_env(moving)
    model.learn(256)
    assert np.array_equal(moving.obs_rms.mean, buffer.normalizer.mean)
    assert independent_kl(model, buffer) <= within(BUDGET, buffer)


@pytest.mark.parametrize("change", ["thawed", "replaced", "off", "clipped", "around"])
def test_statistics_that_are_changed_behind_the_model_s_back_stop_the_next_update(change: str) -> None:
    model, buffer = normalised()
    env: Any = model.env
    protect(model, buffer, kl_budget=BUDGET)
    model.learn(128)
    if change == "thawed":
        env.obs_rms = RunningMeanStd(shape=env.observation_space.shape)
    elif change == "replaced":
        env.obs_rms.mean = env.obs_rms.mean + 0.1
    elif change == "off":
        env.norm_obs = False
    elif change == "clipped":
        env.clip_obs = 0.5
    else:
        model.env = VecNormalize(make_vec_env(NEW["box"], 2, seed=0))
    for call in (model.train, lambda: model.learn(128)):
        with pytest.raises(NsrlError, match="statistics than it did"):
            call()


def test_a_model_without_an_environment_takes_one_that_shows_what_the_buffer_does() -> None:
    agent, buffer = normalised()
    model = PPO("MlpPolicy", make_vec_env(OLD["box"], 2, seed=0), device="cpu", **SMALL)
    model.policy.load_state_dict(agent.policy.state_dict())
    model.env = model._vec_normalize_env = None
    protect(model, buffer, kl_budget=BUDGET)
    with pytest.raises(NsrlError, match="without statistics than it did"):
        model.set_env(make_vec_env(NEW["box"], 2, seed=0))
    model.set_env(RetainingVecNormalize(make_vec_env(NEW["box"], 2, seed=0), buffer.normalizer))
    model.learn(128)
    assert independent_kl(model, buffer) <= within(BUDGET, buffer)


def test_statistics_inside_the_single_environments_stop_too() -> None:
    def make() -> gym.Env:
        return NormalizeObservation(gym.make(f"nsrl_envs:{OLD['box']}"))

    env = DummyVecEnv([make, make])
    model = PPO("MlpPolicy", env, seed=0, device="cpu", **SMALL).learn(256)
    buffer = RetentionBuffer.collect(model, env, n_states=60)
    protect(model, buffer, kl_budget=BUDGET)
    other = DummyVecEnv([make, make])
    for _ in range(2):
        before = [inner.get_wrapper_attr("obs_rms").mean.copy() for inner in model.env.envs]
        model.learn(128)
        after = [inner.get_wrapper_attr("obs_rms").mean for inner in model.env.envs]
        assert all(np.array_equal(one, two) for one, two in zip(before, after, strict=True))
        model.set_env(other)
