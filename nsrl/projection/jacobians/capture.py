"""Capture: how the factors of a Jacobian are obtained.

Forward hooks keep the input A of every layer; ordinary `torch.autograd.grad` with respect to the *layer outputs*
gives the gradients G. No forward-mode differentiation and no gradient with respect to a weight is taken, so flash
attention, checkpointing and custom kernels do not matter. What comes out is a claim: `nsrl.projection.jacobian` holds
it against autograd.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nsrl.projection.jacobians.blocks import Block, Range
from nsrl.projection.jacobians.fallback import Forward
from nsrl.projection.jacobians.layers import Projections, Site, Usage, find_builder, shares_columns, shown

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


class Capture:
    """One evaluation of a module, with what the factors of its Jacobian are made of.

    Args:
        module: what is linearised.
        inputs: what `forward` is given.
        forward: function (module, inputs) -> outputs.
        columns: start and stop of every wanted parameter in the flat vector, by name.
        seed: maps the detached outputs to S, whose rows are the output combinations to differentiate; None means the
            identity.
        dense: parameters that no factors are wanted of.

    Attributes:
        outputs: shape (N, O), in their graph.
        seeds: S, shape (N, R, O).
        precision: the coarsest of the outputs' and the parameters'.
        blocks: the columns of all parameters that a layer can speak for.
        covered: their names.

    Raises:
        JacobianError: outputs that are no finite float32 or float64 matrix, or that depend on no parameter; half
            precision inside; a layer's input that was overwritten in place.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Any,
        forward: Forward,
        columns: Mapping[str, Range],
        seed: Callable[[Tensor], Tensor] | None,
        dense: frozenset[str] = frozenset(),
    ):
        self._sites, attentions = _sites(module, {name: place for name, place in columns.items() if name not in dense})
        # Ahead of the user's hooks: what they make of the output is no longer the layer's.
        handles = [
            site.layer.register_forward_hook(_recorder(site), prepend=True, with_kwargs=True) for site in self._sites
        ]
        try:
            with shown(attentions):
                outputs = forward(module, inputs)
        finally:
            for handle in handles:
                handle.remove()
        _check_outputs(outputs)
        _refuse_hidden(outputs)
        self.outputs: Tensor = outputs
        self._sites += [site for attention in attentions for site in attention.sites.values()]
        samples = outputs.shape[0]
        for site in self._sites:
            _refuse_overwritten(site)
            _refuse_reduced(site)
            site.usages = [usage for usage in site.usages if usage.output.requires_grad]
            site.lost |= not all(_has_samples(usage, samples) for usage in site.usages)
        if seed is None:
            eye = torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
            self.seeds = eye.expand(samples, -1, -1)
        else:
            self.seeds = seed(outputs.detach())
        parameters = dict(module.named_parameters())
        kinds = {outputs.dtype, *(parameters[name].dtype for name in columns)}
        self.precision = torch.float32 if torch.float32 in kinds else torch.float64
        lost = frozenset(name for site in self._sites if site.lost for name in site.names.values())
        lost |= frozenset(name for attention in attentions for name in attention.lost)
        self._sites = [kept for site in self._sites if site.usages and (kept := site.without(lost))]
        _differentiate(outputs, self.seeds, [usage for site in self._sites for usage in site.usages])
        self._build()

    def drop(self, names: frozenset[str]) -> None:
        """Leave some parameters to others: make the blocks anew without them."""
        if not names.isdisjoint(self.covered):
            self._sites = [kept for site in self._sites if (kept := site.without(names))]
            self._build()

    def _build(self) -> None:
        self.blocks: list[Block] = []
        for site in self._sites:
            try:
                blocks = site.blocks()
            except Exception:  # a call that its layer's builder has not met, or a layer that vmap cannot follow
                failed = frozenset(site.names[local] for local in site.columns)
                self._sites = [kept for site in self._sites if (kept := site.without(failed))]
                return self._build()
            self.blocks += [in_precision(block, self.precision) for block in blocks]
        self.covered = frozenset(site.names[local] for site in self._sites for local in site.columns)


def in_precision(block: Any, precision: torch.dtype) -> Block:
    """The block with its numbers in a precision: a layer may compute in another one than the outputs."""
    changed = {
        name: value.to(precision)
        for name, value in vars(block).items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != precision
    }
    return replace(block, **changed) if changed else block


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


def _refuse_hidden(outputs: Tensor) -> None:
    """Raise where what autograd says is not the derivative: for steps of its graph that say so of themselves."""
    seen, left = set(), [outputs.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [source for source, _ in node.next_functions]
        if node.name() == "CheckpointFunctionBackward":
            raise JacobianError(
                "a part of the module is checkpointed with use_reentrant=True, which hides its parameters; use "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        if getattr(node, "_saved_scale_grad_by_freq", False):
            raise JacobianError(
                "an embedding with scale_grad_by_freq=True divides its gradient by how often the batch looks a vector "
                "up, which is no derivative; switch scale_grad_by_freq off"
            )


def _has_samples(usage: Usage, samples: int) -> bool:
    """Whether both ends of a call have the samples first. What looks so by chance, the probe finds out."""
    ends = usage.input, usage.output
    return usage.output.dim() > 1 and all(end.shape[:1] == (samples,) for end in ends)


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
        attends = type(layer) is nn.MultiheadAttention and not parametrize.is_parametrized(layer)
        if attends and "forward" in vars(layer):  # somebody's own: what is inside is not known
            opened.update(layer.modules())
        whole = attends or parametrize.is_parametrized(layer)
        if layer in opened or (next(layer.children(), None) is not None and not whole):
            continue
        if isinstance(layer, torch.jit.ScriptModule):  # takes no hooks
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
        if type(layer) is nn.MultiheadAttention and not parametrize.is_parametrized(layer):
            attentions.append(Projections(layer, kept, local))
        elif kept:
            sites.append(Site(layer, kept, local, find_builder(layer)))
    return sites, attentions


def _recorder(site: Site) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]:
    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = args if not kwargs else (*args, kwargs.get("input")) if set(kwargs) == {"input"} else ()
        if len(given) != 1 or not isinstance(given[0], Tensor) or not isinstance(output, Tensor):
            site.lost = True
            return None
        site.usages.append(Usage(given[0].detach(), output, given[0]._version))
        # The clone keeps an in-place activation from overwriting the output that is differentiated.
        return output.clone() if output.requires_grad else None

    return record


def gradients(outputs: Tensor, targets: Sequence[Tensor], cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the outputs, (N, O), times cotangents of their shape; None where they do not depend on a target.

    Raises:
        JacobianError: autograd cannot differentiate the outputs, or not as often as there are rows.
    """
    try:
        return torch.autograd.grad(outputs, targets, cotangents, retain_graph=True, allow_unused=True)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise JacobianError(
            f"autograd cannot differentiate the outputs: {reason}; the module has to allow backward passes with "
            "retain_graph=True"
        ) from error


def _differentiate(outputs: Tensor, seeds: Tensor, usages: list[Usage]) -> None:
    """Fill in `grad`, shape (N, R, *output shape): one backward pass a row of S, all samples at once."""
    if not usages:
        return
    targets = [usage.output for usage in usages]
    rows = seeds.shape[1]
    stacks = [target.new_zeros(target.shape[0], rows, *target.shape[1:]) for target in targets]
    for row in range(rows):
        grads = gradients(outputs, targets, seeds[:, row])
        for stack, grad in zip(stacks, grads, strict=True):
            if grad is not None:
                stack[:, row] = grad
    for usage, stack in zip(usages, stacks, strict=True):
        usage.grad = stack
