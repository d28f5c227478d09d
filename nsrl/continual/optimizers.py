"""The optimizer of a task, and weight decay that does not undo what is protected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nsrl.continual.heads import MultiHead
from nsrl.errors import NsrlError
from nsrl.projection.optimizer import StepHooks


@dataclass(frozen=True)
class OptimizerConfig:
    """How a task is trained; every task starts with a fresh optimizer, without the moments of the last one.

    Attributes:
        name: "adam" or "sgd".
        lr: learning rate.
        first_lr: learning rate of the first task, when nothing is protected yet; None: `lr`.
        head_lr: learning rate of the heads of a `MultiHead` model; None: that of the others.
        momentum: of SGD.
        weight_decay: decoupled (AdamW): every step moves the weights by lr * weight_decay towards `decay_to`.
        decay_to: "reference", the weights at the start of the task (zero in the first task): what is protected stays;
            or "zero": strategies that project, project the decay too, those with a penalty or a memory pull against it.
    """

    name: str = "adam"
    lr: float = 1e-3
    first_lr: float | None = None
    head_lr: float | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    decay_to: str = "reference"

    def __post_init__(self) -> None:
        if self.name not in ("adam", "sgd"):
            raise NsrlError(f"the optimizer must be adam or sgd, not {self.name!r}")
        if self.decay_to not in ("reference", "zero"):
            raise NsrlError(f"decay_to must be reference or zero, not {self.decay_to!r}")
        rates = [rate for rate in (self.lr, self.first_lr, self.head_lr) if rate is not None]
        if not all(rate > 0.0 for rate in rates) or self.weight_decay < 0.0 or not 0.0 <= self.momentum < 1.0:
            raise NsrlError(
                "learning rates must be positive, weight_decay not negative and momentum in [0, 1), but they are "
                f"{rates}, {self.weight_decay} and {self.momentum}"
            )

    def build(self, model: nn.Module, first: bool) -> torch.optim.Optimizer:
        """A fresh optimizer over the model's trainable parameters, decay included.

        Args:
            model: to train.
            first: whether this is the first task.

        Raises:
            NsrlError: the model has no trainable parameter.
        """
        rate = self.first_lr if first and self.first_lr is not None else self.lr
        heads = list(model.heads.parameters()) if isinstance(model, MultiHead) else []
        inside = {id(p) for p in heads}
        groups = [
            {"params": [p for p in model.parameters() if p.requires_grad and id(p) not in inside], "lr": rate},
            {"params": [p for p in heads if p.requires_grad], "lr": self.head_lr or rate},
        ]
        groups = [group for group in groups if group["params"]]
        if not groups:
            raise NsrlError("the model has no trainable parameter")
        optimizer: torch.optim.Optimizer
        if self.name == "adam":
            optimizer = torch.optim.Adam(groups, lr=rate)
        else:
            optimizer = torch.optim.SGD(groups, lr=rate, momentum=self.momentum)
        if self.weight_decay:
            _attach_decay(optimizer, self.weight_decay, self.decay_to == "reference" and not first)
        return optimizer


def is_plain_sgd(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is a multiple of the gradient: no momentum, no coupled decay."""
    return type(optimizer) is torch.optim.SGD and not any(
        group["momentum"] or group["weight_decay"] or group["maximize"] for group in optimizer.param_groups
    )


def _attach_decay(optimizer: torch.optim.Optimizer, weight_decay: float, to_reference: bool) -> None:
    """Decay in a step hook: constraints attached later see it as a part of the step."""
    groups = [group["params"] for group in optimizer.param_groups]
    targets = [[p.detach().clone() if to_reference else torch.zeros_like(p) for p in group] for group in groups]

    def decay() -> None:
        # groups that a strategy adds later have no decay
        for group, reference in zip(optimizer.param_groups, targets, strict=False):
            _move(group["params"], reference, group["lr"] * weight_decay)

    StepHooks(optimizer, after=decay)


@torch.no_grad()
def _move(parameters: Sequence[nn.Parameter], towards: Sequence[Tensor], share: float) -> None:
    for parameter, target in zip(parameters, towards, strict=True):
        # parameters without a gradient took no step, and decay is a part of the step
        if parameter.grad is not None:
            parameter.lerp_(target, share)
