"""What a Stable-Baselines3 policy computes: its distribution parameters as a plain function of observations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import MlpExtractor
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsrl.projection.jacobians.matrix_free import GraphPasses, LayerPasses, Passes, Stage, is_plain, linear_chain

#: Where modules are that only the critic has.
CRITIC = ("mlp_extractor.value_net", "value_net", "vf_features_extractor")

Observation = Tensor | dict[str, Tensor]


def policy_outputs(policy: ActorCriticPolicy, observations: Observation) -> Tensor:
    """Logits (discrete actions), mean (Box actions), or under gSDE means and then log standard deviations, (N, O).

    Goes through the actor only, as `ActorCriticPolicy.get_distribution` does, but builds no distribution object:
    SB3's is a mutable singleton that the next call overwrites.
    """
    # The base class's method: ActorCriticPolicy's own returns a pair when actor and critic extract separately.
    features = BasePolicy.extract_features(policy, observations, policy.pi_features_extractor)
    return _outputs_of_latent(policy, policy.mlp_extractor.forward_actor(features))  # type: ignore[arg-type]


def _outputs_of_latent(policy: ActorCriticPolicy, latent: Tensor) -> Tensor:
    mean, noise = policy.action_net(latent), policy.action_dist
    if not isinstance(noise, StateDependentNoiseDistribution):
        return mean
    # What SB3's distribution computes, and the gradient that it stops: the KL does depend on the hidden layer.
    variance = latent.square() @ noise.get_std(policy.log_std).square()  # type: ignore[arg-type]
    return torch.cat([mean, 0.5 * torch.log(variance + noise.epsilon)], 1)


#: States that are differentiated at once where parameters are looked for.
PROBED = 256


@dataclass(frozen=True)
class Head:
    """Actor or critic of a policy on a fixed batch, at whatever its parameters are now.

    Attributes:
        forward: from `inputs` to outputs (N, O).
        inputs: the observations; or their features, extracted once, where the extractor stands still.
        parameters: those that are moved.
        stages: the chain of linear layers that `forward` is, if it is one.
    """

    forward: Callable[[Any], Tensor]
    inputs: Observation
    parameters: tuple[nn.Parameter, ...]
    stages: tuple[Stage, ...] | None

    @torch.no_grad()
    def outputs(self) -> Tensor:
        """Outputs now, shape (N, O)."""
        return self.forward(self.inputs) if self.stages is None else self.passes().outputs

    def passes(self) -> Passes:
        """Both products with the Jacobian at the present parameters."""
        if self.stages is not None:
            assert isinstance(self.inputs, Tensor)
            return LayerPasses(self.stages, self.inputs, self.parameters)
        # The fused attention kernels cannot be differentiated twice, which products with the Jacobian take.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            return GraphPasses(self.forward(self.inputs), self.parameters)

    def select(self, indices: Tensor | slice) -> Head:
        """The same on some of the batch."""
        return Head(self.forward, select(self.inputs, indices), self.parameters, self.stages)

    def minibatches(self, order: Tensor, size: int) -> Iterator[Passes]:
        """Passes on `size` rows after the other in some order, each at the parameters of its time."""
        if self.stages is None:
            for rows in order.split(size):
                yield self.select(rows).passes()
        else:
            assert isinstance(self.inputs, Tensor)
            for inputs in self.inputs[order].split(size):
                yield LayerPasses(self.stages, inputs, self.parameters)


def actor_head(policy: ActorCriticPolicy, observations: Observation, parameters: Sequence[nn.Parameter]) -> Head:
    """Logits or means as a function of some of the policy's parameters."""
    mlp, hidden = policy.mlp_extractor, hidden_layers(policy)
    layers: list[nn.Module] | None = None if hidden is None else [*hidden, policy.action_net]
    if isinstance(policy.action_dist, StateDependentNoiseDistribution):
        layers = None
    extractor = policy.pi_features_extractor
    top = partial(_outputs_of_latent, policy)
    return _head(policy, observations, extractor, mlp.forward_actor, top, layers, parameters)


def hidden_layers(policy: ActorCriticPolicy) -> nn.Sequential | None:
    """The layers between features and head of an actor that is these, one after the other, and nothing else."""
    mlp = policy.mlp_extractor
    return mlp.policy_net if _is_chain(mlp, "policy_net", "forward_actor") else None


def critic_head(policy: ActorCriticPolicy, observations: Observation, parameters: Sequence[nn.Parameter]) -> Head:
    """Values, shape (N, 1), as a function of some of the policy's parameters."""
    if type(policy).predict_values is not ActorCriticPolicy.predict_values:
        return Head(policy.predict_values, observations, tuple(parameters), None)
    mlp, layers = policy.mlp_extractor, critic_layers(policy)
    extractor = policy.vf_features_extractor
    return _head(policy, observations, extractor, mlp.forward_critic, policy.value_net, layers, parameters)


def critic_layers(policy: ActorCriticPolicy) -> list[nn.Module] | None:
    """The layers of a critic, head included, that is these, one after the other, and nothing else."""
    mlp = policy.mlp_extractor
    return [*mlp.value_net, policy.value_net] if _is_chain(mlp, "value_net", "forward_critic") else None


def _is_chain(mlp: nn.Module, name: str, method: str) -> bool:
    """Whether SB3's extractor runs the layers of one of its networks one after the other, and nothing else."""
    if type(mlp) is not MlpExtractor or method in vars(mlp):
        return False
    network = getattr(mlp, name)
    return type(network) is nn.Sequential and is_plain(network)


def _head(
    policy: ActorCriticPolicy,
    observations: Observation,
    extractor: Any,
    body: Callable[[Any], Tensor],
    top: Callable[[Tensor], Tensor],
    layers: list[nn.Module] | None,
    parameters: Sequence[nn.Parameter],
) -> Head:
    def extract(observations: Observation) -> Tensor:
        # The base class's method: ActorCriticPolicy's own returns a pair when actor and critic extract separately.
        return BasePolicy.extract_features(policy, observations, extractor)

    if not set(parameters).isdisjoint(extractor.parameters()):
        return Head(lambda inputs: top(body(extract(inputs))), observations, tuple(parameters), None)
    with torch.no_grad():
        features = extract(observations)
    stages = None if layers is None else linear_chain(layers, parameters)
    return Head(lambda inputs: top(body(inputs)), features, tuple(parameters), stages)


def reached_parameters(policy: ActorCriticPolicy, outputs: Tensor) -> list[nn.Parameter]:
    """Trainable parameters that a policy's outputs depend on, in `named_parameters()` order: by autograd, not by name.

    Args:
        policy: the policy.
        outputs: anything that it computed, with its graph.
    """
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    if not outputs.requires_grad:
        return []
    grads = torch.autograd.grad(outputs.sum(), trainable, allow_unused=True)
    return [parameter for parameter, grad in zip(trainable, grads, strict=True) if grad is not None]


def reached_at_any(
    policy: ActorCriticPolicy, function: Callable[[slice], Tensor], count: int, wanted: Set[nn.Parameter]
) -> list[nn.Parameter]:
    """Trainable parameters that a function of states depends on at one of them at least, as `reached_parameters`.

    Which those are may differ from state to state (a mixture of experts), so one after the other is asked until all
    that are wanted have been found: two are enough for most policies.

    Args:
        policy: the policy.
        function: of rows, as a slice, to anything that the policy computes from them, with its graph.
        count: number of rows.
        wanted: parameters worth looking for.
    """
    found: set[nn.Parameter] = set()
    for rows in (slice(0, 2), *(slice(start, start + PROBED) for start in range(0, count, PROBED))):
        with torch.enable_grad():
            found.update(reached_parameters(policy, function(rows)))
        if wanted <= found:
            break
    return [parameter for parameter in policy.parameters() if parameter in found]


def actor_candidates(policy: ActorCriticPolicy) -> set[nn.Parameter]:
    """Trainable parameters that are not known to be the critic's, but for a spread that is no output of the network."""
    apart = set() if isinstance(policy.action_dist, StateDependentNoiseDistribution) else {"log_std"}
    return {
        parameter
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad and name not in apart and not name.startswith(CRITIC)
    }


def joined(first: Observation, second: Observation) -> Observation:
    """Two batches of observations, one after the other."""
    if isinstance(first, Mapping):
        assert isinstance(second, Mapping)
        return {key: torch.cat([value, second[key]]) for key, value in first.items()}
    assert isinstance(second, Tensor)
    return torch.cat([first, second])


def select(inputs: Observation, indices: Tensor | slice) -> Observation:
    """Some rows of a batch of observations."""
    if isinstance(inputs, Mapping):
        return {key: value[indices] for key, value in inputs.items()}
    return inputs[indices]
