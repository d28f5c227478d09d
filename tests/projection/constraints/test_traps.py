"""Facts that cost others dearly (DESIGN, section 6), each as a small deterministic experiment."""

import pytest
import torch
from torch import Tensor, nn

from nsrl.projection import SpectralProjection, jacobian
from nsrl.projection.metrics import Bernoulli, Categorical, Gaussian
from nsrl.projection.optimizer import FlatParameters
from tests.projection.builders import matrix_jacobian, mlp, normal

STATES = 12
METRICS = {
    "categorical": Categorical((3,), 0.0),
    "bernoulli": Bernoulli(0.0),
    "gaussian": Gaussian(torch.zeros(3).double(), torch.zeros(3).double()),
}


def policy():
    torch.manual_seed(0)
    net, states = mlp(4, 16, 3).double(), normal(STATES, 4)
    return net, states, net(states).detach(), FlatParameters(list(net.parameters()))


@pytest.mark.parametrize("name", METRICS)
def test_the_gradient_of_the_divergence_constrains_nothing(name):
    """Trap 1: grad KL(ref || pi) is zero at ref; the per-sample whitened rows are what has to stay."""
    metric = METRICS[name]
    net, states, reference, flat = policy()
    proposal = 0.1 * normal(len(flat.read()), seed=3)
    anchor = flat.read()

    def divergence() -> Tensor:
        return metric.divergence(reference, net(states)).mean()

    divergence().backward()
    naive = flat.gradient()
    assert float(naive.norm()) < 1e-14

    rows = jacobian(net, states, seed=metric.seeds, scale=STATES**-0.5)
    projection = SpectralProjection(rows, torch.zeros(rows.shape[0]).double(), 0.0)
    assert float(rows.dense().norm()) > 0.1 and projection.spectrum.rank >= STATES

    free = SpectralProjection(matrix_jacobian(naive.unsqueeze(0)), torch.zeros(1).double(), 0.0).null(proposal)
    measured = []
    for displacement in (free, projection.null(proposal)):
        flat.write(anchor + displacement)
        measured.append(float(divergence().detach()))
    assert measured[0] > 0.01 and measured[1] < 0.05 * measured[0]


def two_states(gap: float) -> tuple[nn.Linear, Tensor, Tensor]:
    """A linear policy over two one-hot states: undecided on the first, saturated by `gap` on the second."""
    net = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0, gap], [0.0, 0.0]]))
    states = torch.eye(2).double()
    return net, states, net(states).detach()


@pytest.mark.parametrize("gap", [12.0, 20.0, 40.0])
@pytest.mark.parametrize("budget", [1e-2, 1e-3])
def test_saturated_softmax_lets_actions_flip(gap, budget):
    """Trap 3: without tempering, the model sees no KL in a step that swaps the saturated action."""
    flip = torch.tensor([0.0, -gap, 0.0, gap]).double()
    outcomes = {}
    for tempering in (0.0, 0.01):
        net, states, reference = two_states(gap)
        metric, flat = Categorical((2,), tempering), FlatParameters(list(net.parameters()))
        rows = jacobian(net, states, seed=metric.seeds, scale=2**-0.5)
        result = SpectralProjection(rows, torch.zeros(2).double(), 0.0).project(flip, budget)
        assert result.predicted <= budget * (1 + 1e-9)
        flat.write(flat.read() + result.displacement)
        outputs = net(states).detach()
        measured = float(metric.divergence(reference, outputs).mean())
        outcomes[tempering] = metric.agreement(reference, outputs), measured / budget
    assert outcomes[0.0][0] == 0.5 and outcomes[0.0][1] > 100  # the promise is broken by far
    assert outcomes[0.01][0] == 1.0 and outcomes[0.01][1] < 1


def test_tempering_keeps_the_null_space_of_an_undecided_state():
    """Tempering must not protect what the softmax does not see: a common shift of all logits stays free."""
    net, states, _ = two_states(20.0)
    rows = jacobian(net, states, seed=Categorical((2,), 0.01).seeds, scale=2**-0.5)
    shift = torch.ones(4).double()
    result = SpectralProjection(rows, torch.zeros(2).double(), 0.0).project(shift, 1e-6)
    assert result.kept == pytest.approx(1.0)


def test_first_order_protection_decays_with_the_square_of_the_path():
    """Trap 10: in the hard null space the KL grows with the fourth power of the step, the outputs with the second."""
    net, states, reference, flat = policy()
    metric, anchor = METRICS["categorical"], flat.read()
    rows = jacobian(net, states, seed=metric.seeds, scale=STATES**-0.5)
    direction = SpectralProjection(rows, torch.zeros(rows.shape[0]).double(), 0.0).null(normal(len(anchor), seed=3))
    values = []
    for length in (0.02, 0.04):
        flat.write(anchor + length * direction)
        values.append(float(metric.divergence(reference, net(states)).mean().detach()))
    assert 12 < values[1] / values[0] < 20
