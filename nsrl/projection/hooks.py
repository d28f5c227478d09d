"""Hooks: whether a network is more than what its modules' classes make of it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module

#: Where modules, parameters and torch itself keep what is called besides.
MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


def is_hooked(model: nn.Module) -> bool:
    """Whether a call of any module is more than its class's forward, or a gradient is looked at on its way."""
    return (
        any(getattr(torch_module, name, None) for name in GLOBAL_HOOKS)
        or any(getattr(module, name, None) for module in model.modules() for name in MODULE_HOOKS)
        or any("forward" in vars(module) for module in model.modules())
        or any(getattr(parameter, name, None) for parameter in model.parameters() for name in PARAMETER_HOOKS)
    )
