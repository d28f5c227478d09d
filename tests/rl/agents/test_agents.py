"""Loading, saving and exporting agents, against stock Stable-Baselines3."""

import json
import random
import warnings
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import TRPO, RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from nsrl import NullSpacePPO, NullSpaceTRPO
from nsrl.errors import NsrlError
from nsrl.rl import agents
from nsrl.rl.agents.normalization import ObservationNormalizer, RetainingVecNormalize
from nsrl.rl.agents.stock_models import foreign_defaults, hyperparameters
from nsrl.rl.playing.environments import training_env

VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float32)
TORQUE = spaces.Box(-1.0, 1.0, (2,), np.float32)
IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)
MIXED = spaces.Dict([("v", VECTOR), ("img", IMAGE), ("d", spaces.Discrete(3))])


class FakeEnv(gym.Env):
    """Any spaces, random observations, episodes of 5 steps."""

    def __init__(self, observation_space=VECTOR, action_space=TORQUE):
        self.observation_space, self.action_space = observation_space, action_space
        self.steps = 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), float(self.steps % 3), self.steps % 5 == 0, False, {}


def build(cls=PPO, policy="MlpPolicy", observation_space=VECTOR, action_space=TORQUE, **kwargs):
    options = {"n_steps": 8, "batch_size": 8} if cls is not A2C else {"n_steps": 8}
    env = FakeEnv(observation_space, action_space)
    return cls(policy, env, device="cpu", **{**options, **kwargs})


def normalized(**kwargs):
    """A PPO trained for a moment inside VecNormalize."""
    env = VecNormalize(DummyVecEnv([FakeEnv]))
    return PPO("MlpPolicy", env, n_steps=8, batch_size=8, n_epochs=1, device="cpu", **kwargs).learn(16)


class OwnPolicy(ActorCriticPolicy):
    """A policy class that is on no allow list."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


CASES = {
    "gaussian": lambda: build(policy_kwargs={"net_arch": [8], "activation_fn": torch.nn.ELU}),
    "gsde": lambda: build(use_sde=True, policy_kwargs={"net_arch": [8]}).learn(16),
    "gsde, one spread a feature": lambda: build(
        A2C, use_sde=True, policy_kwargs={"full_std": False, "use_expln": True, "log_std_init": -1.0}
    ),
    "clipped": lambda: build(action_space=spaces.Box(np.float32([-0.1, 0]), np.float32([0.1, 0.3]))),
    "trained": lambda: build(learning_rate=0.01).learn(16),
    "cnn": lambda: build(PPO, "CnnPolicy", IMAGE, spaces.Discrete(3)),
    "dict": lambda: build(PPO, "MultiInputPolicy", MIXED, spaces.MultiDiscrete([2, 3])),
    "a2c": lambda: build(A2C, "MlpPolicy", spaces.Discrete(5), spaces.MultiBinary(3)),
    "trpo": lambda: build(TRPO, "MlpPolicy", spaces.MultiDiscrete([3, 4]), spaces.Discrete(2)),
}


@pytest.mark.parametrize("case", CASES)
def test_acts_as_stock_load_does(case, tmp_path):
    CASES[case]().save(tmp_path / "agent")
    agent = agents.load(tmp_path / "agent")
    stock = type(agent.model).load(tmp_path / "agent", device="cpu")
    assert type(agent.model) in (PPO, A2C, TRPO) and agent.path == tmp_path / "agent.zip"
    assert str(agent.model.policy) == str(stock.policy)
    samples = [stock.observation_space.sample() for _ in range(32)]
    batch = {k: np.stack([s[k] for s in samples]) for k in samples[0]} if case == "dict" else np.stack(samples)
    for deterministic in (True, False):
        actions = []
        for model in (agent.model, stock):
            torch.manual_seed(0)
            if model.use_sde:  # a loaded policy's noise is that of its construction until then
                model.policy.reset_noise()
            actions.append(model.predict(batch, deterministic=deterministic)[0])
        assert actions[0].dtype == actions[1].dtype and np.array_equal(*actions)
    tensors = stock.policy.obs_to_tensor(batch)[0]
    with torch.no_grad():
        taken = stock.policy.get_distribution(tensors).mode()
        ours, theirs = (policy.evaluate_actions(tensors, taken) for policy in (agent.model.policy, stock.policy))
    assert all(torch.equal(a, b) for a, b in zip(ours[:2], theirs[:2], strict=True))
    assert agents.fingerprint(agent.model.policy) == agents.fingerprint(stock.policy)
    assert type(agent.model.policy.optimizer) is type(stock.policy.optimizer)


def test_loading_disturbs_no_random_numbers(tmp_path):
    build(seed=7).save(tmp_path / "agent")
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    agents.load(tmp_path / "agent")
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


def test_a_loaded_agent_learns_in_a_new_environment(tmp_path):
    build(gamma=0.9).save(tmp_path / "agent")
    model = agents.load(tmp_path / "agent").model
    model.set_env(FakeEnv())
    model.learn(16)
    assert model.gamma == 0.9 and model.num_timesteps == 16


def test_untrusted_hyperparameters_warn_and_trust_restores_them(tmp_path):
    build(learning_rate=lambda progress: 1e-4 * progress, gamma=0.9).save(tmp_path / "agent")
    with pytest.warns(UserWarning, match="learning_rate of .* only pickled"):
        agent = agents.load(tmp_path / "agent")
    assert agent.untrusted == ("learning_rate",)
    assert agent.hyperparameters["learning_rate"] == 3e-4 and agent.hyperparameters["gamma"] == 0.9
    trusted = agents.load(tmp_path / "agent", trust=True)
    assert trusted.hyperparameters["learning_rate"](0.5) == 5e-5 and trusted.untrusted == ()


def test_custom_policies_need_trust(tmp_path):
    build(policy=OwnPolicy).save(tmp_path / "agent")
    with pytest.raises(NsrlError, match=r"OwnPolicy.*trust=True"):
        agents.load(tmp_path / "agent")
    assert type(agents.load(tmp_path / "agent", trust=True).model.policy).__name__ == "OwnPolicy"


@pytest.mark.parametrize("trust", [False, True])
def test_unsupported_agents_are_refused(trust, tmp_path):
    discrete = {"observation_space": VECTOR, "action_space": spaces.Discrete(2)}
    for model, reason in (
        (build(RecurrentPPO, "MlpLstmPolicy", **discrete), "only .*PPO, A2C"),
        (build(use_sde=True, policy_kwargs={"squash_output": True}), "squash_output=False"),
        (DQN("MlpPolicy", FakeEnv(**discrete), buffer_size=1, device="cpu"), "on-policy"),
    ):
        model.save(tmp_path / "agent")
        for source in (tmp_path / "agent", model):
            with pytest.raises(NsrlError, match=reason):
                agents.load(source, trust=trust)


def test_weights_that_do_not_fit_are_named(tmp_path):
    build().save(tmp_path / "a.zip")
    build(observation_space=spaces.Box(-1, 1, (5,))).save(tmp_path / "b.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as a, zipfile.ZipFile(tmp_path / "b.zip") as b:
        parts = {"data": a.read("data"), "policy.pth": b.read("policy.pth")}
    with zipfile.ZipFile(tmp_path / "mixed.zip", "w") as mixed:
        for name, content in parts.items():
            mixed.writestr(name, content)
    with pytest.raises(NsrlError, match=r"mixed.zip.*policy_net.0.weight has shape \(64, 5\), expected \(64, 3\)"):
        agents.load(tmp_path / "mixed.zip")


@pytest.mark.parametrize("key, value", [("n_steps", -1), ("gamma", "x"), ("n_steps", 10**17), ("clip_range", None)])
def test_tampered_hyperparameters_are_refused_or_default(key, value, tmp_path):
    build().save(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as old:
        parts = {name: old.read(name) for name in old.namelist()}
    parts["data"] = json.dumps({**json.loads(parts["data"]), key: value})
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as new:
        for name, content in parts.items():
            new.writestr(name, content)
    if isinstance(value, str):
        assert agents.load(tmp_path / "a.zip").hyperparameters[key] == 0.99
    else:
        with pytest.raises(NsrlError, match="cannot be built"):
            agents.load(tmp_path / "a.zip")


def test_agents_of_sb3_before_1_7_share_the_extractor_without_aliases(tmp_path):
    model = build(PPO, "CnnPolicy", IMAGE, spaces.Discrete(3))
    state = {k: v for k, v in model.policy.state_dict().items() if "_features_extractor" not in k}
    model.policy.state_dict = lambda: state
    model.save(tmp_path / "old.zip")
    loaded = agents.load(tmp_path / "old.zip").model.policy.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert torch.equal(loaded["pi_features_extractor.cnn.0.weight"], state["features_extractor.cnn.0.weight"])


def statistics(folder, name, mean):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    env = VecNormalize(DummyVecEnv([FakeEnv]))
    env.obs_rms.mean = np.full(3, float(mean))
    env.save(folder / name)


LAYOUTS = {
    # files in order, what to load, the expected agent, the expected statistics
    "ours": (["agent.zip", "best_model.zip", "vecnormalize.pkl"], "", "agent.zip", "vecnormalize.pkl"),
    "zoo final": (["Env-v1.zip", "Env-v1/vecnormalize.pkl"], "", "Env-v1.zip", "Env-v1/vecnormalize.pkl"),
    "zoo without suffix": (["E.zip", "E/vecnormalize.pkl"], "E", "E.zip", "E/vecnormalize.pkl"),
    "zoo best": (
        ["Env-v1.zip", "best_model.zip", "Env-v1/vecnormalize.pkl"],
        "best_model.zip",
        "best_model.zip",
        "Env-v1/vecnormalize.pkl",
    ),
    "zoo both, last": (
        ["Env-v1_3/Env-v1.zip", "Env-v1_3/best_model.zip", "Env-v1_3/Env-v1/vecnormalize.pkl"],
        "Env-v1_3",
        "Env-v1_3/Env-v1.zip",
        "Env-v1_3/Env-v1/vecnormalize.pkl",
    ),
    "beside": (["model.zip", "vecnormalize.pkl"], "", "model.zip", "vecnormalize.pkl"),
    "hub": (["ppo-Env-v1.zip", "vec_normalize.pkl"], "", "ppo-Env-v1.zip", "vec_normalize.pkl"),
    "nothing to normalise": (["model.zip"], "", "model.zip", None),
    "checkpoints": (
        ["m_9_steps.zip", "m_10_steps.zip", "m_vecnormalize_9_steps.pkl", "m_vecnormalize_10_steps.pkl"],
        "",
        "m_10_steps.zip",
        "m_vecnormalize_10_steps.pkl",
    ),
    "one checkpoint": (
        ["m_9_steps.zip", "m_10_steps.zip", "m_vecnormalize_9_steps.pkl", "m_vecnormalize_10_steps.pkl"],
        "m_9_steps",
        "m_9_steps.zip",
        "m_vecnormalize_9_steps.pkl",
    ),
    "another checkpoint's": (["m_9_steps.zip", "m_vecnormalize_10_steps.pkl"], "", "m_9_steps.zip", None),
    "final after checkpoints": (
        ["final.zip", "m_9_steps.zip", "m_vecnormalize_9_steps.pkl", "m_vecnormalize_10_steps.pkl"],
        "",
        "final.zip",
        "m_vecnormalize_10_steps.pkl",
    ),
    "another agent's": (["model.zip", "other/agent.zip", "other/vecnormalize.pkl"], "", "model.zip", None),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_run_folders_pair_agents_with_their_statistics(case, tmp_path):
    files, source, expected_zip, expected_statistics = LAYOUTS[case]
    for number, name in enumerate(files):
        if name.endswith(".zip"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            build().save(tmp_path / name)
        else:
            statistics(tmp_path, name, number)
    agent = agents.load(tmp_path / source)
    assert agent.path == tmp_path / expected_zip
    if expected_statistics is None:
        assert agent.normalizer is None
    else:
        assert agent.normalizer.mean[0] == files.index(expected_statistics)


@pytest.mark.parametrize(
    "files, listed",
    [
        (["best_model.zip", "Env-v1.zip"], "Env-v1.zip, best_model.zip"),
        (["a_1_steps.zip", "b_1_steps.zip"], "a_1_steps.zip, b_1_steps.zip"),
        (["m.zip", "x/vecnormalize.pkl", "y/vecnormalize.pkl"], "x/vecnormalize.pkl, y/vecnormalize.pkl"),
        (["m.zip", "a_vecnormalize_1_steps.pkl", "b_vecnormalize_1_steps.pkl"], "a_vec.*, b_vec"),
    ],
)
def test_ambiguous_folders_list_the_candidates(files, listed, tmp_path):
    for name in files:
        statistics(tmp_path, name, 0) if name.endswith(".pkl") else build().save(tmp_path / name)
    with pytest.raises(NsrlError, match=listed):
        agents.load(tmp_path)


def test_missing_agents_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(NsrlError, match="no agent at"):
        agents.load(tmp_path / "absent")
    with pytest.raises(NsrlError, match="holds no agent"):
        agents.load(str(tmp_path))


def test_sb3_callbacks_and_vec_normalize_are_read(tmp_path):
    env = VecNormalize(DummyVecEnv([FakeEnv]))
    model = PPO("MlpPolicy", env, n_steps=8, batch_size=8, n_epochs=1, device="cpu")
    model.learn(24, callback=CheckpointCallback(8, str(tmp_path), save_vecnormalize=True))
    agent = agents.load(tmp_path)
    assert agent.path.name == "rl_model_24_steps.zip"
    raw = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    stock = VecNormalize.load(str(tmp_path / "rl_model_vecnormalize_24_steps.pkl"), DummyVecEnv([FakeEnv]))
    assert np.array_equal(agent.normalizer.normalize(raw), stock.normalize_obs(raw))


def test_lost_statistics_are_noticed(tmp_path):
    normalized().save(tmp_path / "agent.zip")
    with pytest.warns(UserWarning, match="trained inside a VecNormalize"):
        assert agents.load(tmp_path).normalizer is None
    build().learn(8).save(tmp_path / "agent.zip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agents.load(tmp_path)


def test_statistics_of_another_shape_are_refused(tmp_path):
    build().save(tmp_path / "agent.zip")
    ObservationNormalizer(np.zeros(4), np.ones(4)).save(tmp_path / "vecnormalize.npz")
    with pytest.raises(NsrlError, match="shape"):
        agents.load(tmp_path)


def test_models_in_memory_bring_their_statistics():
    model = normalized()
    agent = agents.load(model)
    assert agent.model is model and agent.path is None
    raw = np.ones((2, 3), dtype=np.float32)
    assert np.array_equal(agent.normalizer.normalize(raw), model.get_vec_normalize_env().normalize_obs(raw))
    assert agents.load(agent) is agent and agents.load(build()).normalizer is None


def test_hyperparameters_make_the_same_algorithm_again():
    schedule = LinearSchedule(1e-3, 1e-4, 1.0)
    given = {"learning_rate": schedule, "n_steps": 16, "batch_size": 4, "n_epochs": 3, "gamma": 0.9}
    given |= {"gae_lambda": 0.8, "clip_range": 0.3, "clip_range_vf": 0.4, "normalize_advantage": False}
    given |= {"ent_coef": 0.01, "vf_coef": 0.7, "max_grad_norm": 0.9, "target_kl": 0.05}
    given |= {"use_sde": True, "sde_sample_freq": 4}
    found = hyperparameters(build(**given))
    assert found == given
    PPO("MlpPolicy", FakeEnv(), **found)

    assert hyperparameters(build(TRPO, gamma=0.9)) == {
        "gae_lambda": 0.95,
        "gamma": 0.9,
        "n_steps": 8,
        "normalize_advantage": True,
        "sde_sample_freq": -1,
        "use_sde": False,
    }
    assert hyperparameters(build(TRPO, cg_damping=0.3), TRPO)["cg_damping"] == 0.3
    for algorithm in (PPO, A2C, TRPO):  # a policy's distribution is its own, whoever goes on with it
        found = hyperparameters(build(A2C, use_sde=True, sde_sample_freq=3), algorithm)
        assert (found["use_sde"], found["sde_sample_freq"]) == (True, 3)
    found = hyperparameters(build(A2C, ent_coef=0.5))
    assert found["ent_coef"] == 0.5 and "n_epochs" not in found
    PPO("MlpPolicy", FakeEnv(), **found)


def test_fingerprints_tell_policies_apart():
    policy = build().policy
    first = agents.fingerprint(policy)
    assert len(first) == 64 and agents.fingerprint(policy) == first
    for parameter in (policy.action_net.bias, policy.value_net.weight, policy.log_std):
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[0] = torch.nextafter(parameter.view(-1)[0], torch.tensor(9.0))
        assert agents.fingerprint(policy) != first
        with torch.no_grad():
            parameter.copy_(kept)
    assert agents.fingerprint(policy) == first


def test_fingerprints_see_names_shapes_and_types():
    def module(**tensors):
        holder = torch.nn.Module()
        for name, tensor in tensors.items():
            holder.register_buffer(name, tensor)
        return holder

    zero = torch.zeros(4)
    variants = [
        module(a=zero),
        module(b=zero),
        module(a=zero.view(2, 2)),
        module(a=zero.int()),
        module(a=zero.bfloat16()),
    ]
    assert len({agents.fingerprint(variant) for variant in variants}) == len(variants)
    assert agents.fingerprint(module(a=zero, b=zero + 1)) == agents.fingerprint(module(b=zero + 1, a=zero))


def test_saving_is_atomic_and_stock(tmp_path, monkeypatch):
    model = build()
    path = agents.save_agent(model, tmp_path / "runs" / "agent")
    assert path == tmp_path / "runs" / "agent.zip"
    assert agents.fingerprint(PPO.load(path, device="cpu").policy) == agents.fingerprint(model.policy)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise RuntimeError("power cut")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError):
        agents.save_agent(model, path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


class Extended(PPO):
    """PPO with something that stock SB3 does not know."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.secret = FakeEnv


def test_exports_are_stock_agents(tmp_path):
    normalizer = ObservationNormalizer(np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0]))
    env = RetainingVecNormalize(DummyVecEnv([FakeEnv]), normalizer)
    model = Extended("MlpPolicy", env, n_steps=8, batch_size=8, device="cpu", clip_range=0.15).learn(8)
    path = agents.export(model, tmp_path / "out" / "agent")
    with (
        zipfile.ZipFile(path) as archive,
        zipfile.ZipFile(agents.save_agent(build().learn(8), tmp_path / "s")) as stock,
    ):
        assert json.loads(archive.read("data")).keys() == json.loads(stock.read("data")).keys()
    loaded = PPO.load(path, device="cpu")
    obs = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    assert np.array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    assert loaded.clip_range(1.0) == 0.15 and loaded.num_timesteps == 8
    stock_env = VecNormalize.load(str(path.with_name("vecnormalize.pkl")), DummyVecEnv([FakeEnv]))
    assert np.array_equal(stock_env.normalize_obs(obs), normalizer.normalize(obs))
    ours = agents.load(path)
    assert agents.fingerprint(ours.model.policy) == agents.fingerprint(model.policy)
    assert np.array_equal(ours.normalizer.mean, normalizer.mean)
    with pytest.raises(NsrlError, match=r"vecnormalize\.pkl.*another folder"):
        agents.export(build(), path.with_name("other.zip"))


def test_spaces_are_compared_and_both_named(tmp_path):
    model = build()
    agents.check_spaces(model, FakeEnv())
    agents.check_spaces((VECTOR, TORQUE), DummyVecEnv([FakeEnv]))
    for env, first, second in (
        (FakeEnv(spaces.Box(-1, 1, (4,))), r"\(4,\)", r"\(3,\)"),
        (FakeEnv(VECTOR, spaces.Discrete(2)), r"Discrete\(2\)", r"Box\(-1.0, 1.0, \(2,\)"),
        (FakeEnv(VECTOR, spaces.Box(-2.0, 2.0, (2,))), "Box\\(-2.0", "Box\\(-1.0"),
    ):
        with pytest.raises(NsrlError, match=f"{first}.*{second}"):
            agents.check_spaces(model, env)
    model.save(tmp_path / "agent")
    with pytest.raises(NsrlError, match=r"\(4,\)"):
        agents.load(tmp_path / "agent", FakeEnv(spaces.Box(-1, 1, (4,))))


def test_images_count_as_sb3_transposes_them():
    model = build(PPO, "CnnPolicy", IMAGE, spaces.Discrete(3))
    agents.check_spaces(model, FakeEnv(IMAGE, spaces.Discrete(3)))
    agents.check_spaces(model, model.get_env())
    agents.check_spaces(build(PPO, "MultiInputPolicy", MIXED), FakeEnv(MIXED))
    with pytest.raises(NsrlError, match="observation space"):
        agents.check_spaces(model, FakeEnv(spaces.Box(0, 255, (40, 36, 1), np.uint8), spaces.Discrete(3)))


def test_training_environments_freeze_the_agent_s_statistics():
    normalizer = ObservationNormalizer(np.ones(3), np.ones(3))
    env = training_env(FakeEnv(), normalizer, seed=0, gamma=0.9)
    assert isinstance(env, RetainingVecNormalize) and env.gamma == 0.9 and env.norm_reward
    assert training_env(env, normalizer) is env
    rewards_only = VecNormalize(DummyVecEnv([FakeEnv]), norm_obs=False)
    outer = training_env(rewards_only, normalizer)
    assert outer.venv is rewards_only and not outer.norm_reward
    bare = DummyVecEnv([FakeEnv])
    assert training_env(bare, None) is bare
    assert training_env("CartPole-v1", None).num_envs == 1
    with pytest.raises(NsrlError, match="other observation statistics than the agent's"):
        training_env(VecNormalize(bare), normalizer)
    with pytest.raises(NsrlError, match="NoSuchEnv"):
        training_env("NoSuchEnv-v0", None)
    with pytest.raises(NsrlError, match="shape"):
        training_env("CartPole-v1", normalizer)


ENJOY = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}


@pytest.mark.parametrize("value", [0, 0.0, lambda _: 0.0, ConstantSchedule(0.0), FloatSchedule(0.0)])
def test_schedules_that_are_zero_throughout_are_not_handed_on(value):
    model = build(gamma=0.9)
    model.learning_rate = model.clip_range = value
    found = hyperparameters(model)
    assert "learning_rate" not in found and "clip_range" not in found and found["gamma"] == 0.9
    model.learning_rate = LinearSchedule(1e-3, 0.0, 1.0)
    assert hyperparameters(model)["learning_rate"] is model.learning_rate


def test_an_agent_that_enjoy_has_saved_learns_again(tmp_path):
    env = make_vec_env("CartPole-v1", 2, seed=0)
    PPO("MlpPolicy", env, n_steps=16, batch_size=16, device="cpu").save(tmp_path / "agent")
    PPO.load(tmp_path / "agent", device="cpu", custom_objects=ENJOY).save(tmp_path / "enjoyed")
    path = tmp_path / "enjoyed.zip"
    with pytest.warns(UserWarning, match=r"learning_rate of .*enjoyed.zip is 0, with which no weight moves"):
        model = NullSpacePPO.from_pretrained(path, env)
    assert model.learning_rate == 3e-4 and model.n_steps == 16
    model = NullSpacePPO.from_pretrained(path, env, learning_rate=1e-4)
    assert model.learning_rate == 1e-4
    with pytest.warns(UserWarning, match="learning_rate of the agent was 0"):
        model = agents.attach_env(PPO.load(path, device="cpu"), env)
    assert model.learning_rate == 3e-4 and model.clip_range(1.0) == 0.2
    before = model.policy.action_net.weight.detach().clone()
    model.learn(32)
    assert not torch.equal(before, model.policy.action_net.weight)
    with pytest.warns(UserWarning, match="no weight will move"):
        NullSpacePPO("MlpPolicy", env, n_steps=16, batch_size=16, learning_rate=0.0, device="cpu").learn(32)


def test_the_length_of_a2c_s_rollouts_is_no_other_algorithm_s():
    env = make_vec_env("CartPole-v1", 2, seed=0)
    agent = A2C("MlpPolicy", env, gamma=0.9, device="cpu")
    assert hyperparameters(agent, A2C)["n_steps"] == 5
    with pytest.warns(UserWarning, match="n_steps of the agent is 5, the length of an A2C's rollouts"):
        model = NullSpacePPO.from_pretrained(agent, env)
    assert (model.n_steps, model.gamma, model.gae_lambda) == (2048, 0.9, 0.95)


def test_what_nobody_chose_is_no_other_algorithm_s() -> None:
    env = make_vec_env("CartPole-v1", 2, seed=0)
    agent = A2C("MlpPolicy", env, gamma=0.9, device="cpu")
    with pytest.warns(UserWarning, match=r"gae_lambda 1.0 and learning_rate 0.0007 and normalize_advantage False of"):
        model = NullSpacePPO.from_pretrained(agent, env)
    stock = PPO("MlpPolicy", env, device="cpu")
    for name in ("gae_lambda", "learning_rate", "normalize_advantage"):
        assert getattr(model, name) == getattr(stock, name) != getattr(agent, name)
    with pytest.warns(UserWarning, match="gae_lambda 1.0 and normalize_advantage False of the agent"):
        model = NullSpaceTRPO.from_pretrained(agent, env)
    assert model.normalize_advantage and model.gae_lambda == 0.95
    kept = hyperparameters(agent, A2C)
    assert kept["gae_lambda"] == 1.0 and kept["normalize_advantage"] is False
    # what somebody chose, and what is asked for, counts
    tuned = A2C("MlpPolicy", env, gae_lambda=0.9, learning_rate=1e-4, device="cpu")
    assert hyperparameters(tuned)["gae_lambda"] == 0.9 and hyperparameters(tuned)["learning_rate"] == 1e-4
    assert NullSpacePPO.from_pretrained(agent, env, normalize_advantage=False).normalize_advantage is False
    assert foreign_defaults(stock, NullSpacePPO) == {}
    assert NullSpacePPO.from_pretrained(agent, env, n_steps=32).n_steps == 32
