"""What evaluating a module would leave behind in it, put back; and what would stand between it and its derivative."""

from __future__ import annotations

import sys
from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


@contextmanager
def own_state(module: nn.Module) -> Iterator[None]:
    """After the block every submodule has the parameters, buffers and attributes that it had before.

    `functional_call` leaves its substitutes behind in submodules that have two names (torch 2.13), as every SB3
    policy's features extractor has, and a forward that stores a tensor (old-style weight norm does) stores one of
    `vmap`'s, which is dead outside.
    """
    places = [own for owner in module.modules() for own in (vars(owner), owner._parameters, owner._buffers)]
    held = [(own, dict(own.items())) for own in places]
    try:
        yield
    finally:
        for own, before in held:
            _put_back(own, before)


def _put_back(own: MutableMapping[str, Any], before: dict[str, Any]) -> None:
    # Only what has changed: the mappings of a scripted module cannot be written.
    if own.keys() != before.keys() or any(own[name] is not value for name, value in before.items()):
        own.clear()
        own.update(before)


def _eager() -> AbstractContextManager[Any]:
    # torch 2.6 and later; importing the compiler takes seconds, and who has not done so has compiled nothing
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


@contextmanager
def differentiable(module: nn.Module) -> Iterator[None]:
    """Within the block gradients are on, inference mode and compilation off, and hooks of parameters change nothing.

    A hook that clips or masks a parameter's gradient is part of somebody's training, not of the derivative. Compiled
    code calls no hooks of layers and can be differentiated once only.
    """
    hooked = [(p, p._backward_hooks) for p in module.parameters() if p._backward_hooks]
    with torch.inference_mode(False), torch.enable_grad(), _eager():
        for parameter, _ in hooked:
            parameter._backward_hooks = None
        try:
            yield
        finally:
            for parameter, hooks in hooked:
                parameter._backward_hooks = hooks
