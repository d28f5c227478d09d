"""Room: whether an actor has units to spare for a new task, and how many more would do."""

from __future__ import annotations

import math
from typing import Any

import torch

from nsrl.rl.opening.block import OFF
from nsrl.rl.opening.condensing import ActorLayers, condense
from nsrl.rl.opening.noise import HiddenNoise
from nsrl.rl.opening.units import KEPT, others
from nsrl.rl.policies.actor_critic import select
from nsrl.rl.retention.constraint import RetentionConstraint

#: Units that are added to a layer at most, unless a half of it is more.
MOST = 128
#: Share of the units, at most, that the old task may keep: with less than a half the new one learns more slowly.
ENOUGH = 0.5
#: Share of the cost that counts as room: the opening, which comes later and knows the new task, is to find it too.
SURE = 0.5


@torch.no_grad()
def missing_units(constraint: RetentionConstraint, cost: float) -> int:
    """How many units every hidden layer of an actor lacks for the new task to have some of its own; 0 for none.

    It lacks some where an input that never moved on the buffer may tell the tasks apart, and the old task cannot be
    condensed on a half of the units (see `nsrl.rl.opening.units`).

    Args:
        constraint: policy against buffer; the policy is the same afterwards.
        cost: KL at most that condensing may cost, nats a state.
    """
    policy: Any = constraint.policy
    layers = ActorLayers.of(policy)
    if layers is None or not layers.activations:
        return 0
    inputs = select(constraint.inputs, constraint.train)
    features = layers.features(policy, inputs)
    if not bool((features == features[:1]).all(0).any()):
        return 0
    originals, noise = layers.read(), HiddenNoise.of(policy)
    log_std = None if noise is None else noise.log_std.detach().clone()
    wanted = None if noise is None else noise.variances(layers.hidden(features))
    try:
        for share in (share for share in KEPT if share <= ENOUGH):
            kept = condense(layers, features, share)
            free = [others(rows, layer.out_features) for rows, layer in zip(kept, layers.linears[:-1], strict=True)]
            if min(map(len, free)) >= 2:
                for rows, layer in zip(free, layers.linears[:-1], strict=True):
                    layer.weight[rows], layer.bias[rows] = 0.0, -OFF  # as the gate leaves them on the old task
                if noise is not None and wanted is not None:
                    hidden = layers.hidden(features)
                    noise.divide(wanted, hidden, hidden, kept[-1], free[-1])
                if constraint.binding_divergence() <= SURE * cost:
                    return 0
            layers.write(originals)
    finally:
        layers.write(originals)
        if noise is not None and log_std is not None:
            noise.write(log_std)
    widest = max(layer.out_features for layer in layers.linears[:-1])
    return max(min(widest, MOST), math.ceil(widest / 2))
