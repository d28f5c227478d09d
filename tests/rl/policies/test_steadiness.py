"""Networks that act otherwise in updates, remember, or are random: refused by name, or held in eval mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces
from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from nsrl import RetentionBuffer, protect
from nsrl.errors import NsrlError
from nsrl.rl.policies.observations import reference_outputs
from tests.rl.builders import NEW, OLD
from tests.rl.oracles import independent_kl, within

BUDGET = 1e-4


class Attention(nn.Module):
    """One position for each number of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(len(x), 2, 4)
        return self.attention(x, x, x, need_weights=False)[0].flatten(1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, num_layers=2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.view(len(x), 2, 4))[0].flatten(1)


class Positions(nn.Module):
    """InstanceNorm over 4 positions of 2 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(2, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.view(len(x), 2, 4)).flatten(1)


class ModeDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, self.training)


class AlwaysDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3)


class Remembering(nn.Module):
    """A running mean of its own, which it subtracts; moves in train mode, or in any."""

    def __init__(self, always: bool):
        super().__init__()
        self.always = always
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.always or self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean


class Counting(nn.Module):
    """Remembers outside of any buffer."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + 0.1 * self.calls


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Otherwise(nn.Module):
    """A branch of the mode alone: neither random nor with a memory."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x if self.training else x


class Extractor(BaseFeaturesExtractor):
    def __init__(self, space: spaces.Box, last: Callable[[], nn.Module]):
        super().__init__(space, 8)
        self.first, self.last = nn.Linear(space.shape[0], 8), last()

    def forward(self, observations: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(observations)))


def build(algorithm: type, last: Callable[[], nn.Module]) -> tuple[Any, RetentionBuffer]:
    """A model, and a buffer of random states with what it did on them in eval mode."""
    policy_kwargs = {
        "features_extractor_class": Extractor,
        "features_extractor_kwargs": {"last": last},
        "net_arch": [8],
    }
    model: Any = algorithm(
        "MlpPolicy",
        make_vec_env(OLD["discrete"], 2, seed=0),
        seed=0,
        device="cpu",
        n_steps=32,
        learning_rate=0.01,
        policy_kwargs=policy_kwargs,
        **({} if algorithm is A2C else {"batch_size": 32}),
    )
    model.learn(64)
    space = model.observation_space
    states = torch.randn(60, *space.shape, generator=torch.Generator().manual_seed(0)).numpy()
    model.policy.set_training_mode(False)
    outputs = reference_outputs(model.policy, states, None)
    return model, RetentionBuffer.from_arrays(
        states, outputs=outputs, action_space=model.action_space, observation_space=space
    )


def spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))


def old_spectral() -> nn.Module:
    return nn.utils.spectral_norm(nn.Linear(8, 8))


#: What acts otherwise in train mode only, and what is named.
IN_TRAIN_MODE: list[tuple[Callable[[], nn.Module], str]] = [
    (Positions, r"norm is InstanceNorm1d"),
    (nn.RReLU, r"last is RReLU"),
    (spectral, r"parametrizations\.weight\.0\._[uv]"),
    (old_spectral, r"last\.weight_[uv]"),
    (Attention, r"attention is MultiheadAttention"),
    (Recurrent, r"lstm is LSTM"),
    (ModeDropout, r"last \(ModeDropout\)"),
    (lambda: Remembering(False), r"last\.mean"),
    (Otherwise, r"last \(Otherwise\)"),
    (lambda: nn.AlphaDropout(0.1), r"last is AlphaDropout"),
]

#: What no KL can be held of.
NEVER: list[tuple[Callable[[], nn.Module], str]] = [
    (AlwaysDropout, "random or remembers"),
    (lambda: Remembering(True), r"last\.mean changes whenever the policy acts"),
    (Counting, "random or remembers"),
    (Centred, "few others"),
    (lambda: nn.BatchNorm1d(8, track_running_stats=False), "few others"),
]


@pytest.mark.parametrize(("last", "named"), IN_TRAIN_MODE)
@pytest.mark.parametrize("algorithm", [PPO, A2C, TRPO])
def test_what_acts_otherwise_in_train_mode_is_refused_or_trained_in_eval_mode(
    algorithm: type, last: Callable[[], nn.Module], named: str
) -> None:
    model, buffer = build(algorithm, last)
    before = {name: buffer_.clone() for name, buffer_ in model.policy.named_buffers()}
    state = torch.get_rng_state()
    if algorithm is not TRPO:
        with pytest.raises(NsrlError, match=f"{named}.*NullSpaceTRPO"):
            protect(model, buffer, kl_budget=BUDGET)
        assert type(model) is algorithm and torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(buffer_, before[name]) for name, buffer_ in model.policy.named_buffers())
        return
    model.set_env(make_vec_env(NEW["discrete"], 2, seed=0))
    protect(model, buffer, kl_budget=BUDGET)
    model.learn(3 * 64)
    model.policy.set_training_mode(False)
    assert model.retention.updates == 3 and 0.0 < independent_kl(model, buffer) <= within(BUDGET, buffer)


@pytest.mark.parametrize(("last", "named"), NEVER)
@pytest.mark.parametrize("algorithm", [PPO, TRPO])
def test_what_is_no_function_of_the_state_is_refused_everywhere(
    algorithm: type, last: Callable[[], nn.Module], named: str
) -> None:
    model, buffer = build(algorithm, last)
    with pytest.raises(NsrlError, match=named):
        protect(model, buffer, kl_budget=BUDGET, trust_buffer=True)


@pytest.mark.parametrize("last", [lambda: nn.LayerNorm(8), nn.Identity, lambda: nn.Dropout(0.0), lambda: nn.RMSNorm(8)])
def test_what_is_one_function_is_taken_and_its_modes_left_alone(last: Callable[[], nn.Module]) -> None:
    model, buffer = build(PPO, last)
    protect(model, buffer, kl_budget=BUDGET).learn(128)
    assert 0.0 < independent_kl(model, buffer) <= within(BUDGET, buffer)
