"""Adam's step in one kernel on the optimizer's own state, without what `Optimizer.step` does around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

#: Settings that make another algorithm of Adam, or ask for another way to run it.
OTHERWISE = ("amsgrad", "maximize", "capturable", "differentiable", "decoupled_weight_decay")


def is_plain_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is Adam as SB3 makes it, on the CPU: one group, nothing about its step out of the ordinary.

    Step hooks are not asked for: whoever steps the kernel answers for them.
    """
    group = optimizer.param_groups[0]
    return (
        type(optimizer) is torch.optim.Adam
        and "step" not in vars(optimizer)  # learning-rate schedulers and scalers wrap it
        and len(optimizer.param_groups) == 1
        and not any(group.get(name, False) for name in OTHERWISE)
        and not any(isinstance(value, Tensor) for value in (group["lr"], *group["betas"]))
        and all(parameter.device.type == "cpu" for parameter in group["params"])
    )


class AdamStep:
    """Steps of plain Adam in some of its parameters; its state dict is what `Optimizer.step` would have made of it.

    On a small network `Optimizer.step` spends most of its time on bookkeeping.

    Args:
        optimizer: one that `is_plain_adam` accepts.
        parameters: those that may be moved.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]):
        (self._group,) = optimizer.param_groups
        self._state = optimizer.state
        self._parameters = list(parameters)
        self._ready: list[list[Tensor]] | None = None

    def __call__(self, gradients: Sequence[Tensor | None]) -> None:
        """Make one step.

        Args:
            gradients: one a parameter; those without are left alone, as `Optimizer.step` does.
        """
        if any(gradient is None for gradient in gradients):
            pairs = [(p, g) for p, g in zip(self._parameters, gradients, strict=True) if g is not None]
            if pairs:
                moved, given = (list(column) for column in zip(*pairs, strict=True))
                self._step(given, self._lists(moved))
            return
        if self._ready is None:
            self._ready = self._lists(self._parameters)
        self._step(list(gradients), self._ready)  # type: ignore[arg-type]

    @contextmanager
    def in_a_row(self, gradients: Sequence[Tensor]) -> Iterator[Callable[[], Any]]:
        """For many steps of all parameters, on gradients that are written into the same tensors each time.

        Args:
            gradients: one a parameter.

        Yields:
            A function that makes one step. The optimizer's own count of them is right behind the last one.
        """
        lists = self._lists(self._parameters)
        parameters, first, second, steps = lists
        if not hasattr(torch, "_fused_adam_") or not steps or any(float(step) != float(steps[0]) for step in steps):
            yield partial(self._step, list(gradients), lists)
            return
        count, given, settings = steps[0].clone(), list(gradients), self._settings()
        counts = [count] * len(steps)  # to count a dozen tensors takes longer than the step of a small network

        def step() -> None:
            count.add_(1)
            torch._fused_adam_(parameters, given, first, second, [], counts, **settings)

        try:
            yield step
        finally:
            torch._foreach_copy_(steps, counts)

    def _lists(self, parameters: Sequence[nn.Parameter]) -> list[list[Tensor]]:
        """Parameters, first and second moments and step counts, one of each a parameter."""
        for parameter in parameters:
            if not self._state[parameter]:
                self._state[parameter] = {
                    "step": torch.tensor(0.0, dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }
        states = [self._state[parameter] for parameter in parameters]
        return [list(parameters), *([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))]

    @torch.no_grad()
    def _step(self, gradients: list[Tensor], lists: list[list[Tensor]]) -> None:
        parameters, first, second, steps = lists
        settings = self._settings()
        if hasattr(torch, "_fused_adam_"):
            # `adam` counts the steps and groups tensors by device before it calls this.
            torch._foreach_add_(steps, 1)
            torch._fused_adam_(parameters, gradients, first, second, [], steps, **settings)
        else:
            adam(parameters, gradients, first, second, [], steps, fused=True, **settings)

    def _settings(self) -> dict[str, Any]:
        group = self._group
        beta1, beta2 = group["betas"]
        return {
            "lr": group["lr"],
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": group["weight_decay"],
            "eps": group["eps"],
            "amsgrad": False,
            "maximize": False,
        }
