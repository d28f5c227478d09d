"""The fused update against SB3's own, in float64; and what is left to SB3."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from nsrl import NullSpacePPO, protect
from nsrl.projection.optimizer import FlatParameters, StepHooks
from nsrl.rl.algorithms.fused_update import FusedUpdate, fused_update
from nsrl.rl.budget.confinement import Confinement
from nsrl.rl.opening.block import FreeBlock
from nsrl.rl.opening.condensing import ActorLayers
from nsrl.rl.opening.switch import Switch
from tests.rl.builders import NEW, SMALL, generators_left_alone, trained
from tests.rl.oracles import same_policies
from tests.rl.policy_builders import ACTIONS, VECTOR, Flat


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock's checks are what is compared with, and some packages turn them off for all."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)


STEPS, COPIES = 13, 2


class Nowhere(gym.Env):
    """Spaces without a world."""

    def __init__(self, actions: str):
        self.observation_space, self.action_space = VECTOR, ACTIONS[actions]


def build(actions: str = "discrete", *, policy: dict[str, Any] | None = None, **options: Any) -> PPO:
    """A float64 PPO behind a roll-out of random states, its probabilities and values moved since."""
    kwargs = {"features_extractor_class": Flat, "net_arch": {"pi": [6, 5], "vf": [7]}, **(policy or {})}
    settings = {"n_steps": STEPS, "batch_size": 8, "n_epochs": 3, "learning_rate": 3e-3, **options}
    vec = make_vec_env(lambda: Nowhere(actions), COPIES)
    with generators_left_alone():
        model = PPO("MlpPolicy", vec, policy_kwargs=kwargs, device="cpu", seed=4, **settings)
        model.policy.double()
        model.set_logger(configure(None, []))
        draw = np.random.default_rng(0)
        model.observation_space.seed(0)
        buffer = model.rollout_buffer
        for _ in range(STEPS):
            observations = np.stack([model.observation_space.sample() for _ in range(COPIES)])
            with torch.no_grad():
                taken, values, log_prob = model.policy(torch.as_tensor(observations))
            rows = taken.numpy().reshape(COPIES, -1)
            log_prob = log_prob + 0.2 * torch.as_tensor(draw.standard_normal(COPIES))
            values = values + 0.3 * torch.as_tensor(draw.standard_normal((COPIES, 1)))
            buffer.add(observations, rows, draw.standard_normal(COPIES), np.zeros(COPIES), values, log_prob)
        buffer.compute_returns_and_advantage(torch.zeros(COPIES), np.zeros(COPIES))
    for name in ("values", "log_probs", "advantages", "returns"):
        setattr(buffer, name, getattr(buffer, name).astype(np.float64))
    buffer.to_torch = double  # SB3 casts actions to float32, and a Bernoulli's log-probability with them
    return model


def double(array: np.ndarray, copy: bool = True) -> torch.Tensor:
    return torch.tensor(array).double()


def updated(model: PPO, *, fused: bool, times: int = 2) -> np.ndarray:
    """Update a model; where numpy's generator is afterwards."""
    np.random.seed(7)
    for _ in range(times):
        if fused:
            update = fused_update(model, StepHooks(model.policy.optimizer))
            assert update is not None
            update.run()
        else:
            model.train()
    return np.random.random(3)


def state_of(model: PPO) -> dict[str, torch.Tensor]:
    """Parameters, and the optimizer's state of each."""
    found = {name: parameter.detach() for name, parameter in model.policy.named_parameters()}
    for number, entries in model.policy.optimizer.state_dict()["state"].items():
        found |= {f"{number} {key}": torch.as_tensor(value) for key, value in entries.items()}
    return found


def assert_as_stock(model: PPO, times: int = 2) -> None:
    stock = copy.deepcopy(model)
    draws = updated(stock, fused=False, times=times), updated(model, fused=True, times=times)
    assert np.array_equal(*draws), "another order of minibatches"
    wanted, found = state_of(stock), state_of(model)
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        # A gradient is right to some 1e-15, a step of Adam at most lr / eps = 300 times as far off; a dozen steps.
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: name + text)
    assert model._n_updates == stock._n_updates
    logged = model.logger.name_to_value
    assert list(logged) == list(stock.logger.name_to_value)
    assert dict(logged) == pytest.approx(dict(stock.logger.name_to_value), rel=1e-8, abs=1e-10)


OPTIONS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "clipped values": {"clip_range_vf": 0.1},
    "raw advantages": {"normalize_advantage": False},
    "entropy": {"ent_coef": 0.05},
    "small gradients": {"max_grad_norm": 0.01},
    "large gradients": {"max_grad_norm": 1e9},
    "narrow clip": {"clip_range": 0.02, "vf_coef": 2.0},
    "one left over": {"batch_size": 5},
    "one by one": {"batch_size": 1, "n_epochs": 1, "normalize_advantage": False},
    "larger than the roll-out": {"batch_size": 64},
    "relu": {"policy": {"activation_fn": nn.ReLU}},
    "no layers": {"policy": {"net_arch": []}},
    "features apart": {"policy": {"share_features_extractor": False}},
    "weight decay": {"policy": {"optimizer_kwargs": {"eps": 1e-5, "weight_decay": 0.1, "betas": (0.8, 0.9)}}},
    "schedules": {
        "clip_range": lambda left: 0.3 * left,
        "learning_rate": lambda left: 1e-3 * left,
        "clip_range_vf": 0.3,
    },
}


@pytest.mark.parametrize("actions", ACTIONS)
@pytest.mark.parametrize("name", OPTIONS)
def test_parameters_optimizer_and_log_are_those_of_the_stock_update(actions: str, name: str) -> None:
    assert_as_stock(build(actions, **OPTIONS[name]))


@pytest.mark.parametrize("actions", ACTIONS)
@pytest.mark.parametrize("limit", [0.001, 0.02, 0.05])
def test_it_stops_where_the_stock_update_does(actions: str, limit: float, capsys: pytest.CaptureFixture[str]) -> None:
    """In the first minibatch, or later, before its step."""
    model = build(actions, target_kl=limit, verbose=1, n_epochs=8, learning_rate=0.03)
    capsys.readouterr()
    assert_as_stock(model, times=1)
    said = capsys.readouterr().out.splitlines()
    assert len(said) in (0, 2) and len(set(said)) <= 1


@pytest.mark.parametrize("actions", ["discrete", "box"])
def test_probabilities_that_have_not_moved_have_their_whole_slope(actions: str) -> None:
    """The ratio is 1, where the clipped and the free objective are equal."""
    model = build(actions, n_epochs=1, batch_size=64)
    buffer = model.rollout_buffer
    with torch.no_grad():
        observations = torch.as_tensor(buffer.observations.reshape(-1, 4))
        rows = torch.as_tensor(buffer.actions.reshape(STEPS * COPIES, -1))
        rows = rows.flatten() if actions == "discrete" else rows
        buffer.log_probs = model.policy.evaluate_actions(observations, rows)[1].numpy().reshape(STEPS, COPIES)
    before = copy.deepcopy(model.policy.action_net.weight)
    assert_as_stock(model, times=1)
    assert (model.policy.action_net.weight - before).abs().min() > 1e-4


@pytest.mark.parametrize(
    "frozen", ["log_std", "action_net.bias", "mlp_extractor.policy_net.0.weight", "value_net.weight"]
)
def test_frozen_parameters_stay_and_have_no_part_in_the_clipping(frozen: str) -> None:
    model = build("box", max_grad_norm=0.05)
    parameter = dict(model.policy.named_parameters())[frozen]
    parameter.requires_grad_(False)
    before = parameter.clone()
    assert_as_stock(model)
    assert torch.equal(parameter, before)


def test_hooks_see_and_change_what_the_optimizer_is_given() -> None:
    """Some take the gradient away, some edit parameters behind the step, as the retention engine does."""
    model = build("box")
    models = [copy.deepcopy(model), model]
    for model, fused in zip(models, (False, True), strict=True):
        frozen, halved, shifted = (getattr(model.policy, name) for name in ("log_std", "action_net", "value_net"))

        def before(frozen: Any = frozen, halved: Any = halved) -> None:
            frozen.grad = None
            halved.weight.grad.mul_(0.5)
            halved.bias.grad = torch.ones_like(halved.bias)

        def after(shifted: Any = shifted) -> None:
            with torch.no_grad():
                shifted.bias.add_(0.01)

        hooks = StepHooks(model.policy.optimizer, before, after)
        np.random.seed(7)
        if fused:
            update = fused_update(model, hooks)
            assert update is not None
            update.run()
        else:
            model.train()
    wanted, found = state_of(models[0]), state_of(models[1])
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-11)


def confinement_of(model: PPO) -> Confinement:
    """To some units of each layer, the last input being 1 on the new task alone."""
    layers = ActorLayers.of(model.policy)
    assert layers is not None
    switch = Switch(torch.tensor([3]), torch.ones(1).double(), torch.zeros(1).double(), 0.0)
    block = FreeBlock(layers, [torch.tensor([0, 2, 3]), torch.tensor([1, 4])], switch)
    old = torch.linspace(-1.0, 1.0, 28).view(7, 4)
    old[:, 3] = 0.0
    actor = FlatParameters([parameter for layer in layers.linears for parameter in layer.parameters()])
    held: Any = SimpleNamespace(policy=model.policy, inputs=old, parameters=actor)
    return Confinement(block, held)


@pytest.mark.parametrize("actions", ACTIONS)
@pytest.mark.parametrize("name", ["as it comes", "entropy", "small gradients", "weight decay", "relu"])
def test_confined_updates_are_those_of_the_stock_update(actions: str, name: str) -> None:
    """The gradient is masked before every step, the displacement behind them, and what rounding shows is put right."""
    model = build(actions, **OPTIONS[name])
    models = [copy.deepcopy(model), model]
    before = model.policy.mlp_extractor.policy_net[2].weight.detach().clone()
    for model, fused in zip(models, (False, True), strict=True):
        np.random.seed(7)
        for _ in range(2):
            confinement = confinement_of(model)
            feasible = confinement._constraint.parameters.read()
            hooks = StepHooks(model.policy.optimizer, confinement.shape_gradients)
            if fused:
                update = fused_update(model, hooks)
                assert update is not None
                update.run()
            else:
                model.train()
            hooks.detach()
            confinement.project(feasible)
    wanted, found = state_of(models[0]), state_of(models[1])
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-11)
    moved = (model.policy.mlp_extractor.policy_net[2].weight - before).abs() > 0.0
    assert moved[4, 2] and not moved[0].any() and not moved[:, 1].any(), "it is not confined"


def test_stock_goes_on_from_a_fused_update_and_the_other_way_round() -> None:
    """The optimizer's state is the stock optimizer's."""
    model = build()
    stock = copy.deepcopy(model)
    for fused in (True, False, True):
        updated(model, fused=fused, times=1)
        updated(stock, fused=False, times=1)
    for name, value in state_of(stock).items():
        torch.testing.assert_close(state_of(model)[name], value, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("actions", ACTIONS)
def test_a_policy_that_diverges_ends_the_update(actions: str, fused: bool) -> None:
    model = build(actions)
    model.rollout_buffer.advantages[3] = math.nan
    with pytest.raises(ValueError):
        updated(model, fused=fused)


class Sequel(PPO):
    """Somebody's own update."""

    def train(self) -> None:
        self.policy.set_training_mode(False)


class Louder(ActorCriticPolicy):
    def evaluate_actions(self, obs: Any, actions: torch.Tensor) -> Any:
        return super().evaluate_actions(obs, 2 * actions)


class Other(RolloutBuffer):
    pass


class Longer(Flat):
    """A features extractor that learns."""

    def __init__(self, space: gym.Space):
        super().__init__(space)
        self.weight = nn.Parameter(torch.ones(1))


def look(*_: Any) -> None:
    """A hook."""


def retrace(model: PPO) -> None:
    model.policy.evaluate_actions = lambda *_: None


def tie(model: PPO) -> None:
    model.policy.mlp_extractor.value_net = model.policy.mlp_extractor.policy_net


def swap(model: PPO) -> None:
    model.policy.optimizer = torch.optim.Adam(model.policy.parameters(), lr=1e-3, amsgrad=True)


def part(model: PPO) -> None:
    model.policy.optimizer = torch.optim.Adam(model.policy.mlp_extractor.parameters(), lr=1e-3)


def schedule(model: PPO) -> None:
    torch.optim.lr_scheduler.ConstantLR(model.policy.optimizer)


UNKNOWN: dict[str, Callable[[], PPO] | Callable[[PPO], Any]] = {
    "RMSprop": lambda model: setattr(model.policy, "optimizer", torch.optim.RMSprop(model.policy.parameters())),
    "AMSGrad": swap,
    "an optimizer of some parameters": part,
    "a scheduler": schedule,
    "a step hook": lambda model: model.policy.optimizer.register_step_post_hook(look),
    "a forward hook": lambda model: model.policy.action_net.register_forward_hook(look),
    "a forward pre-hook": lambda model: model.policy.register_forward_pre_hook(look),
    "a backward hook": lambda model: model.policy.value_net.register_full_backward_hook(look),
    "a gradient hook": lambda model: model.policy.log_std.register_hook(look),
    "a weight norm": lambda model: nn.utils.parametrizations.weight_norm(model.policy.action_net),
    "another layer": lambda model: model.policy.mlp_extractor.policy_net.append(nn.LayerNorm(5)),
    "another head": lambda model: setattr(model.policy, "action_net", nn.Sequential(model.policy.action_net)),
    "a method of one's own": retrace,
    "shared layers": tie,
    "another parameter": lambda model: setattr(model.policy, "extra", nn.Parameter(torch.ones(1))),
    "half of it in single precision": lambda model: model.policy.value_net.float(),
    "another buffer": lambda model: setattr(model.rollout_buffer, "__class__", Other),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_left_to_sb3(name: str) -> None:
    model = build("box")
    hooks = StepHooks(model.policy.optimizer)
    assert fused_update(model, hooks) is not None
    UNKNOWN[name](model)
    assert fused_update(model, StepHooks(model.policy.optimizer)) is None


@pytest.mark.parametrize(
    "policy", [{"activation_fn": nn.SiLU}, {"features_extractor_class": Longer}, {"optimizer_class": torch.optim.SGD}]
)
def test_networks_and_optimizers_of_another_kind_are_left_to_sb3(policy: dict[str, Any]) -> None:
    model = build("box", policy=policy)
    assert fused_update(model, StepHooks(model.policy.optimizer)) is None


def test_policies_of_another_class_and_state_dependent_noise_are_left_to_sb3() -> None:
    models = [
        PPO(Louder, make_vec_env(lambda: Nowhere("box"), 1), device="cpu"),
        PPO("MlpPolicy", make_vec_env(lambda: Nowhere("box"), 1), device="cpu", use_sde=True),
    ]
    assert all(fused_update(model, StepHooks(model.policy.optimizer)) is None for model in models)


# -- of protected models -----------------------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every fused update."""
    made: list[int] = []
    run = FusedUpdate.run

    def counted(self: FusedUpdate) -> None:
        made.append(len(made))
        run(self)

    monkeypatch.setattr(FusedUpdate, "run", counted)
    return made


@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_a_confined_model_updates_as_with_the_stock_update_and_twice_alike(kind: str, runs: list[int]) -> None:
    models = [finetuned(kind, opening="auto", fused=fused) for fused in ("auto", "off", "auto")]
    assert len(runs) == 2 and all(model.retention.opening.block is not None for model in models)
    assert same_policies(models[0], models[2])
    for name, value in models[1].policy.state_dict().items():
        torch.testing.assert_close(models[0].policy.state_dict()[name], value, rtol=1e-3, atol=3e-5)


def finetuned(kind: str = "discrete", steps: int = 128, **options: Any) -> NullSpacePPO:
    agent, buffer = trained(kind)
    envs = make_vec_env(NEW[kind], 2, seed=1)
    settings = {**SMALL, "opening": "off", **options}
    return NullSpacePPO.from_pretrained(agent, envs, retain=buffer, seed=1, **settings).learn(steps)


@pytest.mark.parametrize("values", ["standardised", "raw"])
@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_a_protected_model_updates_and_logs_as_with_the_stock_update(kind: str, values: str, runs: list[int]) -> None:
    model = finetuned(kind, values=values)
    stock = finetuned(kind, values=values, fused="off")
    assert len(runs) == 1
    for name, value in stock.policy.state_dict().items():
        # six steps of Adam in single precision: 1e-7 of a gradient may be lr / eps = 300 times as much of a step
        torch.testing.assert_close(model.policy.state_dict()[name], value, rtol=1e-3, atol=3e-5)
    logged = {name: value for name, value in stock.logger.name_to_value.items() if name.startswith("train/")}
    assert {name: model.logger.name_to_value[name] for name in logged} == pytest.approx(logged, rel=1e-3, abs=1e-4)


def test_protect_fuses_the_update_of_a_stock_model(runs: list[int]) -> None:
    agent, buffer = trained()
    model = protect(agent, retain=buffer, kl_budget=0.01)
    model.learn(256)
    assert len(runs) == 2
    assert model.retention_report().held == 2


@pytest.mark.parametrize(
    "options", [{"kl_budget": math.inf}, {"method": "finetune"}, {"method": "kl_penalty", "penalty": 1.0}]
)
def test_baselines_and_infinite_budgets_are_updated_by_sb3(options: dict[str, Any], runs: list[int]) -> None:
    finetuned(**options)
    assert not runs


def test_other_algorithms_and_updates_of_ones_own_are_left_alone(runs: list[int]) -> None:
    agent, buffer = trained()
    for algorithm in (A2C, Sequel):
        model = algorithm("MlpPolicy", agent.get_env(), seed=0, device="cpu", n_steps=64)
        model.policy.load_state_dict(agent.policy.state_dict())
        protect(model, retain=buffer, kl_budget=0.01).learn(128)
    assert not runs


def test_without_a_buffer_nothing_is_fused(runs: list[int]) -> None:
    models = [
        cls("MlpPolicy", make_vec_env(NEW["discrete"], 2, seed=3), seed=3, device="cpu", **SMALL).learn(128)
        for cls in (PPO, NullSpacePPO)
    ]
    assert same_policies(*models) and not runs


def test_unknown_spaces_have_no_part_here() -> None:
    """What SB3's flattening makes of a space is what the chains are given."""
    for space in (spaces.Discrete(5), spaces.MultiBinary(4), spaces.Box(0, 255, (2, 3), np.uint8)):
        env = Nowhere("discrete")
        env.observation_space = space
        model = PPO("MlpPolicy", make_vec_env(lambda env=env: env, 1), device="cpu", n_steps=16, batch_size=8)
        observations = torch.as_tensor(np.stack([space.sample() for _ in range(6)]))
        update = FusedUpdate(model, fused_update(model, StepHooks(model.policy.optimizer))._chains, None)
        actor, critic = update._features(observations)
        assert torch.equal(actor, model.policy.extract_features(observations)) and actor is critic
