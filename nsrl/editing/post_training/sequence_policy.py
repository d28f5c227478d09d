"""A policy that is a transformer: the last observations as a sequence, as a features extractor of Stable-Baselines3.

    env = gymnasium.wrappers.FrameStackObservation(gymnasium.make("CartPole-v1"), 8)          # observations (8, 4)
    model = PPO("MlpPolicy", env, policy_kwargs={"features_extractor_class": SequenceExtractor})

Linear layers, layer norms and products only, and no dropout: its Jacobian is that of `nsrl.projection`, so that
NullSpacePPO, buffers and reports take such an agent like any other.
"""

from __future__ import annotations

import gymnasium
import torch
import torch.nn.functional as F
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from nsrl.errors import NsrlError


class SequenceBlock(nn.Module):
    """Causal attention and a two-layer network, each behind a norm and beside what it is given.

    Args:
        width: numbers a position.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Positions (N, T, width) to positions (N, T, width)."""
        n, length, width = x.shape
        q, k, v = self.qkv(self.before(x)).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / (width // self.heads) ** 0.5
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(later, -1e9).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return x + self.down(F.gelu(self.up(self.between(x))))


class SequenceExtractor(BaseFeaturesExtractor):
    """A small causal transformer over the last T observations; its features are those of the newest.

    Args:
        observation_space: Box (T, d), the newest observation last.
        features_dim: numbers a position, and of the features.
        blocks: of the transformer.
        heads: of its attention.

    Raises:
        NsrlError: another space, or heads that do not divide the width.
    """

    def __init__(self, observation_space: gymnasium.Space, features_dim: int = 32, blocks: int = 2, heads: int = 2):
        shape = observation_space.shape
        if not isinstance(observation_space, gymnasium.spaces.Box) or shape is None or len(shape) != 2:
            raise NsrlError(
                f"a sequence policy needs observations of shape (T, d), not {observation_space}; wrap the environment "
                "in gymnasium.wrappers.FrameStackObservation"
            )
        if features_dim % heads:
            raise NsrlError(f"{heads} heads do not divide {features_dim} numbers; choose a multiple")
        super().__init__(observation_space, features_dim)
        self.embed = nn.Linear(shape[1], features_dim)
        self.places = nn.Parameter(0.1 * torch.randn(shape[0], features_dim))
        self.blocks = nn.Sequential(*(SequenceBlock(features_dim, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(features_dim)

    def forward(self, observations: Tensor) -> Tensor:
        """Observations (N, T, d) to features (N, features_dim)."""
        return self.norm(self.blocks(self.embed(observations) + self.places)[:, -1])
