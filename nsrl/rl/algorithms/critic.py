"""The critic at the start of a run: values of the old task mislead where rewards differ."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from nsrl.errors import NsrlError


def reset_critic(policy: Any) -> None:
    """Re-initialise the value network as SB3 does (orthogonal, gain sqrt 2 inside and 1 at the head).

    A features extractor of the critic's own is part of it; one that the actor uses too stays.

    Raises:
        NsrlError: a network of the user's own, which does not say where its critic is; nothing is changed.
    """
    inside: list[Any] = [getattr(policy.mlp_extractor, "value_net", None)]
    if not policy.share_features_extractor:
        inside.append(policy.vf_features_extractor)
    head: Any = getattr(policy, "value_net", None)
    if not all(isinstance(network, nn.Module) for network in [*inside, head]):
        raise NsrlError(
            f"the critic of {type(policy).__name__} with {type(policy.mlp_extractor).__name__} cannot be reset, since "
            "it has no mlp_extractor.value_net and value_net as SB3's policies do; pass critic='keep', and reset it "
            "yourself where the old task's values mislead"
        )
    for network, gain in [*((network, 2.0**0.5) for network in inside), (head, 1.0)]:
        network.apply(partial(policy.init_weights, gain=gain))
