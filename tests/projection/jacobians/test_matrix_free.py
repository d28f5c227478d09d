"""Both products with a network's Jacobian, by hand and by autograd, against torch.func.jacrev in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from nsrl.projection.jacobians.matrix_free import GraphPasses, LayerPasses, linear_chain
from nsrl.rl.policies.actor_critic import actor_head, critic_head, policy_outputs, reached_parameters, select
from tests.rl.policy_builders import NETWORKS, build_policy, dense_jacobian, draw_observations

CHAINS = {
    "tanh": lambda: [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)],
    "relu without bias": lambda: [nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.Linear(5, 2)],
    "one layer": lambda: [nn.Linear(4, 3)],
    "activation at the end": lambda: [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2), nn.ReLU()],
}


def oracle(module: nn.Module, inputs: Tensor) -> Tensor:
    """Jacobian (N * O, P) in `parameters()` order."""
    named = {name: parameter.detach() for name, parameter in module.named_parameters()}
    rows = jacrev(lambda values: functional_call(module, values, (inputs,)))(named)
    return torch.cat([rows[name].flatten(2) for name in named], 2).flatten(0, 1)


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_of_layers_is_differentiated_as_by_jacrev(name: str) -> None:
    module = nn.Sequential(*CHAINS[name]()).double()
    inputs = torch.randn(7, 4, dtype=torch.float64)
    parameters = list(module.parameters())
    stages = linear_chain(list(module), parameters)
    assert stages is not None
    dense = oracle(module, inputs)
    for passes in (LayerPasses(stages, inputs, parameters), GraphPasses(module(inputs), parameters)):
        vector, cotangents = torch.randn(dense.shape[1]).double(), torch.randn_like(passes.outputs)
        torch.testing.assert_close(passes.outputs, module(inputs).detach(), rtol=0, atol=1e-14)
        torch.testing.assert_close(passes.push(vector).flatten(), dense @ vector, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(passes.pull(cotangents), dense.T @ cotangents.flatten(), rtol=1e-12, atol=1e-12)
        for piece, parameter in zip(passes.pieces(cotangents), parameters, strict=True):
            assert piece.shape == parameter.shape


def test_some_of_the_parameters_in_another_order() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    inputs = torch.randn(5, 4, dtype=torch.float64)
    chosen = [module[2].weight, module[0].bias]
    stages = linear_chain(list(module), chosen)
    assert stages is not None
    passes, dense = LayerPasses(stages, inputs, chosen), oracle(module, inputs)
    columns = torch.cat([torch.arange(30, 48), torch.arange(24, 30)])
    vector, cotangents = torch.randn(24).double(), torch.randn(5, 3).double()
    torch.testing.assert_close(passes.push(vector).flatten(), dense[:, columns] @ vector)
    torch.testing.assert_close(passes.pull(cotangents), dense[:, columns].T @ cotangents.flatten())


def test_layers_that_share_parameters_are_no_chain() -> None:
    tied, twin = nn.Linear(3, 3), nn.Linear(3, 3)
    twin.weight = tied.weight
    for modules in ([tied, nn.Tanh(), tied], [tied, nn.Tanh(), twin]):
        assert linear_chain(modules, list(tied.parameters())) is None


def test_what_is_no_chain_goes_through_autograd() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    hooked = nn.Linear(3, 3)
    hooked.register_forward_hook(lambda layer, args, out: 2 * out)
    for modules in (
        [nn.SiLU()],
        [nn.Tanh(), nn.Linear(3, 3)],
        [nn.Linear(3, 3), nn.Tanh(), nn.Tanh()],
        [nn.Linear(3, 3), nn.LayerNorm(3)],
        [normed],
        [hooked],
        [],
    ):
        assert linear_chain(modules, []) is None
    assert linear_chain([nn.Linear(3, 3)], [nn.Parameter(torch.ones(2))]) is None


@pytest.mark.parametrize("network", NETWORKS)
def test_heads_of_a_policy(network: str) -> None:
    policy = build_policy("discrete", network)
    observations = draw_observations(policy, 6)
    actor = reached_parameters(policy, policy_outputs(policy, observations))
    head = actor_head(policy, observations, actor)
    torch.testing.assert_close(head.outputs(), policy_outputs(policy, observations).detach(), rtol=0, atol=1e-12)
    dense = dense_jacobian(policy, lambda: policy_outputs(policy, observations), actor)
    passes, vector = head.passes(), torch.randn(dense.shape[1]).double()
    torch.testing.assert_close(passes.push(vector).flatten(), dense @ vector, rtol=1e-10, atol=1e-10)
    half = head.select(slice(0, 3)).passes()
    torch.testing.assert_close(half.push(vector).flatten(), (dense @ vector)[: half.outputs.numel()])
    reached = reached_parameters(policy, policy.predict_values(observations))
    own = [parameter for parameter in reached if all(parameter is not other for other in actor)]
    critic = critic_head(policy, observations, own)
    values = policy.predict_values(observations).detach()
    torch.testing.assert_close(critic.outputs(), values, rtol=0, atol=1e-12)
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    parts = [passes.outputs for passes in critic.minibatches(order, 4)]
    assert [len(part) for part in parts] == [4, 2]
    torch.testing.assert_close(torch.cat(parts), values[order], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        critic.passes().pull(values),
        dense_jacobian(policy, lambda: policy.predict_values(observations), own).T @ values.flatten(),
        rtol=1e-10,
        atol=1e-10,
    )


def test_features_are_extracted_once_where_they_stand_still() -> None:
    shared = build_policy("discrete", "shared cnn")
    observations = draw_observations(shared, 2)
    actor = reached_parameters(shared, policy_outputs(shared, observations))
    assert actor_head(shared, observations, actor).inputs is observations
    critic = critic_head(shared, observations, [shared.value_net.weight])
    assert critic.inputs.shape == (2, 8) and critic.stages is not None


def test_rows_of_observations() -> None:
    observations = {"a": torch.arange(6).view(3, 2), "b": torch.arange(3)}
    assert select(observations, torch.tensor([2, 0]))["b"].tolist() == [2, 0]
    assert select(torch.arange(5), slice(1, 3)).tolist() == [1, 2]
