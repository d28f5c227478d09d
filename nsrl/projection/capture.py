"""Capture: how the factors of a Jacobian are obtained.

Forward hooks keep the input A of every layer; ordinary `torch.autograd.grad` with respect to the *layer outputs*
gives the gradients G. No forward-mode differentiation and no gradient with respect to a weight is taken, so flash
attention, checkpointing and custom kernels do not matter. Parameters that no hook can see fall back to `vmap(vjp)` of
the whole model, and, where vmap cannot follow (recurrent layers), to one backward pass a row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nsrl.projection.attention import Projections, shown
from nsrl.projection.blocks import Block, Range
from nsrl.projection.fallback import Forward, free_blocks, row_by_row
from nsrl.projection.layers import Site, Usage, find_builder, shares_columns

#: Precisions in which a Jacobian means something.
EXACT = (torch.float32, torch.float64)


class JacobianError(RuntimeError):
    """The module has no well-defined per-sample Jacobian, or its factors could not be captured."""


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
    columns: Mapping[str, Range],
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
    watched = {name: place for name, place in columns.items() if name not in dense}
    sites, attentions = _sites(module, watched)
    handles = [site.layer.register_forward_hook(_recorder(site), with_kwargs=True) for site in sites]
    try:
        with torch.enable_grad(), shown(attentions):
            outputs = forward(module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    _check_outputs(outputs)
    sites += [site for attention in attentions for site in attention.sites.values()]
    samples = outputs.shape[0]
    for site in sites:
        _refuse_overwritten(site)
        _refuse_reduced(site)
        site.usages = [u for u in site.usages if u.output.requires_grad and u.output.shape[0] == samples]
    if seed is None:
        seeds = torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device).expand(samples, -1, -1)
    else:
        seeds = seed(outputs.detach())
    _differentiate(outputs, seeds, [usage for site in sites for usage in site.usages])
    names = {place: name for name, place in columns.items()}
    blocks: list[Block] = []
    covered: set[str] = set()
    for site in sites:
        if site.usages:
            try:
                blocks += site.blocks()
            except RuntimeError:  # vmap cannot follow every layer; the whole-model path below can
                continue
            covered.update(names[place] for place in site.columns.values() if place in names)
    for attention in attentions:
        if attention.sites:
            covered.update(names[attention.columns[local]] for local in attention.names)
    free = _reached(module, outputs, [name for name in columns if name not in covered])
    if free:
        try:
            blocks += free_blocks(module, inputs, forward, free, columns, seeds)
        except RuntimeError:
            blocks += row_by_row(module, outputs, free, columns, seeds)
    return blocks, outputs, seeds


def _check_outputs(outputs: Any) -> None:
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise JacobianError(f"the outputs must be one tensor of shape (samples, outputs), not {found}")
    if not outputs.numel():
        raise JacobianError(
            f"there are no samples or no outputs to linearise: the outputs have shape {tuple(outputs.shape)}"
        )
    if outputs.dtype not in EXACT:
        raise JacobianError(
            f"the outputs are {outputs.dtype}, whose Jacobian would be rounded to three digits; linearise a float32 "
            "copy of the module: copy.deepcopy(module).float()"
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


def _refuse_reduced(site: Site) -> None:
    for usage in site.usages:
        if usage.output.dtype not in EXACT:
            raise JacobianError(
                f"a {type(site.layer).__name__} computes in {usage.output.dtype}, whose Jacobian would be rounded to "
                "three digits; linearise a float32 copy of the module, without an autocast of its own"
            )


def _refuse_overwritten(site: Site) -> None:
    for usage in site.usages:
        if usage.input._version != usage.version:
            raise JacobianError(
                f"an in-place operation overwrote the input of a {type(site.layer).__name__} after it was used; "
                "replace it by its out-of-place form"
            )


def _sites(module: nn.Module, columns: Mapping[str, Range]) -> tuple[list[Site], list[Projections]]:
    """Layers to hook and attention modules to open up, every parameter at every layer that holds it."""
    full_names = {parameter: name for name, parameter in module.named_parameters()}
    opened: set[nn.Module] = set()
    holders: dict[str, list[nn.Module]] = defaultdict(list)
    found: list[tuple[nn.Module, dict[str, str]]] = []
    for layer in module.modules():
        whole = type(layer) is nn.MultiheadAttention or parametrize.is_parametrized(layer)
        if layer in opened or (next(layer.children(), None) is not None and not whole):
            continue
        if whole:
            opened.update(layer.modules())
        local = {
            name: full_names[parameter]
            for name, parameter in layer.named_parameters(recurse=whole, remove_duplicate=False)
            if full_names.get(parameter) in columns
        }
        if local:
            found.append((layer, local))
            for name in set(local.values()):
                holders[name].append(layer)
    # A tied parameter has cross terms between its layers. Factored blocks find theirs; the others leave the parameter
    # to the whole-model path.
    left = {name for name, layers in holders.items() if len(layers) > 1 and not all(map(shares_columns, layers))}
    left |= {name for _, local in found for name in local.values() if list(local.values()).count(name) > 1}
    sites, attentions = [], []
    for layer, local in found:
        kept = {name: columns[full] for name, full in local.items() if full not in left}
        if isinstance(layer, nn.MultiheadAttention) and not parametrize.is_parametrized(layer):
            attentions.append(Projections(layer, kept))
        elif kept:
            sites.append(Site(layer, kept, find_builder(layer)))
    return sites, attentions


def _recorder(site: Site) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]:
    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = args if not kwargs else (*args, kwargs.get("input")) if set(kwargs) == {"input"} else ()
        if len(given) != 1 or not isinstance(given[0], Tensor) or not isinstance(output, Tensor):
            return None
        site.usages.append(Usage(given[0].detach(), output, given[0]._version))
        # The clone keeps an in-place activation from overwriting the output that is differentiated.
        return output.clone() if output.requires_grad else None

    return record


def _differentiate(outputs: Tensor, seeds: Tensor, usages: list[Usage]) -> None:
    """Fill in `grad`, shape (N, R, *output shape): one backward pass a row of S, all samples at once."""
    if not usages:
        return
    targets = [usage.output for usage in usages]
    rows = seeds.shape[1]
    stacks = [target.new_zeros(target.shape[0], rows, *target.shape[1:]) for target in targets]
    for row in range(rows):
        grads = torch.autograd.grad(outputs, targets, seeds[:, row], retain_graph=True, allow_unused=True)
        for stack, grad in zip(stacks, grads, strict=True):
            if grad is not None:
                stack[:, row] = grad
    for usage, stack in zip(usages, stacks, strict=True):
        usage.grad = stack
