"""Linearising a module at a batch: capture the factors, and check them against autograd before they are trusted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nsrl.projection.jacobians.blocks import Block, Range
from nsrl.projection.jacobians.capture import EXACT, Capture, JacobianError, in_precision, refuse_sample_mixing
from nsrl.projection.jacobians.factored import FactoredJacobian
from nsrl.projection.jacobians.fallback import Forward, free_blocks, row_by_row
from nsrl.projection.jacobians.state import differentiable
from nsrl.projection.jacobians.verification import Probe, refuse_dependence, refuse_mixing
from nsrl.projection.precision import full_precision


@full_precision()
def jacobian(
    module: nn.Module,
    inputs: Any,
    *,
    forward: Forward | None = None,
    parameters: Iterable[str] | None = None,
    seed: Callable[[Tensor], Tensor] | None = None,
    scale: float = 1.0,
    check: bool = True,
    dense: Iterable[str] = (),
) -> FactoredJacobian:
    """Linearise a module's outputs at a batch.

    Args:
        module: any `nn.Module` whose output rows depend on their own sample only.
        inputs: what the module is called with: a tensor with the samples first, or, when `forward` is given, any
            (nested) container of such tensors.
        forward: function (module, inputs) -> outputs of shape (N, O); default `module(inputs)`.
        parameters: names of the parameters that own columns; default all trainable ones. The order is that of
            `named_parameters()` in any case.
        seed: function from the outputs (N, O) to S (N, R, O): rows become S dz/dtheta (a metric's whitening).
            Default: the identity, so that rows are the raw output derivatives.
        scale: factor on every row (1 / sqrt(N) turns the Gram into a mean over samples).
        check: evaluate twice more, with half of the samples exchanged for others, to refuse randomness and outputs that
            depend on other samples. The factors are compared with autograd in any case, by one random product:
            parameters whose factors disagree (used outside their own layer, or not on every sample) are recomputed
            densely, up to one backward pass a row.
        dense: parameters known to be used outside their own layer, whose factors are not even tried.

    Returns:
        A `FactoredJacobian` of shape (N * R, P).

    Raises:
        JacobianError: batch-norm or dropout in train mode, random outputs, outputs that depend on other samples,
            derivatives that are not finite or not linear, in-place damage, half precision or complex parameters, no
            parameters. Autocast, TF32 and gradient hooks of parameters are switched off inside.
    """
    forward = forward or (lambda module, inputs: module(inputs))
    if not math.isfinite(scale):
        raise JacobianError(f"the scale of the rows must be a finite number, not {scale}")
    known = frozenset(dense)
    columns, names = _columns(module, parameters)
    width = sum(stop - start for start, stop in columns.values())
    refuse_sample_mixing(module)

    def evaluate(inputs: Any) -> Tensor:
        return forward(module, _copied(inputs))  # a module may write into what it is given

    with differentiable(module):
        capture = Capture(module, _copied(inputs), forward, columns, seed, known)
        blocks, recomputed = _verified(module, inputs, forward, evaluate, columns, capture)
        outputs, rows, precision = capture.outputs.detach(), capture.seeds.shape[1], capture.precision
        del capture  # and the graph with it: the next evaluations make their own
        if check:
            refuse_dependence(evaluate, inputs, outputs, precision)
    if scale != 1.0:
        blocks = [block.multiplied(scale) for block in blocks]
    result = FactoredJacobian(blocks, (len(outputs) * rows, width), rows, names, outputs.to(precision))
    result.recomputed = tuple(sorted(known | recomputed))
    return result


def _verified(
    module: nn.Module,
    inputs: Any,
    forward: Forward,
    evaluate: Callable[[Any], Tensor],
    columns: dict[str, Range],
    capture: Capture,
) -> tuple[list[Block], set[str]]:
    """Blocks that agree with autograd, and the names of parameters whose factors did not.

    Three ways to the columns of a parameter, from the fastest to the one that is right by definition: factors from
    its layer; `vmap(vjp)` of the whole model; one backward pass a row, once it is known that samples do not mix.
    """
    outputs, seeds, precision = capture.outputs, capture.seeds, capture.precision
    named = dict(module.named_parameters())
    probe = Probe(outputs, seeds, {name: named[name] for name in columns}, columns, precision)
    wrong = frozenset(probe.wrong(capture.blocks, capture.covered))
    capture.drop(wrong)
    left = [name for name in probe.reached if name not in capture.covered]
    found: list[Block] = []
    if left:
        try:
            free = free_blocks(module, _copied(inputs), forward, left, columns, seeds)
            found = [in_precision(block, precision) for block in free]
            left = probe.wrong(found, left)
        except Exception:  # vmap follows neither every layer nor every way to use data; the last way follows all
            found = []
        found = [block for block in found if not set(block.owned) & {columns[name] for name in left}]
    if left:
        refuse_mixing(evaluate, inputs, outputs.detach(), precision)
        slow = row_by_row(outputs, [named[name] for name in left], [columns[name] for name in left], seeds)
        rows = [in_precision(block, precision) for block in slow]
        left = probe.wrong(rows, left)
        if left:
            raise JacobianError(
                f"the rows of the Jacobian in {', '.join(left)} do not add up to the gradient that autograd gives; a "
                "backward pass that is not linear (a hook that clips gradients, half precision inside, a custom "
                "autograd.Function) has no Jacobian"
            )
        found += rows
    return capture.blocks + found, set(wrong)


def _copied(inputs: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, inputs)


def _columns(module: nn.Module, parameters: Iterable[str] | None) -> tuple[dict[str, Range], tuple[str, ...]]:
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    wanted = set(trainable) if parameters is None else set(parameters)
    unknown = wanted - set(trainable)
    if unknown:
        raise JacobianError(f"{', '.join(sorted(unknown))}: no trainable parameter of the module has this name")
    if not wanted:
        raise JacobianError("the module has no trainable parameter to linearise in")
    columns, start = {}, 0
    for name, parameter in trainable.items():
        if name in wanted:
            _refuse_strange(name, parameter)
            columns[name] = (start, start + parameter.numel())
            start += parameter.numel()
    return columns, tuple(columns)


def _refuse_strange(name: str, parameter: nn.Parameter) -> None:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise JacobianError(f"{name} has no shape yet; call the module once on a batch before it is linearised")
    if parameter.is_inference():
        raise JacobianError(
            f"{name} was made in inference mode, in which nothing can be differentiated; make the module outside of "
            "torch.inference_mode()"
        )
    if parameter.is_complex():
        raise JacobianError(
            f"{name} is complex, and a Jacobian has real columns; hold it as a real parameter with a last axis of two "
            "and use torch.view_as_complex in the module"
        )
    if parameter.dtype not in EXACT:
        raise JacobianError(
            f"{name} is {parameter.dtype}, whose Jacobian would be rounded to three digits; linearise a float32 copy "
            "of the module: copy.deepcopy(module).float()"
        )
