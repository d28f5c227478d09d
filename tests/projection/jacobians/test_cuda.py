"""The core on a CUDA device, where there is one: the same numbers as on the CPU, with TF32 switched on around it."""

import pytest
import torch
from torch.utils._pytree import tree_map

from nsrl.projection import SpectralProjection, jacobian
from tests.projection.architecture import Architecture
from tests.projection.architectures import ARCHITECTURES
from tests.projection.builders import mlp, normal, single

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]


@pytest.fixture(autouse=True)
def tf32_wanted_by_the_user(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)


def near(actual: torch.Tensor, expected: torch.Tensor, share: float) -> None:
    assert float((actual.cpu().double() - expected).norm()) <= share * float(expected.norm())


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_every_architecture(architecture: Architecture):
    torch.manual_seed(0)
    module, inputs = architecture.build().double(), architecture.inputs(4, 1)
    expected = architecture.oracle(module, inputs)
    vector, rows = normal(expected.shape[1], seed=5), normal(expected.shape[0], seed=6)
    for dtype, share in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        there = tree_map(lambda leaf: leaf.cuda(), single(inputs) if dtype == torch.float32 else inputs)
        result = jacobian(module.to("cuda", dtype), there)
        near(result.dense(), expected, share)
        near(result.gram(), expected @ expected.T, share)
        near(result.matvec(vector.cuda()), expected @ vector, share)
        near(result.rmatvec(rows.cuda()), expected.T @ rows, share)


def test_projection_keeps_its_residual_under_tf32():
    torch.manual_seed(0)
    module, inputs = mlp(32, 256, 256, 256, 8).cuda(), torch.randn(64, 32, device="cuda")
    linearised = jacobian(module, inputs)
    solver = SpectralProjection(linearised, torch.zeros(linearised.shape[0], device="cuda"), 0.0)
    proposal = torch.randn(linearised.shape[1], device="cuda")
    left = linearised.matvec(solver.null(proposal)).norm() / (linearised.matvec(proposal).norm())
    assert float(left) <= 1e-6
