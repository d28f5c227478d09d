"""Every kind of policy that SB3 builds: the budget holds, the export acts alike, the Jacobian is jacrev's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from nsrl import NullSpacePPO, RetentionBuffer, protect
from nsrl.errors import NsrlError
from nsrl.projection import jacobian
from nsrl.rl import agents
from nsrl.rl.playing.evaluation import evaluate
from nsrl.rl.policies.actor_critic import policy_outputs
from nsrl.rl.retention.constraint import RetentionConstraint
from tests.rl.oracles import RULED_OUT, WIDTHS, independent_kl, state_kls, within
from tests.tolerances import assert_near, kl_excess

FLAT = spaces.Box(-1.0, 1.0, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)
MIXED = spaces.Dict([("v", FLAT), ("d", spaces.Discrete(3))])
SEEN = spaces.Dict([("img", IMAGE), ("v", FLAT)])
TORQUE = spaces.Box(-1.0, 1.0, (2,), np.float32)
SMALL_CNN = {"features_extractor_kwargs": {"features_dim": 8}}
SMALL_MIXED_CNN = {"features_extractor_kwargs": {"cnn_output_dim": 8}}
BUDGET = 1e-3


class Arbitrary(gym.Env):
    """Any spaces; observations and rewards drawn at random, so that updates are violent; masks of every kind."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space):
        self.observation_space, self.action_space = observation_space, action_space
        sizes = action_space.nvec if isinstance(action_space, spaces.MultiDiscrete) else [getattr(action_space, "n", 0)]
        self._sizes = [int(size) for size in np.ravel(sizes)]

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        self._steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self._steps += 1
        reward = float(10.0 * self.np_random.standard_normal())
        return self.observation_space.sample(), reward, self._steps % 7 == 0, False, {}

    def action_masks(self) -> np.ndarray:
        masks = self.np_random.random(sum(self._sizes)) < 0.5
        masks[np.cumsum([0, *self._sizes[:-1]])] = True  # at least one valid action a head, not always the first
        return masks


@dataclass(frozen=True)
class Case:
    algorithm: type
    policy: str
    observations: spaces.Space
    actions: spaces.Space
    network: dict[str, Any] = field(default_factory=dict)
    preserve: str = "distribution"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def env(self) -> Callable[[], Arbitrary]:
        return partial(Arbitrary, self.observations, self.actions)

    def build(self, seed: int = 0) -> Any:
        """An agent that has learnt for a moment."""
        torch.manual_seed(seed)
        options = {"n_steps": 16, "learning_rate": 3e-3, **self.options}
        if self.algorithm is not A2C:
            options |= {"batch_size": 16, "n_epochs": 2}
        # a fresh copy, since SB3 puts its own entries into the dictionary
        kwargs = {"net_arch": [6], **self.network}
        return self.algorithm(
            self.policy, DummyVecEnv([self.env] * 2), seed=seed, device="cpu", policy_kwargs=kwargs, **options
        ).learn(32)


TANH = {"net_arch": {"pi": [5], "vf": [7, 3]}, "activation_fn": nn.Tanh}
RELU = {"net_arch": [6, 4], "activation_fn": nn.ReLU}
SILU = {"net_arch": {"pi": [4, 3, 5], "vf": []}, "activation_fn": nn.SiLU}
SEPARATE = {"share_features_extractor": False}
GSDE = {"use_sde": True, "sde_sample_freq": 4}
DISCRETE, MULTI, BINARY = spaces.Discrete(3), spaces.MultiDiscrete([3, 2]), spaces.MultiBinary(3)

CASES = {
    "flat discrete": Case(PPO, "MlpPolicy", FLAT, DISCRETE, TANH),
    "flat box": Case(PPO, "MlpPolicy", FLAT, TORQUE, SILU),
    "flat box, mode": Case(PPO, "MlpPolicy", FLAT, TORQUE, RELU, "mode"),
    "gSDE": Case(PPO, "MlpPolicy", FLAT, TORQUE, TANH, options=GSDE),
    "gSDE, one spread a feature": Case(
        PPO, "MlpPolicy", FLAT, TORQUE, RELU | {"full_std": False, "use_expln": True}, options=GSDE
    ),
    "A2C gSDE image, shared": Case(A2C, "CnnPolicy", IMAGE, TORQUE, SMALL_CNN | TANH, options=GSDE),
    "flat multi-discrete, no hidden layer": Case(PPO, "MlpPolicy", FLAT, MULTI, {"net_arch": []}),
    "flat binary": Case(PPO, "MlpPolicy", FLAT, BINARY, RELU),
    "index discrete": Case(PPO, "MlpPolicy", spaces.Discrete(5), DISCRETE, SILU | SEPARATE),
    "A2C flat box": Case(A2C, "MlpPolicy", FLAT, TORQUE, TANH),
    "A2C flat box, mode": Case(A2C, "MlpPolicy", FLAT, TORQUE, SILU, "mode"),
    "A2C flat discrete, mode": Case(A2C, "MlpPolicy", FLAT, DISCRETE, RELU, "mode"),
    "image discrete, shared": Case(PPO, "CnnPolicy", IMAGE, DISCRETE, SMALL_CNN | {"net_arch": []}),
    "image box, separate": Case(PPO, "CnnPolicy", IMAGE, TORQUE, SMALL_CNN | SILU | SEPARATE),
    "A2C image binary, shared": Case(A2C, "CnnPolicy", IMAGE, BINARY, SMALL_CNN | TANH),
    "dict multi-discrete": Case(PPO, "MultiInputPolicy", MIXED, MULTI, TANH),
    "dict box, separate, mode": Case(PPO, "MultiInputPolicy", MIXED, TORQUE, RELU | SEPARATE, "mode"),
    "dict with image, shared": Case(PPO, "MultiInputPolicy", SEEN, DISCRETE, SMALL_MIXED_CNN | SILU),
    "masked flat discrete": Case(MaskablePPO, "MlpPolicy", FLAT, spaces.Discrete(5), TANH),
    "masked dict multi-discrete": Case(MaskablePPO, "MultiInputPolicy", MIXED, MULTI, RELU | SEPARATE),
    "masked image discrete, shared": Case(MaskablePPO, "CnnPolicy", IMAGE, DISCRETE, SMALL_CNN | {"net_arch": []}),
}
SHARED = [
    "image discrete, shared",
    "A2C image binary, shared",
    "A2C gSDE image, shared",
    "dict with image, shared",
    "masked image discrete, shared",
]


def collected(case: Case, model: Any, states: int = 40) -> RetentionBuffer:
    return RetentionBuffer.collect(model, DummyVecEnv([case.env] * 2), n_states=states)


class Actor(nn.Module):
    """SB3's actor modules, one after the other; unlike in the policy, each of them has one name only.

    torch's functional_call mishandles modules under several names, as SB3's shared extractors are.
    """

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.features, self.body, self.head = (
            policy.pi_features_extractor,
            policy.mlp_extractor.policy_net,
            policy.action_net,
        )
        self._prepare = partial(
            preprocess_obs, observation_space=policy.observation_space, normalize_images=policy.normalize_images
        )

        self._noise = policy.action_dist
        if getattr(policy, "use_sde", False):  # maskable policies have none
            self.log_std = policy.log_std

    def forward(self, inputs: Any) -> Tensor:
        latent = self.body(self.features(self._prepare(inputs)))
        if not hasattr(self, "log_std"):
            return self.head(latent)
        # SB3's formula, with the gradient through the features that it stops
        variance = (latent**2) @ self._noise.get_std(self.log_std) ** 2 + self._noise.epsilon
        return torch.cat([self.head(latent), variance.sqrt().log()], 1)


@pytest.mark.parametrize("name", CASES)
def test_the_budget_holds_after_every_update_and_the_export_acts_alike(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.build()
    buffer = collected(case, model)
    model.set_env(DummyVecEnv([case.env] * 2))
    before = {key: value.clone() for key, value in model.policy.state_dict().items()}
    protect(model, retain=buffer, kl_budget=BUDGET, preserve=case.preserve)
    kls = []
    train = model.train

    def watched() -> None:
        train()
        kls.append(independent_kl(model, buffer, case.preserve))

    model.train = watched
    model.learn(4 * 32)
    del model.train
    assert len(kls) == 4 and max(kls) <= within(BUDGET, buffer)
    after = model.policy.state_dict()
    moved = [key for key, value in before.items() if not torch.equal(value, after[key])]
    assert "action_net.weight" in moved, "the budget leaves room to learn"
    if name in SHARED:
        assert any(key.startswith("features_extractor.") for key in moved)
    check_export(case, model, buffer, tmp_path)


def check_export(case: Case, model: Any, buffer: RetentionBuffer, folder: Path) -> None:
    stock = case.algorithm.load(agents.export(model, folder / "agent"), device="cpu")
    assert type(stock) is case.algorithm
    inputs = buffer.inputs()
    assert torch.equal(policy_outputs(stock.policy, inputs), policy_outputs(model.policy, inputs))
    assert torch.equal(stock.policy.predict_values(inputs), model.policy.predict_values(inputs))
    observations = (
        {key: np.array(value) for key, value in buffer.observations.items()}
        if isinstance(buffer.observations, dict)
        else np.array(buffer.observations)
    )
    masks = {"action_masks": buffer.outputs > -1e7} if case.algorithm is MaskablePPO else {}
    for deterministic in (True, False):
        actions = []
        for played in (stock, model):
            torch.manual_seed(0)
            if getattr(played, "use_sde", False):
                played.policy.reset_noise()
            actions.append(played.predict(observations, deterministic=deterministic, **masks)[0])
        assert np.array_equal(*actions)


@pytest.mark.parametrize("name", CASES)
def test_the_jacobian_of_the_constraint_is_that_of_jacrev(name: str) -> None:
    case = CASES[name]
    model = case.build()
    buffer = collected(case, model)
    policy = model.policy
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    constraint = RetentionConstraint(policy, buffer, case.preserve, tempering=0.0)
    states = constraint.train[:4]
    inputs = buffer.inputs(states.numpy())
    named = dict(policy.named_parameters())
    network = [key for key in constraint.names if key != "log_std" or getattr(policy, "use_sde", False)]
    actor = Actor(policy)
    rows = jacrev(lambda values: functional_call(actor, values, (inputs,)))(dict(actor.named_parameters()))
    by_parameter = {parameter: rows[key].flatten(2) for key, parameter in actor.named_parameters()}
    dense = torch.cat([by_parameter[named[key]] for key in network], 2).detach()
    raw = jacobian(policy, inputs, forward=policy_outputs, parameters=network)
    torch.testing.assert_close(raw.dense(), dense.flatten(0, 1), rtol=1e-4, atol=1e-5)

    # The whitened rows: J^T J is the mean of (dz/dtheta)^T (Hessian of the KL at the current outputs) dz/dtheta.
    outputs = actor(inputs).detach().double()
    reference = torch.tensor(np.asarray(buffer.outputs))[states]
    here = torch.where(reference > RULED_OUT, outputs, torch.full_like(outputs, -1e8))

    def summed(values: Tensor) -> Tensor:
        return state_kls(policy, buffer, case.preserve, values, here).sum()

    hessian = torch.autograd.functional.hessian(summed, outputs).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    linearised = constraint.linearise(states)
    ours = linearised.jacobian.dense().double()
    directions = torch.randn(ours.shape[1], 3, generator=generator, dtype=torch.float64)
    through = directions
    if constraint.protects_log_std:
        start = sum(constraint.parameters.sizes[: constraint.names.index("log_std")])
        spread = slice(start, start + policy.log_std.numel())
        through = torch.cat([directions[: spread.start], directions[spread.stop :]])
    moved = dense.double() @ through
    product = torch.einsum("nop,noq,nqd->pd", dense.double(), hessian, moved) / len(states)
    if constraint.protects_log_std:
        product = torch.cat([product[: spread.start], 2.0 * directions[spread], product[spread.start :]])
    torch.testing.assert_close(ours.T @ (ours @ directions), product, rtol=1e-3, atol=1e-4 * float(product.abs().max()))

    # The residual: J^T rho is the gradient of the measured KL.
    kl = state_kls(policy, buffer, case.preserve, actor(inputs), reference).mean()
    grads = torch.autograd.grad(kl, [named[key] for key in network])
    pull = linearised.jacobian.rmatvec(linearised.residual)
    if constraint.protects_log_std:
        pull = torch.cat([pull[: spread.start], pull[spread.stop :]])
    slope = torch.cat([grad.flatten() for grad in grads])
    torch.testing.assert_close(pull, slope, rtol=1e-3, atol=1e-4 * float(slope.abs().max()))

    # Passes through the network make the same products.
    model = constraint.quadratic(states)
    slack = kl_excess(linearised.divergence, outputs.float(), terms=WIDTHS)
    assert model.divergence == pytest.approx(linearised.divergence, rel=0, abs=slack)
    # of float32 outputs, through exponentials
    assert_near(model.residual, linearised.residual, dtype=torch.float32, terms=WIDTHS)
    scale = float(ours.abs().max())
    vectors, rows = directions[:, 0].float(), torch.randn(len(ours), generator=generator)
    torch.testing.assert_close(
        model.jacobian.matvec(vectors).double(), ours @ vectors.double(), rtol=1e-4, atol=1e-4 * scale
    )
    torch.testing.assert_close(
        model.jacobian.rmatvec(rows).double(), ours.T @ rows.double(), rtol=1e-4, atol=1e-4 * scale
    )


@pytest.mark.parametrize("name", CASES)
def test_actor_and_shared_features_are_protected_and_the_critic_is_not(name: str) -> None:
    case = CASES[name]
    model = case.build()
    names = RetentionConstraint(model.policy, collected(case, model, 10), case.preserve).names
    actor = ("mlp_extractor.policy_net.", "action_net.", "features_extractor.", "pi_features_extractor.")
    expected = {key for key, _ in model.policy.named_parameters() if key.startswith(actor)}
    if isinstance(case.actions, spaces.Box) and case.preserve == "distribution":
        expected.add("log_std")
    assert set(names) == expected


@pytest.mark.parametrize("name", SHARED)
def test_warming_the_critic_up_leaves_shared_features_alone(name: str) -> None:
    case = CASES[name]
    model = case.build()
    buffer = collected(case, model, 20)
    protect(model, retain=buffer, kl_budget=BUDGET, critic_warmup=2, opening="off")
    before = {key: value.clone() for key, value in model.policy.state_dict().items()}
    model.learn(2 * 32)
    after = model.policy.state_dict()
    assert torch.equal(after["action_net.weight"], before["action_net.weight"])
    assert all(torch.equal(after[key], before[key]) for key in before if "features_extractor" in key)
    assert not torch.equal(after["value_net.weight"], before["value_net.weight"])
    model.learn(32)
    assert not torch.equal(model.policy.state_dict()["action_net.weight"], before["action_net.weight"])


def test_warming_the_critic_up_freezes_a_spread_that_is_not_protected() -> None:
    case = CASES["flat box"]
    model = case.build()
    protect(model, retain=collected(case, model, 20), kl_budget=BUDGET, critic_warmup=2, preserve="mode")
    before = model.policy.log_std.detach().clone()
    model.learn(2 * 32)
    assert torch.equal(model.policy.log_std, before)
    model.learn(32)
    assert not torch.equal(model.policy.log_std, before)


@pytest.mark.parametrize("name", [*SHARED, "flat box", "index discrete", "image box, separate"])
def test_resetting_the_critic_leaves_the_actor_as_it_was(name: str) -> None:
    case = CASES[name]
    model = case.build()
    buffer = collected(case, model, 10)
    before = {key: value.clone() for key, value in model.policy.state_dict().items()}
    protect(model, retain=buffer, kl_budget=0.0, critic="reset")
    assert independent_kl(model, buffer) <= within(0.0, buffer, least=0.0)
    changed = {key for key, value in model.policy.state_dict().items() if not torch.equal(value, before[key])}
    critic = ("mlp_extractor.value_net.", "value_net.")
    if not case.network.get("share_features_extractor", True):
        critic += ("vf_features_extractor.",)
    assert changed == {key for key in before if key.startswith(critic)}


@pytest.mark.parametrize("name", ["image discrete, shared", "dict with image, shared"])
@pytest.mark.parametrize("budget", [0.0, math.inf])
def test_the_value_loss_moves_shared_features_in_the_null_space_only(name: str, budget: float) -> None:
    case = CASES[name]
    model = case.build()
    buffer = collected(case, model, 20)
    model.vf_coef, model.n_epochs, model.batch_size = 100.0, 1, 32  # one step, nearly all of it the critic's,
    model.lr_schedule = lambda _: 1e-4  # and so small that nothing has to be restored after it
    protect(model, retain=buffer, kl_budget=budget, gradient="plain", projection="euclidean")
    constraint = model.retention.constraint
    rows = constraint.linearise(constraint.train).jacobian.dense().double()
    before = constraint.parameters.read()
    model.learn(32)
    moved = (constraint.parameters.read() - before).double()
    share = float((rows @ moved).norm() / (torch.linalg.matrix_norm(rows, 2) * moved.norm()))
    assert moved.norm() > 1e-3 and model.retention.rollbacks == 0
    assert share < 1e-4 if budget == 0.0 else share > 1e-2


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("masked", "A2C"))])
def test_an_agent_s_zip_is_collected_from_protected_played_and_exported_under_its_own_algorithm(
    name: str, tmp_path: Path
) -> None:
    case = CASES[name]
    trained = case.build()
    trained.save(tmp_path / "agent.zip")
    agent = agents.load(tmp_path / "agent.zip", case.env())
    assert type(agent.model) is case.algorithm
    buffer = collected(case, tmp_path / "agent.zip")
    assert buffer.digest() == collected(case, trained).digest()
    model = agents.attach_env(agent, DummyVecEnv([case.env] * 3), seed=1)
    protect(model, retain=buffer, kl_budget=BUDGET, preserve=case.preserve)
    model.learn(2 * 3 * 16)
    assert model.retention.updates == 2
    assert 0.0 < independent_kl(model, buffer, case.preserve) <= within(BUDGET, buffer)
    check_export(case, model, buffer, tmp_path)
    played = [evaluate(source, DummyVecEnv([case.env] * 2), episodes=4) for source in (model, tmp_path / "agent.zip")]
    assert all(set(found.lengths) <= set(range(1, 8)) for found in played)


@pytest.mark.parametrize("name", ["image box, separate", "dict with image, shared", "flat box, mode"])
def test_null_space_ppo_takes_every_policy_over(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    agent = case.build()
    agent.save(tmp_path / "agent.zip")
    buffer = collected(case, agent)
    env = DummyVecEnv([case.env] * 2)
    model = NullSpacePPO.from_pretrained(tmp_path / "agent.zip", env, buffer, BUDGET, preserve=case.preserve)
    model.learn(64)
    assert independent_kl(model, buffer, case.preserve) <= within(BUDGET, buffer)
    stock = PPO.load(model.export(tmp_path / "out"), device="cpu")
    assert torch.equal(policy_outputs(stock.policy, buffer.inputs()), policy_outputs(model.policy, buffer.inputs()))


@pytest.mark.parametrize(
    ("algorithm", "policy", "options", "reason"),
    [
        (A2C, "MlpPolicy", {"use_sde": True, "policy_kwargs": {"squash_output": True}}, "tanh.*squash_output=False"),
        (RecurrentPPO, "MlpLstmPolicy", {}, "RecurrentActorCriticPolicy acts on its memory.*only PPO, A2C"),
    ],
)
def test_what_cannot_be_protected_is_refused_and_left_as_it_was(
    algorithm: type, policy: str, options: dict, reason: str
) -> None:
    env = partial(Arbitrary, FLAT, TORQUE)
    model = algorithm(policy, DummyVecEnv([env]), n_steps=8, device="cpu", **options)
    buffer = collected(CASES["flat box"], CASES["flat box"].build(), 10)
    for refused in (
        lambda: protect(model, retain=buffer),
        lambda: RetentionBuffer.collect(model, DummyVecEnv([env]), n_states=4),
        lambda: NullSpacePPO.from_pretrained(model, DummyVecEnv([env]), retain=buffer),
    ):
        with pytest.raises(NsrlError, match=reason) as caught:
            refused()
        assert "\n" not in str(caught.value)
    assert type(model) is algorithm


def test_squashed_gaussians_and_masked_coins_are_refused() -> None:
    case = CASES["flat box"]
    model = case.build()
    buffer = collected(case, model, 10)
    model.policy.action_dist = SquashedDiagGaussianDistribution(2)
    with pytest.raises(NsrlError, match=r"a tanh lies between .* squash_output=False"):
        protect(model, retain=buffer)
    coins = MaskablePPO("MlpPolicy", DummyVecEnv([partial(Arbitrary, FLAT, BINARY)]), device="cpu")
    with pytest.raises(NsrlError, match=r"MultiDiscrete\(\[2, 2, ...\]\)"):
        protect(coins, retain=buffer)


def test_what_to_preserve_has_its_own_name() -> None:
    with pytest.raises(NsrlError, match=r'retain takes the buffer.*preserve="mode"'):
        protect(CASES["flat box"].build(), retain="mode")  # type: ignore[arg-type]
