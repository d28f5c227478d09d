"""Adam's steps in one kernel against the optimizer's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nsrl.rl.algorithms.adam import AdamStep


def stepped(model: nn.Module, optimizer: torch.optim.Adam, *, in_a_row: bool, times: int = 3) -> None:
    parameters = list(model.parameters())
    gradients = [torch.empty_like(parameter) for parameter in parameters]
    adam, draw = AdamStep(optimizer, parameters), torch.Generator().manual_seed(0)

    def draws() -> None:
        for gradient in gradients:
            gradient.normal_(generator=draw)

    if not in_a_row:
        for _ in range(times):
            draws()
            adam(gradients)
        return
    with torch.no_grad(), adam.in_a_row(gradients) as step:
        for _ in range(times):
            draws()
            step()


def states(optimizer: torch.optim.Adam) -> list[torch.Tensor]:
    return [value for state in optimizer.state_dict()["state"].values() for value in state.values()]


@pytest.mark.parametrize("uneven", [False, True])
def test_many_in_a_row_are_as_many_one_by_one(uneven: bool) -> None:
    """With the same counts, and where one parameter has been stepped more often than the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 11), nn.Linear(11, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-5, weight_decay=0.1)
    if uneven:
        model[0].bias.grad = torch.ones_like(model[0].bias)
        optimizer.step()
    one, other = copy.deepcopy((model, optimizer)), (model, optimizer)
    for _ in range(2):
        stepped(*one, in_a_row=False)
        stepped(*other, in_a_row=True)
    for found, wanted in zip(other[0].parameters(), one[0].parameters(), strict=True):
        assert torch.equal(found, wanted)
    assert all(torch.equal(*pair) for pair in zip(states(other[1]), states(one[1]), strict=True))
    counts = [state["step"] for state in other[1].state.values()]
    assert len({count.data_ptr() for count in counts}) == len(counts), "each parameter has a count of its own"


def test_an_exception_on_the_way_leaves_the_steps_counted() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    gradients = [torch.ones_like(parameter) for parameter in model.parameters()]
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        with AdamStep(optimizer, list(model.parameters())).in_a_row(gradients) as step:
            step()
            step()
            raise KeyboardInterrupt
    assert [float(state["step"]) for state in optimizer.state.values()] == [2.0, 2.0]
