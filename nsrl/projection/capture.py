"""Capture: how the factors of a Jacobian are obtained.

Forward hooks keep the input A of every linear layer; ordinary `torch.autograd.grad` with respect to the *layer outputs*
gives the gradients G. No forward-mode differentiation and no gradient with respect to a weight is taken, so flash
attention, checkpointing and custom kernels do not matter. Layers without a factored form fall back to `vmap(vjp)` of
the layer; parameters that no hook can see fall back to `vmap(vjp)` of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from nsrl.projection.blocks import Block, DenseBlock, LinearBlock

Forward = Callable[[nn.Module, Any], Tensor]


class JacobianError(RuntimeError):
    """The module has no well-defined per-sample Jacobian, or its factors could not be captured."""


@dataclass
class Usage:
    """One call of a layer: its input (detached), its output (in the graph) and the input's version at the call."""

    layer: nn.Module
    input: Tensor
    output: Tensor
    version: int
    grad: Tensor | None = field(default=None)

    @property
    def gradient(self) -> Tensor:
        """Derivative of the seeded outputs in the layer's output, (N, R, *output shape)."""
        assert self.grad is not None, "_differentiate fills this in"
        return self.grad


def refuse_sample_mixing(module: nn.Module) -> None:
    """Raise for modules in a mode where a row of the output is not a function of its own sample alone.

    Raises:
        JacobianError: batch normalisation or dropout in train mode.
    """
    for name, child in module.named_modules():
        is_batch_norm = isinstance(child, nn.modules.batchnorm._BatchNorm)
        if is_batch_norm and child.running_mean is None:
            raise JacobianError(
                f"{name or type(child).__name__}: batch normalisation without running statistics mixes the samples of "
                "a batch in eval mode too, so there is no per-sample Jacobian"
            )
        if not child.training:
            continue
        if is_batch_norm:
            raise JacobianError(
                f"{name or type(child).__name__}: batch normalisation in train mode mixes the samples of a batch, so "
                "there is no per-sample Jacobian; call module.eval() first"
            )
        if isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0:
            raise JacobianError(
                f"{name or type(child).__name__}: dropout in train mode makes the outputs random; call "
                "module.eval() first"
            )


def capture_blocks(
    module: nn.Module,
    inputs: Any,
    forward: Forward,
    columns: Mapping[str, tuple[int, int]],
    seed: Callable[[Tensor], Tensor] | None,
    dense: frozenset[str] = frozenset(),
) -> tuple[list[Block], Tensor, Tensor]:
    """Run the module once and return its blocks, its outputs (N, O) in the graph, and the seeds S (N, R, O).

    Args:
        columns: start and stop of every wanted parameter in the flat vector, by name.
        seed: maps the detached outputs to S, whose rows are the output combinations to differentiate; None means the
            identity.
        dense: parameters that must not go through hooks (used outside their own layer).
    """
    owners = _owners(module, columns, dense)
    usages: list[Usage] = []
    handles = [layer.register_forward_hook(_recorder(usages)) for layer in owners]
    try:
        with torch.enable_grad():
            outputs = forward(module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    _check_outputs(outputs)
    for usage in usages:
        if usage.input._version != usage.version:
            raise JacobianError(
                f"an in-place operation overwrote the input of a {type(usage.layer).__name__} after it was used; "
                "replace it by its out-of-place form"
            )
    samples = outputs.shape[0]
    if seed is None:
        seeds = torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device).expand(samples, -1, -1)
    else:
        seeds = seed(outputs.detach())
    usages = [usage for usage in usages if usage.output.requires_grad and usage.output.shape[0] == samples]
    _differentiate(outputs, seeds, usages)
    blocks: list[Block] = []
    covered: set[str] = set()
    for layer, names in owners.items():
        used = [usage for usage in usages if usage.layer is layer]
        if used:
            try:
                blocks += _layer_blocks(layer, names, used, columns)
            except RuntimeError:  # vmap cannot follow every layer; the whole-model path below can
                continue
            covered.update(names.values())
    free = _reached(module, outputs, [name for name in columns if name not in covered])
    if free:
        try:
            blocks += _free_blocks(module, inputs, forward, free, columns, seeds)
        except RuntimeError:
            blocks += _row_by_row(module, outputs, free, columns, seeds)
    return blocks, outputs, seeds


def _check_outputs(outputs: Any) -> None:
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise JacobianError(f"the outputs must be one tensor of shape (samples, outputs), not {found}")
    if not outputs.numel():
        raise JacobianError(
            f"there are no samples or no outputs to linearise: the outputs have shape {tuple(outputs.shape)}"
        )
    if not outputs.requires_grad:
        raise JacobianError("the outputs do not depend on any trainable parameter, or were computed without gradients")
    if not bool(torch.isfinite(outputs).all()):
        raise JacobianError("the outputs have NaN or infinite entries; the model has diverged or its input is bad")


def _reached(module: nn.Module, outputs: Tensor, names: list[str]) -> list[str]:
    """Those of the parameters that the outputs depend on; the others' columns are zero and cost nothing."""
    if not names:
        return []
    parameters = dict(module.named_parameters())
    grads = torch.autograd.grad(
        outputs.sum(), [parameters[name] for name in names], retain_graph=True, allow_unused=True
    )
    return [name for name, grad in zip(names, grads, strict=True) if grad is not None]


def _owners(
    module: nn.Module, columns: Mapping[str, tuple[int, int]], dense: frozenset[str]
) -> dict[nn.Module, dict[str, str]]:
    """Layers to hook, each with {local parameter name: full name}; leaf modules only, every parameter once."""
    full_names = {parameter: name for name, parameter in module.named_parameters()}
    claimed: dict[nn.Parameter, nn.Module] = {}
    shared: set[nn.Parameter] = set()
    owners: dict[nn.Module, dict[str, str]] = {}
    for layer in module.modules():
        local = {
            name: full_names[parameter]
            for name, parameter in layer.named_parameters(recurse=False, remove_duplicate=False)
            if parameter in full_names and full_names[parameter] in columns and full_names[parameter] not in dense
        }
        if not local or next(layer.children(), None) is not None:
            continue
        owners[layer] = local
        for parameter in layer.parameters(recurse=False):
            if claimed.setdefault(parameter, layer) is not layer:
                shared.add(parameter)
    # A parameter tied between two layers has cross terms that per-layer factors miss: the whole-model path sees them.
    if shared:
        tied = {full_names[parameter] for parameter in shared}
        owners = {layer: {k: v for k, v in names.items() if v not in tied} for layer, names in owners.items()}
    return {layer: names for layer, names in owners.items() if names}


def _recorder(usages: list[Usage]) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    def record(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
            return None
        usages.append(Usage(layer, args[0].detach(), output, args[0]._version))
        # The clone keeps an in-place activation from overwriting the output that is differentiated.
        return output.clone() if output.requires_grad else None

    return record


def _differentiate(outputs: Tensor, seeds: Tensor, usages: list[Usage]) -> None:
    """Fill in `grad`, shape (N, R, *output shape): one backward pass a row of S, all samples at once."""
    if not usages:
        return
    targets = [usage.output for usage in usages]
    stacks: list[list[Tensor]] = [[] for _ in targets]
    rows = seeds.shape[1]
    for row in range(rows):
        grads = torch.autograd.grad(outputs, targets, seeds[:, row], retain_graph=True, allow_unused=True)
        for stack, grad, target in zip(stacks, grads, targets, strict=True):
            stack.append(torch.zeros_like(target) if grad is None else grad)
    for usage, stack in zip(usages, stacks, strict=True):
        usage.grad = torch.stack(stack, 1)


def _layer_blocks(
    layer: nn.Module, names: dict[str, str], used: list[Usage], columns: Mapping[str, tuple[int, int]]
) -> list[Block]:
    weight = columns[names["weight"]] if "weight" in names else None
    bias = columns[names["bias"]] if "bias" in names else None
    if type(layer) is nn.Linear:
        return [_linear_block(used, weight, bias)]
    if type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros" and layer.padding != "same":
        unfolded = [_unfold(layer, usage) for usage in used]
        return [_linear_block(unfolded, weight, bias)]
    total: dict[str, Tensor] = {}
    for usage in used:
        for name, value in _layer_rows(layer, tuple(names), usage).items():
            total[name] = total[name] + value if name in total else value
    return [DenseBlock(value.flatten(2), columns[names[name]]) for name, value in total.items()]


def _linear_block(used: list[Usage], weight: tuple[int, int] | None, bias: tuple[int, int] | None) -> LinearBlock:
    # Positions: everything between the sample axis and the feature axis, and repeated uses of the layer.
    inputs = torch.cat([_positions(usage.input, 1) for usage in used], 1)
    grads = torch.cat([_positions(usage.gradient, 2) for usage in used], 2)
    if bias is not None:
        ones = torch.ones_like(inputs[..., :1])
        inputs = torch.cat([inputs, ones], -1) if weight is not None else ones
    return LinearBlock(inputs, grads, weight, bias)


def _positions(tensor: Tensor, axis: int) -> Tensor:
    """One axis of positions before the feature axis, whatever lies between the leading axes and it."""
    return tensor.flatten(axis, -2) if tensor.dim() > axis + 1 else tensor.unsqueeze(axis)


def _unfold(layer: nn.Conv2d, usage: Usage) -> Usage:
    """A convolution as a linear layer over its patches (one position an output pixel)."""
    padding: Any = 0 if layer.padding == "valid" else layer.padding
    patches = nn.functional.unfold(
        usage.input, layer.kernel_size, dilation=layer.dilation, padding=padding, stride=layer.stride
    )
    grad = usage.gradient.flatten(3).transpose(2, 3)
    return Usage(layer, patches.transpose(1, 2), usage.output, usage.version, grad)


def _layer_rows(layer: nn.Module, names: tuple[str, ...], usage: Usage) -> dict[str, Tensor]:
    """Per-sample rows (N, R, *parameter shape) of any layer, by `vmap(vjp)` of the layer alone."""
    constants = {name: value.detach() for name, value in layer.named_parameters()}
    constants |= dict(layer.named_buffers())
    wanted = {name: constants.pop(name) for name in names}

    def pull(sample: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        def call(values: dict[str, Tensor]) -> Tensor:
            return functional_call(layer, constants | values, (sample.unsqueeze(0),)).squeeze(0)

        return vjp(call, wanted)[1](cotangent)[0]

    return vmap(vmap(pull, (None, 0)), (0, 0))(usage.input, usage.gradient)


class _Bound(nn.Module):
    """A module whose forward is a given function of another module: lets `functional_call` swap the parameters."""

    def __init__(self, module: nn.Module, forward: Forward):
        super().__init__()
        self.module = module
        self.function = forward

    def forward(self, inputs: Any) -> Tensor:
        return self.function(self.module, inputs)


def _free_blocks(
    module: nn.Module,
    inputs: Any,
    forward: Forward,
    names: list[str],
    columns: Mapping[str, tuple[int, int]],
    seeds: Tensor,
) -> list[Block]:
    """Dense columns for parameters that no hook covers, by `vmap(vjp)` of the whole model."""
    bound = _Bound(module, forward)
    parameters = dict(module.named_parameters())
    wanted = {f"module.{name}": parameters[name].detach() for name in names}

    def pull(sample: Any, cotangents: Tensor) -> dict[str, Tensor]:
        batch = torch.utils._pytree.tree_map(lambda leaf: leaf.unsqueeze(0), sample)

        def call(values: dict[str, Tensor]) -> Tensor:
            return functional_call(bound, values, (batch,)).squeeze(0)

        back = vjp(call, wanted)[1]
        return vmap(lambda cotangent: back(cotangent)[0])(cotangents)

    held = [(owner, dict(owner._parameters)) for owner in bound.modules()]
    try:
        rows = vmap(pull)(inputs, seeds)
    finally:
        # functional_call leaves its substitutes behind in submodules that have two names (torch 2.13).
        for owner, own in held:
            owner._parameters.clear()
            owner._parameters.update(own)
    return [
        DenseBlock(rows[f"module.{name}"].detach().flatten(2), columns[name])
        for name in names
        if bool(rows[f"module.{name}"].any())
    ]


def _row_by_row(
    module: nn.Module, outputs: Tensor, names: list[str], columns: Mapping[str, tuple[int, int]], seeds: Tensor
) -> list[Block]:
    """Dense columns by one backward pass a row: for recurrent layers and whatever else vmap cannot follow."""
    parameters = dict(module.named_parameters())
    wanted = [parameters[name] for name in names]
    samples, rows = seeds.shape[:2]
    values = [outputs.new_zeros(samples, rows, parameter.numel()) for parameter in wanted]
    for sample in range(samples):
        for row in range(rows):
            cotangent = torch.zeros_like(outputs)
            cotangent[sample] = seeds[sample, row]
            grads = torch.autograd.grad(outputs, wanted, cotangent, retain_graph=True)
            for value, grad in zip(values, grads, strict=True):
                value[sample, row] = grad.flatten()
    return [DenseBlock(value, columns[name]) for name, value in zip(names, values, strict=True)]
