"""Free columns: weights of inputs that the old task never moved, which it therefore says nothing about."""

from __future__ import annotations

from typing import Any, cast

import torch
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from torch import Tensor, nn

from nsrl.projection.jacobians.matrix_free import is_plain
from nsrl.rl.opening.switch import free_inputs
from nsrl.rl.policies.actor_critic import Observation, hidden_layers

#: Size of the free inputs' effect on the first layer, in units of the root mean square of its pre-activations on the
#: buffer, and that effect at least. It leads tanh out of where the old task left it and gives the new task features of
#: its own; where pre-activations are tiny the layer is linear, and a multiple of them would leave it so. One that does
#: not saturate needs less: a large effect only makes its units linear, on or off.
STRENGTH = (5.0, 2.0)
OTHER_STRENGTH = (2.0, 0.5)


@torch.no_grad()
def redraw_columns(policy: ActorCriticPolicy, old: Observation, new: Observation, seed: int) -> int:
    """Give the inputs that are constant on the buffer, and other on the new task, a large random column.

    What they said on the buffer goes into the bias, so the policy's outputs there stay what they are to rounding: the
    columns lie in the null space exactly. A column of zeros, or one that nothing has trained, would leave the new task
    with the old one's features.

    Args:
        policy: whose actor is an MLP on features that are not learnt; any other keeps its weights.
        old: inputs of the buffer, (N, ...).
        new: inputs of the new task, (M, ...).
        seed: of the columns.

    Returns:
        How many columns were drawn.
    """
    network, extractor = hidden_layers(policy), cast(Any, policy.pi_features_extractor)
    if any(True for _ in extractor.parameters()) or not network:
        return 0
    layer = network[0]
    if type(layer) is not nn.Linear or layer.bias is None or not is_plain(layer):
        return 0
    if not (layer.weight.requires_grad and layer.bias.requires_grad):
        return 0
    before, after = (BasePolicy.extract_features(policy, inputs, extractor) for inputs in (old, new))
    free = free_inputs(before, after)
    change = (after - before[:1]).square().mean(0).sqrt()
    if len(free) == 0:
        return 0
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(layer.out_features, len(free), generator=generator).to(layer.weight)
    drawn *= _strength(network, layer, before) / (change[free] * len(free) ** 0.5)
    layer.bias.sub_((drawn - layer.weight[:, free]) @ before[0, free])
    layer.weight[:, free] = drawn
    return len(free)


def _strength(network: nn.Sequential, layer: nn.Linear, features: Tensor) -> float:
    size = float(layer(features).square().mean().sqrt())
    saturates = len(network) > 1 and isinstance(network[1], nn.Tanh)
    times, least = STRENGTH if saturates else OTHER_STRENGTH
    return max(times * size, least)
