"""Policies with parameters of no axis, and with experts that only some states go to, through every public door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from nsrl import NullSpacePPO, NullSpaceTRPO, RetentionBuffer, protect
from nsrl.projection.jacobians.matrix_free import GraphPasses, LayerPasses
from nsrl.projection.roots import DenseRoot
from nsrl.projection.solvers.kfac import KroneckerPreconditioner
from nsrl.rl.policies.actor_critic import actor_head, policy_outputs
from nsrl.rl.retention.constraint import RetentionConstraint
from tests.rl.builders import NEW, OLD, SMALL
from tests.rl.policy_builders import build_policy, dense_jacobian, draw_observations


class ReZero(BaseFeaturesExtractor):
    """A residual block behind a gain of one number (Bachlechner et al. 2020)."""

    def __init__(self, observation_space: gym.spaces.Box):
        super().__init__(observation_space, 6)
        self.stem, self.block = nn.Linear(observation_space.shape[0], 6), nn.Linear(6, 6)
        self.gain = nn.Parameter(torch.tensor(0.1))

    def forward(self, observations: Tensor) -> Tensor:
        hidden = self.stem(observations)
        return hidden + self.gain * torch.tanh(self.block(hidden))


class Experts(BaseFeaturesExtractor):
    """Every state goes to the expert whose gate is largest."""

    def __init__(self, observation_space: gym.spaces.Box):
        super().__init__(observation_space, 6)
        self.gate = nn.Linear(observation_space.shape[0], 3)
        self.experts = nn.ModuleList(nn.Linear(observation_space.shape[0], 6) for _ in range(3))

    def forward(self, observations: Tensor) -> Tensor:
        weights, chosen = self.gate(observations).softmax(-1).max(-1)
        out = torch.zeros(len(observations), 6)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().flatten()
            if len(rows):
                out = out.index_add(0, rows, weights[rows, None] * expert(observations[rows]))
        return torch.tanh(out)


class Tempered(nn.Module):
    """Logits over a temperature of one number."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.temperature = layer, nn.Parameter(torch.tensor(1.5))

    def forward(self, latent: Tensor) -> Tensor:
        return self.layer(latent) / self.temperature


class TemperedPolicy(ActorCriticPolicy):
    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_net = Tempered(self.action_net)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)


POLICIES: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "temperature": (TemperedPolicy, {}, ("action_net.temperature",)),
    "rezero": ("MlpPolicy", {"features_extractor_class": ReZero}, ("features_extractor.gain",)),
    "experts": (
        "MlpPolicy",
        {"features_extractor_class": Experts},
        tuple(f"features_extractor.experts.{index}.weight" for index in range(3)),
    ),
}
every_policy = pytest.mark.parametrize("name", POLICIES)


def build(name: str, algorithm: Any = PPO, kind: str = "discrete", **options: Any) -> tuple[Any, RetentionBuffer]:
    policy, keywords, _ = POLICIES[name]
    given = {**SMALL, **options} if algorithm is PPO else options
    envs = make_vec_env(OLD[kind], 2, seed=0)
    model = algorithm(policy, envs, seed=0, device="cpu", policy_kwargs={"net_arch": [8], **keywords}, **given)
    if name == "experts":  # nobody wants the third one; SB3 initialises what the constructor made
        with torch.no_grad():
            model.policy.features_extractor.gate.bias[2] = -1e3
    return model, RetentionBuffer.collect(model, OLD[kind], n_states=120, n_envs=2)


@every_policy
def test_the_linearisation_is_that_of_plain_backward_passes(name: str) -> None:
    model, buffer = build(name)
    constraint = RetentionConstraint(model.policy, buffer, tempering=0.0)
    assert set(POLICIES[name][2]) <= set(constraint.names)
    assert not any("value" in parameter for parameter in constraint.names)
    for states in (constraint.train[:7], constraint.train[7:30], constraint.train):
        found = constraint.linearise(states)
        plain = dense_jacobian(
            model.policy,
            lambda states=states: policy_outputs(model.policy, constraint.inputs[states]),
            constraint.parameters.parameters,
        ).double()
        seeds = constraint.metric.seeds(policy_outputs(model.policy, constraint.inputs[states]).detach()).double()
        expected = torch.einsum("nro,nop->nrp", seeds, plain.view(len(states), -1, plain.shape[1])).flatten(0, 1)
        expected = expected / len(states) ** 0.5
        error = float((found.jacobian.dense().double() - expected).norm())
        assert error <= 1e-5 * float(expected.norm())  # float32 factors: eps times the depth of the network
        quadratic = constraint.quadratic(states)
        vector = torch.randn(expected.shape[1], generator=torch.Generator().manual_seed(0))
        near = {"rtol": 1e-4, "atol": 1e-5 * float(expected.norm())}
        torch.testing.assert_close(quadratic.jacobian.matvec(vector).double(), expected @ vector.double(), **near)
        rows = torch.randn(len(expected), generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(quadratic.jacobian.rmatvec(rows).double(), expected.T @ rows.double(), **near)


@pytest.mark.parametrize(("algorithm", "budget"), [(PPO, 0.0), (PPO, 0.01), (A2C, 0.0)])
@every_policy
def test_in_place(name: str, algorithm: Any, budget: float) -> None:
    model, buffer = build(name, algorithm)
    model.set_env(make_vec_env(NEW["discrete"], 2, seed=1))
    protect(model, retain=buffer, kl_budget=budget)
    before = {key: value.clone() for key, value in model.policy.state_dict().items()}
    model.learn(2 * model.n_steps * 2)
    report = model.retention_report()
    assert report.kl_mean <= max(budget, model.retention.config.tolerance) and report.rank > 0
    assert any(not torch.equal(before[key], value) for key, value in model.policy.state_dict().items())


@pytest.mark.parametrize(("kind", "budget"), [("discrete", 0.0), ("box", 0.01)])
@pytest.mark.parametrize("engine", [NullSpacePPO, NullSpaceTRPO])
@every_policy
def test_from_pretrained(name: str, engine: Any, kind: str, budget: float, tmp_path: Path) -> None:
    agent, buffer = build(name, kind=kind)
    model = engine.from_pretrained(
        agent, env=make_vec_env(NEW[kind], 2, seed=1), retain=buffer, kl_budget=budget, n_steps=64, batch_size=64
    )
    model.learn(256)
    report = model.retention_report()
    assert report.kl_mean <= max(budget, model.retention.config.tolerance)
    for parameter in model.policy.parameters():
        assert torch.isfinite(parameter).all()
    model.export(tmp_path / "agent")
    loaded = PPO.load(tmp_path / "agent") if engine is NullSpacePPO else None
    if loaded is not None:
        observations = torch.tensor(buffer.observations[:5])
        torch.testing.assert_close(
            policy_outputs(loaded.policy, observations), policy_outputs(model.policy, observations), rtol=0, atol=0
        )


def test_an_expert_that_takes_over_later_was_protected_before() -> None:
    """No state goes to it at first; its columns are zero until one does."""
    model, buffer = build("experts")
    constraint = RetentionConstraint(model.policy, buffer)
    assert not constraint.linearise(constraint.train).jacobian.dense()[:, _columns(constraint, "experts.2")].any()
    with torch.no_grad():
        model.policy.features_extractor.gate.bias[2] = 1e3
    assert constraint.linearise(constraint.train).jacobian.dense()[:, _columns(constraint, "experts.2")].any()
    _, gradient = constraint.gradient(constraint.train)
    assert gradient[_columns(constraint, "experts.2")].any()


def _columns(constraint: RetentionConstraint, part: str) -> Tensor:
    sizes = zip(constraint.names, constraint.parameters.sizes, strict=True)
    return torch.cat([torch.full((size,), part in name) for name, size in sizes])


# -- products with the Jacobian ---------------------------------------------------------------------------------------


def hooked(policy: ActorCriticPolicy) -> None:
    policy.mlp_extractor.policy_net.register_forward_hook(lambda net, args, out: 2.0 * out)


def replaced_forward(policy: ActorCriticPolicy) -> None:
    plain = policy.mlp_extractor.policy_net[0].forward
    policy.mlp_extractor.policy_net[0].forward = lambda x: 2.0 * plain(x)


def replaced_method(policy: ActorCriticPolicy) -> None:
    plain = policy.mlp_extractor.forward_actor
    policy.mlp_extractor.forward_actor = lambda x: 2.0 * plain(x)


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True) + super().forward(x)


def replaced_network(policy: ActorCriticPolicy) -> None:
    policy.mlp_extractor.policy_net = Residual(*policy.mlp_extractor.policy_net)


@pytest.mark.parametrize("change", [None, hooked, replaced_forward, replaced_method, replaced_network])
def test_a_network_that_is_no_chain_any_more(change: Any) -> None:
    """The products' own chain rule knows layers one after the other and nothing around them."""
    policy = build_policy()
    if change is not None:
        change(policy)
    observations = draw_observations(policy, 6)
    parameters = [*policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters()]
    passes = actor_head(policy, observations, parameters).passes()
    assert isinstance(passes, LayerPasses if change is None else GraphPasses)
    expected = dense_jacobian(policy, lambda: policy_outputs(policy, observations), parameters)
    vector = torch.randn(expected.shape[1], dtype=torch.float64)
    torch.testing.assert_close(passes.outputs, policy_outputs(policy, observations).detach())
    torch.testing.assert_close(passes.push(vector).flatten(), expected @ vector)
    rows = torch.randn(passes.outputs.shape, dtype=torch.float64)
    torch.testing.assert_close(passes.pull(rows), expected.T @ rows.flatten())


def test_products_with_parameters_that_the_batch_does_not_reach() -> None:
    used, unused = nn.Linear(4, 2).double(), nn.Linear(4, 2).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    parameters = [*unused.parameters(), *used.parameters()]
    passes = GraphPasses(used(x), parameters)
    expected = dense_jacobian(used, lambda: used(x), parameters)
    vector = torch.randn(20, dtype=torch.float64)
    torch.testing.assert_close(passes.push(vector).flatten(), expected @ vector)
    torch.testing.assert_close(passes.pull(torch.ones(5, 2, dtype=torch.float64)), expected.sum(0))


def test_kronecker_preconditioner_leaves_a_number_as_it_is() -> None:
    policy = build_policy()
    layers = [*policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters()]
    passes = actor_head(policy, draw_observations(policy, 6), layers).passes()
    factors = passes.factors(DenseRoot(torch.eye(3).double().expand(6, 3, 3)))
    shifted = [factor.shifted(lambda column: column + 1) for factor in factors]  # a 0-d parameter comes first
    vector = torch.randn(1 + sum(p.numel() for p in layers), dtype=torch.float64)
    divided = KroneckerPreconditioner(shifted, 0.1)(vector)
    assert divided[0] == vector[0]
    torch.testing.assert_close(divided[1:], KroneckerPreconditioner(factors, 0.1)(vector[1:]))
