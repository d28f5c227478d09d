"""Condensing: the old task on a part of an actor's hidden units, so that the others are free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from torch import Tensor, nn

from nsrl.projection.jacobians.matrix_free import is_plain
from nsrl.rl.policies.actor_critic import Observation, hidden_layers

#: Relative singular value below which a direction of a layer's activations is not used.
CUTOFF = 1e-7


@dataclass(frozen=True)
class ActorLayers:
    """An actor that is linear layers with activations between them.

    Attributes:
        linears: the layers, the head last.
        activations: between them, one fewer; elementwise and without parameters.
    """

    linears: Sequence[nn.Linear]
    activations: Sequence[nn.Module]

    @classmethod
    def of(cls, policy: ActorCriticPolicy) -> ActorLayers | None:
        """A policy's; None for an actor of any other kind, or one whose layers do not all learn."""
        network, extractor = hidden_layers(policy), cast(Any, policy.pi_features_extractor)
        if not network or any(True for _ in extractor.parameters()):
            return None
        modules = [*network, policy.action_net]
        linears, activations = modules[::2], modules[1::2]
        for layer in linears:
            if type(layer) is not nn.Linear or layer.bias is None or not is_plain(layer):
                return None
            if not (layer.weight.requires_grad and layer.bias.requires_grad):
                return None
        if any(type(layer) not in ELEMENTWISE for layer in activations):
            return None
        return cls(cast(list[nn.Linear], linears), activations)

    def read(self) -> list[tuple[Tensor, Tensor]]:
        """Copies of weights and biases, (out, in) and (out,)."""
        return [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in self.linears]

    def write(self, values: list[tuple[Tensor, Tensor]]) -> None:
        """Put `read()`'s copies back."""
        with torch.no_grad():
            for layer, (weight, bias) in zip(self.linears, values, strict=True):
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)

    @staticmethod
    def features(policy: ActorCriticPolicy, inputs: Observation) -> Tensor:
        """What the first layer reads of a policy's inputs, (N, ...): (N, F) float64."""
        return BasePolicy.extract_features(policy, inputs, cast(Any, policy.pi_features_extractor)).double()

    def hidden(self, features: Tensor) -> Tensor:
        """Activations of the last hidden layer on features, (N, F) float64, in float64: (N, H)."""
        for layer, activation in zip(self.linears, self.activations, strict=False):
            features = activation(_applied(layer, features))
        return features

    def outputs(self, features: Tensor) -> Tensor:
        """What the head makes of it, (N, O)."""
        return _applied(self.linears[-1], self.hidden(features))


#: Activations that are flat, or go to a constant, far below zero: a unit can be turned off there.
ELEMENTWISE = (nn.Tanh, nn.ReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Sigmoid)


@torch.no_grad()
def condense(layers: ActorLayers, features: Tensor, share: float) -> list[Tensor]:
    """Let an actor do with a share of its hidden units what it did with all, in place.

    From the first hidden layer on: the units whose activations span the others' best are kept, and the layer above is
    regressed, with them alone, on its own pre-activations as they were; what the other units feed it becomes zero.

    Args:
        layers: of the actor.
        features: of the old task's states, (N, F), float64.
        share: of each layer's units that are kept, in (0, 1].

    Returns:
        Indices of the kept units, by hidden layer.
    """
    originals = [(weight.double(), bias.double()) for weight, bias in layers.read()]
    wanted, actual, kept = features, features, []
    # what nothing reads makes no unit below it worth keeping
    read = [upper[0].abs().amax(0) > 0.0 for upper in originals[2:]] + [slice(None)]
    pairs = zip(layers.linears, layers.linears[1:], layers.activations, strict=False)
    for (layer, above, activation), (weight, bias), upper, heard in zip(
        pairs, originals, originals[1:], read, strict=False
    ):
        wanted = activation(wanted @ weight.T + bias)
        actual = activation(_applied(layer, actual))
        rows = spanning_units(actual, upper[0][heard].norm(dim=0), max(round(share * layer.out_features), 1))
        known = torch.cat([actual[:, rows], torch.ones_like(actual[:, :1])], 1)
        aim = wanted @ upper[0].T + upper[1]
        # gelsd is exact where activations are collinear; CUDA has only one driver, which is not, so it is done aside
        solution = torch.linalg.lstsq(known.cpu(), aim.cpu(), rcond=CUTOFF, driver="gelsd").solution
        above.weight.zero_()
        above.weight[:, rows] = solution[:-1].T.to(above.weight)
        above.bias.copy_(solution[-1])
        kept.append(rows)
    return kept


def spanning_units(values: Tensor, importance: Tensor, count: int) -> Tensor:
    """Indices of units that span the others' activations best: pivots of a Cholesky factor of their covariance.

    Args:
        values: activations, (N, H).
        importance: what a unit's activations are multiplied by, (H,).
        count: how many.
    """
    centred = (values - values.mean(0)) * importance
    left = centred.T @ centred
    chosen = torch.zeros(len(left), dtype=torch.bool, device=values.device)
    for _ in range(count):
        diagonal = left.diagonal().masked_fill(chosen, -1.0)
        best = int(diagonal.argmax())
        chosen[best] = True
        if float(diagonal[best]) > 0.0:
            left = left - torch.outer(left[:, best], left[best]) / left[best, best]
    return chosen.nonzero().flatten()


def _applied(layer: nn.Linear, inputs: Tensor) -> Tensor:
    return inputs @ layer.weight.double().T + layer.bias.double()
