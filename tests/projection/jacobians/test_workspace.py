"""Passes in memory that is taken once, against those that take their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nsrl.projection.jacobians.matrix_free import LayerPasses, linear_chain
from nsrl.projection.jacobians.workspace import ChainWorkspace

CHAINS = {
    "tanh": lambda: [nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 1)],
    "relu": lambda: [nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3)],
    "linear": lambda: [nn.Linear(4, 3)],
    "without biases": lambda: [nn.Linear(4, 9, bias=False), nn.Tanh(), nn.Linear(9, 2, bias=False)],
    "an activation at its end": lambda: [nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2), nn.Tanh()],
}
FROZEN = {"nothing": (), "the lowest layer": (0, 1), "a weight": (0,), "all but the head": (0, 1, 2, 3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("chain", CHAINS)
def test_it_computes_what_layer_passes_do_bit_for_bit(chain: str, frozen: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = [layer.to(dtype) for layer in CHAINS[chain]()]
    owned = [parameter for layer in layers for parameter in layer.parameters()]
    moved = [parameter for number, parameter in enumerate(owned) if number not in FROZEN[frozen]]
    stages = linear_chain(layers, moved)
    assert stages is not None
    workspace = ChainWorkspace(stages, moved, rows=8)
    for rows in (8, 5, 8, 1):
        inputs = torch.randn(rows, 4, dtype=dtype)
        passes = LayerPasses(stages, inputs, moved)
        cotangents = torch.randn_like(passes.outputs)
        with torch.no_grad():
            batch = workspace.batch(rows)
            assert torch.equal(batch.push(inputs), passes.outputs)
            batch.cotangents.copy_(cotangents)
            batch.pull(inputs)
            for found, wanted in zip(workspace.gradients, passes.pieces(cotangents), strict=True):
                assert torch.equal(found, wanted)
            for parameter in owned:  # weights are read where they lie
                parameter.add_(0.1)


def test_gradients_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*CHAINS["tanh"]()).double()
    inputs, cotangents = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    stages, parameters = linear_chain(list(net), list(net.parameters())), list(net.parameters())
    assert stages is not None
    workspace = ChainWorkspace(stages, parameters, rows=6)
    wanted = torch.autograd.grad((net(inputs) * cotangents).sum(), parameters)
    with torch.no_grad():
        batch = workspace.batch(6)
        batch.push(inputs)
        batch.cotangents.copy_(cotangents)
        batch.pull(inputs)
    for found, gradient in zip(workspace.gradients, wanted, strict=True):
        # sums of six products of numbers of order one, in float64
        torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-14)
