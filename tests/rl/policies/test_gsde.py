"""gSDE: at a state, its noise is a Gaussian of known standard deviation, which is retained with the mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_vec_env
from torch import nn

from nsrl import NullSpacePPO, NullSpaceTRPO, RetentionBuffer, protect
from nsrl.errors import NsrlError
from nsrl.rl import agents
from nsrl.rl.agents.agent import load
from nsrl.rl.algorithms.surrogate import Surrogate
from nsrl.rl.playing.evaluation import evaluate
from nsrl.rl.policies.actor_critic import policy_outputs
from nsrl.rl.policies.distributions import distribution_of
from tests.rl.builders import NEW, OLD, SMALL
from tests.rl.oracles import independent_kl, same_policies, within
from tests.tolerances import assert_near, relative

BUDGET = 1e-3
STOCK = {NullSpacePPO: PPO, NullSpaceTRPO: TRPO}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "one spread a feature": {"full_std": False, "activation_fn": nn.ReLU},
    "expln": {"use_expln": True, "log_std_init": 0.2},
    "tiny": {"log_std_init": -8.0},
}
#: Public agents may lie beside the checkout.
PUBLIC = Path(__file__).resolve().parents[4] / "shared" / "agents"


def gsde(algorithm: Any = PPO, steps: int = 256, **policy: Any) -> Any:
    settings = SMALL if algorithm is PPO else {"n_steps": 64}
    envs = make_vec_env(OLD["box"], 2, seed=0)
    model = algorithm(
        "MlpPolicy", envs, use_sde=True, sde_sample_freq=8, policy_kwargs=policy, seed=0, device="cpu", **settings
    )
    return model.learn(steps)


def draw(policy: Any, count: int) -> torch.Tensor:
    size = policy.observation_space.shape[0]
    return torch.randn(count, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_are_mean_and_log_standard_deviation_of_sb3s_distribution(variant: str) -> None:
    policy = gsde(steps=128, **VARIANTS[variant]).policy
    observations = draw(policy, 50)
    with torch.no_grad():
        outputs = policy_outputs(policy, observations)
        stock = policy.get_distribution(observations).distribution
        mean, log_std = outputs.chunk(2, 1)
        assert torch.equal(mean, stock.mean)
        assert_near(log_std.exp(), stock.stddev, terms=64)
        actions = stock.sample()
        found = distribution_of(policy).log_prob(policy, outputs, actions)
        # a standardised action is known to the rounding of the mean over the standard deviation
        slack = relative(torch.float32, 64) * (30.0 + float((mean.abs() / stock.stddev).max()) * 10.0)
        assert float((found - stock.log_prob(actions).sum(1)).abs().max()) <= slack


def test_noise_is_drawn_from_that_gaussian() -> None:
    policy = gsde(steps=128).policy
    outputs = torch.tensor([[0.3, -1.0]]).repeat(20_000, 1)
    drawn = distribution_of(policy).sample(policy, outputs, torch.Generator().manual_seed(0))
    # of n numbers, the mean is off by s / sqrt(n) and the deviation by s / sqrt(2 n)
    spread = np.exp(-1.0)
    assert drawn.mean() == pytest.approx(0.3, abs=5 * spread / 20_000**0.5)
    assert drawn.std() == pytest.approx(spread, abs=5 * spread / 40_000**0.5)
    # and SB3's own noise, drawn anew many times, has the spread that the outputs say
    observations = draw(policy, 1)
    with torch.no_grad():
        told = policy_outputs(policy, observations).chunk(2, 1)[1].exp()
        policy.reset_noise(4000)
        noise = policy.get_distribution(observations.repeat(4000, 1))
        sampled = noise.get_actions() - noise.distribution.mean
    assert float(sampled.std()) == pytest.approx(float(told), rel=5 / 8000**0.5)


def test_the_surrogates_gradient_reaches_the_hidden_layer_through_the_spread() -> None:
    """SB3 stops it; the KL depends on it, so that the step has to know."""
    model = gsde(TRPO, steps=128)
    samples = next(iter(model.rollout_buffer.get(None)))
    surrogate = Surrogate(model.policy, samples)
    names = {
        name for name, p in model.policy.named_parameters() if any(p is q for q in surrogate.parameters.parameters)
    }
    assert "log_std" in names and not any("value" in name for name in names)
    _, gradient = surrogate.gradient()
    outputs = policy_outputs(model.policy, samples.observations)
    mean, log_std = outputs.chunk(2, 1)
    new = torch.distributions.Normal(mean, log_std.exp()).log_prob(samples.actions).sum(1)
    advantages = (samples.advantages - samples.advantages.mean()) / (samples.advantages.std() + 1e-8)
    objective = -(advantages * torch.exp(new - samples.old_log_prob)).mean()
    expected = torch.autograd.grad(objective, list(surrogate.parameters.parameters))
    expected = torch.cat([piece.flatten() for piece in expected])
    assert_near(gradient, expected, terms=128 * 64)


@pytest.mark.parametrize("engine", STOCK)
@pytest.mark.parametrize("source", [PPO, A2C, TRPO])
def test_from_collecting_to_exporting(engine: type, source: Any, tmp_path: Path) -> None:
    agent = gsde(source)
    agent.save(tmp_path / "agent.zip")
    buffer = RetentionBuffer.collect(tmp_path / "agent.zip", OLD["box"], n_states=120, n_envs=2)
    kept = RetentionBuffer.load(buffer.save(tmp_path / "buffer.npz"))
    assert kept.digest() == buffer.digest() and kept.family == "state_dependent" and kept.outputs.shape == (120, 2)
    settings = SMALL if engine is NullSpacePPO else {"n_steps": 64, "target_kl": 0.05}
    envs = make_vec_env(NEW["box"], 2, seed=1)
    model = engine.from_pretrained(tmp_path / "agent.zip", envs, retain=kept, kl_budget=BUDGET, seed=1, **settings)
    assert model.use_sde and model.sde_sample_freq == 8
    assert "log_std" in model.retention.constraint.names
    kls, train = [], model.train

    def watched() -> None:
        train()
        kls.append(independent_kl(model, buffer))

    model.train = watched
    model.learn(384)
    del model.train
    assert len(kls) >= 2 and max(kls) <= within(BUDGET, buffer)
    assert not same_policies(model, agent) and not torch.equal(model.policy.log_std, agent.policy.log_std)
    assert model.retention_report().kl_mean <= BUDGET
    stock = STOCK[engine].load(model.export(tmp_path / "out"), device="cpu")
    assert type(stock) is STOCK[engine] and same_acts(stock, model, np.asarray(buffer.observations))
    again = load(tmp_path / "out.zip").model
    assert torch.equal(policy_outputs(again.policy, buffer.inputs()), policy_outputs(model.policy, buffer.inputs()))


def same_acts(one: Any, other: Any, observations: np.ndarray) -> bool:
    """With noise and without."""
    found = []
    for model in (one, other):
        torch.manual_seed(0)
        model.policy.reset_noise(len(observations))
        found.append([model.predict(observations, deterministic=kind)[0] for kind in (True, False)])
    return all(np.array_equal(first, second) for first, second in zip(*found, strict=True))


@pytest.mark.parametrize("algorithm", [PPO, A2C, TRPO])
@pytest.mark.parametrize("budget", [BUDGET, 0.0])
def test_in_place(algorithm: Any, budget: float) -> None:
    model = gsde(algorithm)
    buffer = RetentionBuffer.collect(model, OLD["box"], n_states=100, n_envs=2)
    model.set_env(make_vec_env(NEW["box"], 2, seed=0))
    protect(model, retain=buffer, kl_budget=budget)
    before = model.policy.state_dict()["action_net.weight"].clone()
    model.learn(3 * model.n_steps * 2)
    assert independent_kl(model, buffer) <= within(budget, buffer)
    assert not torch.equal(model.policy.state_dict()["action_net.weight"], before)


def test_its_spread_is_protected_with_the_mean_whatever_is_to_be_preserved() -> None:
    model = gsde(steps=128)
    buffer = RetentionBuffer.collect(model, OLD["box"], n_states=60, n_envs=2)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    with pytest.raises(NsrlError, match="log_std_init"):
        protect(model, buffer, preserve="mode", log_std_init=1.0)
    assert type(model) is PPO and all(torch.equal(v, before[k]) for k, v in model.policy.state_dict().items())
    protect(model, buffer, preserve="mode", kl_budget=BUDGET)
    model.learn(256)
    assert independent_kl(model, buffer) <= within(BUDGET, buffer)


@pytest.mark.parametrize("room", [True, False], ids=["units", "none to spare"])
def test_a_narrow_one_is_opened_on_the_new_task_inside_the_budget(room: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not room:
        monkeypatch.setattr("nsrl.rl.opening.units.KEPT", ())
    agent = gsde(log_std_init=-6.0)
    buffer = RetentionBuffer.collect(agent, OLD["box"], n_states=120, n_envs=2)
    model = NullSpacePPO.from_pretrained(
        agent, make_vec_env(NEW["box"], 2, seed=1), retain=buffer, kl_budget=0.01, seed=1, **SMALL
    )
    model._setup_learn(2000, None)
    record = model.retention.opening.run(model)
    assert (record.units > 0) is room and (record.steps > 0) is not room
    assert record.after > 2.0 * record.before and record.kl <= 0.01
    assert independent_kl(model, buffer) <= within(0.01, buffer)


# -- public agents -----------------------------------------------------------------------------------------------------

AGENTS = {
    "ppo/Pendulum-v1_1": "Pendulum-v1",
    "a2c/Pendulum-v1_1": "Pendulum-v1",
    "ppo/MountainCarContinuous-v0_1": "MountainCarContinuous-v0",
}


@pytest.mark.skipif(not PUBLIC.is_dir(), reason="no public agents beside the checkout")
@pytest.mark.parametrize("name", AGENTS)
def test_public_agents(name: str, tmp_path: Path) -> None:
    if not (PUBLIC / name).is_dir():
        pytest.skip("this agent is not there")
    path, task = PUBLIC / name / f"{AGENTS[name]}.zip", AGENTS[name]
    if task not in gym.registry:
        pytest.skip(f"no {task}")
    agent = agents.load(path)
    assert agent.model.use_sde
    buffer = RetentionBuffer.collect(agent, task, n_states=128, n_envs=2)
    assert buffer.family == "state_dependent"
    model = NullSpacePPO.from_pretrained(
        path, task, retain=buffer, n_envs=2, seed=0, n_steps=64, batch_size=64, n_epochs=2, kl_budget=0.01
    )
    updates = 2
    model.learn(updates * 64 * 2)
    assert model.retention.updates >= 2 and independent_kl(model, buffer) <= within(0.01, buffer)
    stock = PPO.load(model.export(tmp_path / "out"), device="cpu")
    inputs = buffer.inputs()
    normal = np.asarray(inputs)
    assert same_acts(stock, model, normal)
    assert torch.equal(policy_outputs(stock.policy, inputs), policy_outputs(model.policy, inputs))
    assert np.isfinite(evaluate(tmp_path / "out.zip", task, episodes=1).mean)
