"""Attaching to any `torch.optim.Optimizer`: what it *does* is projected, not only what it is given.

Adam's scaling, momentum and weight decay leave any subspace that the gradient was projected onto, so the hook acts
after the step, on the realised parameters. Everything goes through the optimizer's own step hooks: no subclass, no
change to the training loop, nothing in the optimizer's state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


class FlatParameters:
    """A list of parameters seen as one vector.

    Args:
        parameters: in the order of the Jacobian's columns.

    Raises:
        ValueError: one lies in pieces on several processes, whose vector would be theirs, not this one's.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = list(parameters)
        sharded = [tuple(p.shape) for p in self.parameters if hasattr(p, "full_tensor")]
        if sharded:
            raise ValueError(
                f"a parameter of shape {sharded[0]} is sharded (a DTensor, as of FSDP2), and makes no vector here: "
                "train with DistributedDataParallel, or protect adapters that are left whole (docs/distributed.md)"
            )
        self.sizes = [p.numel() for p in self.parameters]

    def read(self) -> Tensor:
        """Copy of the current values, shape (P,)."""
        return torch.cat([p.detach().flatten() for p in self.parameters])

    @torch.no_grad()
    def write(self, vector: Tensor) -> None:
        """Set the values from a flat vector (P,)."""
        torch._foreach_copy_([p.data for p in self.parameters], self._split(vector))

    def gradient(self) -> Tensor:
        """Copy of the gradients, zeros where there is none, shape (P,)."""
        return torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in self.parameters]
        )

    @torch.no_grad()
    def add_gradients(self, pieces: Sequence[Tensor], factor: float = 1.0) -> None:
        """Add factor times one tensor a parameter to the gradients."""
        gradients = []
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            gradients.append(p.grad)
        torch._foreach_add_(gradients, list(pieces), alpha=factor)

    @torch.no_grad()
    def set_gradient(self, vector: Tensor) -> None:
        """Replace the gradients by a flat vector."""
        for p, piece in zip(self.parameters, self._split(vector), strict=True):
            p.grad = piece.clone()

    def scale_of(self, optimizer: torch.optim.Optimizer, eps: float = 1e-8) -> Tensor | None:
        """V^{1/2} of Adam-like optimizers, V = 1 / (sqrt(v) + eps), shape (P,), mean 1; None when there is no v yet."""
        pieces = []
        for p in self.parameters:
            state = optimizer.state.get(p, {})
            second = state.get("exp_avg_sq", state.get("square_avg"))
            if second is None:
                return None
            pieces.append(second.flatten())
        second = torch.cat(pieces)
        # Parameters that hardly ever got a gradient would get an enormous step size: bound the spread of V.
        root = second.sqrt()
        scale = (root + eps + 1e-2 * root.mean()).rsqrt()
        return scale / scale.mean()

    def _split(self, vector: Tensor) -> list[Tensor]:
        pieces = vector.split(self.sizes)
        return [piece.view_as(p) for piece, p in zip(pieces, self.parameters, strict=True)]


class StepHooks:
    """Calls `before` ahead of and `after` behind every step of an optimizer, until detached.

    `before` may edit gradients; `after` may edit parameters.

    Attributes:
        before, after: the two, or None; for a caller who steps the optimizer without its `step`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        before: Callable[[], Any] | None = None,
        after: Callable[[], Any] | None = None,
    ):
        self._optimizer = optimizer
        self.before, self.after = before, after
        self._handles = []
        if before is not None:
            self._handles.append(optimizer.register_step_pre_hook(lambda *_: _discard(before())))
        if after is not None:
            self._handles.append(optimizer.register_step_post_hook(lambda *_: _discard(after())))

    @property
    def alone(self) -> bool:
        """Whether nobody else has a step hook, on this optimizer or on all of them."""
        own: Any = self._optimizer
        theirs = len(own._optimizer_step_pre_hooks) + len(own._optimizer_step_post_hooks)
        return theirs == len(self._handles) and not (_global_optimizer_pre_hooks or _global_optimizer_post_hooks)

    def detach(self) -> None:
        """Remove both hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _discard(_: Any) -> None:
    """Pre-hooks that return something replace the optimizer's arguments."""
