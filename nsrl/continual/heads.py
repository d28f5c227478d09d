"""Output layers: one for every task, or one for all with the classes that count."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsrl.continual.tasks import Task
from nsrl.errors import NsrlError
from nsrl.projection import JacobianError
from nsrl.projection.jacobians.capture import refuse_sample_mixing

#: Logit of a column that a narrower head does not have: no probability in any precision, and no NaN in a divergence.
ABSENT = -1e4


class MultiHead(nn.Module):
    """A trunk with one linear output layer a task: the task's identity is known at test time.

    Args:
        trunk: maps inputs to features (N, width).
        width: number of features.
        sizes: number of outputs of each head.
        bias: whether the heads have biases.
    """

    def __init__(self, trunk: nn.Module, width: int, sizes: Sequence[int], bias: bool = True):
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(width, size, bias) for size in sizes)

    def forward(self, inputs: Tensor, head: int | Tensor) -> Tensor:
        """Outputs of one head (N, its width), or of a head a sample (N, the widest).

        Args:
            inputs: for the trunk, samples first.
            head: index of a head, or one a sample, shape (N,); columns that a sample's head lacks are `ABSENT`.

        Raises:
            NsrlError: no such head.
        """
        wanted = [head] if isinstance(head, int) else sorted(set(head.tolist()))
        if not all(0 <= index < len(self.heads) for index in wanted):
            raise NsrlError(f"the model has heads 0 to {len(self.heads) - 1}, but head {wanted} was asked for")
        features = self.trunk(inputs)
        if isinstance(head, int):
            return self.heads[head](features)
        outputs = [self.heads[index](features) for index in wanted]
        widest = max(layer.out_features for layer in self.heads if isinstance(layer, nn.Linear))
        outputs = [F.pad(out, (0, gap), value=ABSENT) if (gap := widest - out.shape[1]) else out for out in outputs]
        stacked = torch.stack(outputs, 1)
        dense = wanted[-1] == len(wanted) - 1
        position = head if dense else torch.searchsorted(torch.tensor(wanted, device=head.device), head)
        return stacked.gather(1, position.view(-1, 1, 1).expand(-1, 1, widest)).squeeze(1)


def model_outputs(model: nn.Module, inputs: Any, head: int | Tensor | None) -> Tensor:
    """The model's outputs, (N, O), for a head, one a sample, or (None) for a model with one output layer.

    Raises:
        NsrlError: a head for a model without, or none for a model with heads.
    """
    if head is None:
        if isinstance(model, MultiHead):
            raise NsrlError("the model has a head for every task: give the task one (Task(..., head=0))")
        return model(inputs)
    if not isinstance(model, MultiHead):
        raise NsrlError(f"a task with a head needs a MultiHead model, not {type(model).__name__}")
    return model(inputs, head)


def only_classes(logits: Tensor, classes: Iterable[int]) -> Tensor:
    """Logits, (N, O), with minus infinity for every class that is not in `classes`."""
    counted = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    counted[list(classes)] = True
    return logits.masked_fill(~counted, -torch.inf)


@torch.no_grad()
def predictions(model: nn.Module, inputs: Tensor, task: Task, seen: Iterable[Task] = ()) -> Tensor:
    """The likeliest column of the task's outputs, shape (N,).

    Args:
        model: with the task's outputs.
        inputs: samples first.
        task: that the inputs are from. In the class-incremental scenario nothing of it is used.
        seen: class-incremental: the tasks learnt so far; a class of none of them is never predicted.
    """
    logits = model_outputs(model, inputs, task.head)
    if task.scenario == "class":
        known = {c for other in seen for c in other.classes or ()}
        logits = only_classes(logits, known) if known else logits
    return logits.argmax(-1)


def freeze_statistics(model: nn.Module) -> nn.Module:
    """Switch the model to eval mode: batch normalisation keeps its running statistics, gradients still flow."""
    return model.eval()


def refuse_moving_statistics(model: nn.Module) -> None:
    """Raise for batch normalisation or dropout in train mode: what is kept of a task would move by itself.

    Raises:
        NsrlError: the layer's name and what to do.
    """
    try:
        refuse_sample_mixing(model)
    except JacobianError as error:
        raise NsrlError(
            f"{error} (nsrl.continual.freeze_statistics(model) does, and keeps running statistics)"
        ) from None
