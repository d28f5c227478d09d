"""Heads: one a task or one a sample, masking, and the modes that are refused."""

import pytest
import torch
from torch import nn

from nsrl.continual import MultiHead, Task, freeze_statistics, model_outputs, predictions
from nsrl.continual.heads import ABSENT, only_classes, refuse_moving_statistics
from nsrl.errors import NsrlError


def _model() -> MultiHead:
    return MultiHead(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), 6, [2, 3, 2])


def test_a_head_a_sample_is_each_sample_through_its_own_head():
    model, inputs, heads = _model(), torch.randn(5, 4), torch.tensor([2, 0, 1, 2, 1])
    outputs = model(inputs, heads)
    assert outputs.shape == (5, 3)
    for row, x, head in zip(outputs, inputs, heads.tolist(), strict=True):
        alone = model(x[None], head)[0]
        assert torch.allclose(row[: len(alone)], alone)
        assert (row[len(alone) :] == ABSENT).all()


def test_only_the_heads_in_the_batch_get_a_gradient():
    model = _model()
    model(torch.randn(3, 4), torch.tensor([0, 2, 0])).softmax(1)[:, 0].sum().backward()
    assert model.heads[1].weight.grad is None and model.heads[0].weight.grad.abs().sum() > 0


def test_a_missing_or_needless_head_is_told():
    with pytest.raises(NsrlError, match="heads 0 to 2"):
        _model()(torch.zeros(1, 4), 3)
    with pytest.raises(NsrlError, match="give the task one"):
        model_outputs(_model(), torch.zeros(1, 4), None)
    with pytest.raises(NsrlError, match="needs a MultiHead model, not Linear"):
        model_outputs(nn.Linear(4, 2), torch.zeros(1, 4), 0)


def test_scenarios():
    assert [Task("a", 0).scenario, Task("a", 0, (0, 1)).scenario, Task("a", 0, (0, 1), 0).scenario] == [
        "domain",
        "class",
        "task",
    ]


def test_class_incremental_predictions_are_among_the_seen_classes():
    model = nn.Linear(4, 6)
    first, second = Task("a", 0, (0, 3)), Task("b", 1, (1, 4))
    inputs = torch.randn(200, 4)
    assert set(predictions(model, inputs, first, [first]).tolist()) <= {0, 3}
    among = predictions(model, inputs, first, [first, second])
    assert torch.equal(among, only_classes(model(inputs), [0, 1, 3, 4]).argmax(-1))
    assert torch.equal(predictions(model, inputs, Task("d", 0)), model(inputs).argmax(-1))


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.Dropout(0.5)])
def test_moving_statistics_are_refused_until_frozen(layer):
    model = nn.Sequential(nn.Linear(4, 4), layer)
    with pytest.raises(NsrlError, match=r"train mode.*freeze_statistics"):
        refuse_moving_statistics(model)
    refuse_moving_statistics(freeze_statistics(model))
