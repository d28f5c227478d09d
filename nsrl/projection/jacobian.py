"""Linearising a module at a batch: capture the factors, and check them against autograd before they are trusted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nsrl.projection.blocks import Range
from nsrl.projection.capture import JacobianError, capture_blocks, refuse_sample_mixing
from nsrl.projection.factored import FactoredJacobian, Jacobian, StackedJacobian
from nsrl.projection.fallback import Forward
from nsrl.projection.precision import full_precision

__all__ = ["FactoredJacobian", "Jacobian", "StackedJacobian", "jacobian"]


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
        check: evaluate twice to refuse randomness, and compare one random product with autograd; parameters whose
            factors disagree (used outside their own layer) are recomputed densely.
        dense: parameters known to be used outside their own layer; with check=False, what an earlier checked call
            with as many samples left in `recomputed` (positions that come before the samples pass for samples where
            there are as many of them).

    Returns:
        A `FactoredJacobian` of shape (N * R, P).

    Raises:
        JacobianError: batch-norm or dropout in train mode, random outputs, in-place damage, half precision, no
            parameters. Autocast and TF32 are switched off inside.
    """
    forward = forward or (lambda module, inputs: module(inputs))
    columns, names = _columns(module, parameters)
    width = sum(stop - start for start, stop in columns.values())
    refuse_sample_mixing(module)
    known = frozenset(dense)
    blocks, outputs, seeds = capture_blocks(module, inputs, forward, columns, seed, known)
    shape = (outputs.shape[0] * seeds.shape[1], width)
    result = FactoredJacobian(blocks, shape, seeds.shape[1], names, outputs.detach())
    if check:
        _refuse_randomness(module, inputs, forward, outputs)
        wrong = _mismatches(module, result, outputs, seeds, columns)
        if wrong:
            known |= frozenset(wrong)
            blocks, outputs, seeds = capture_blocks(module, inputs, forward, columns, seed, known)
            result = FactoredJacobian(blocks, shape, seeds.shape[1], names, outputs.detach())
            wrong = _mismatches(module, result, outputs, seeds, columns)
            if wrong:
                raise JacobianError(
                    f"the per-sample Jacobian of {', '.join(wrong)} does not add up to the gradient: the output of a "
                    "sample seems to depend on other samples of the batch"
                )
    if scale != 1.0:
        result = FactoredJacobian(
            [block.multiplied(scale) for block in result.blocks], shape, seeds.shape[1], names, result.outputs
        )
    result.recomputed = tuple(sorted(known))
    return result


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
            columns[name] = (start, start + parameter.numel())
            start += parameter.numel()
    return columns, tuple(columns)


def _refuse_randomness(module: nn.Module, inputs: Any, forward: Forward, outputs: Tensor) -> None:
    with torch.no_grad():
        again = forward(module, inputs)
    if not torch.allclose(again, outputs, rtol=1e-4, atol=1e-6):
        raise JacobianError("two evaluations of the module differ: it is random; switch its noise off first")


def _mismatches(
    module: nn.Module, result: FactoredJacobian, outputs: Tensor, seeds: Tensor, columns: dict[str, Range]
) -> list[str]:
    """Parameters whose part of J^T u differs from autograd's for a fixed pseudo-random u."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(result.shape[0], generator=generator).to(outputs)
    cotangent = torch.einsum("nr,nro->no", rows.view(outputs.shape[0], -1), seeds)
    named = dict(module.named_parameters())
    grads = torch.autograd.grad(outputs, [named[n] for n in columns], cotangent, retain_graph=True, allow_unused=True)
    ours = result.rmatvec(rows)
    tolerance = 1e-3 if outputs.dtype != torch.float64 else 1e-8
    largest = max((float(grad.norm()) for grad in grads if grad is not None), default=0.0)
    wrong = []
    for (name, (start, stop)), grad in zip(columns.items(), grads, strict=True):
        expected = torch.zeros(stop - start).to(ours) if grad is None else grad.flatten()
        if float((ours[start:stop] - expected).norm()) > tolerance * max(float(expected.norm()), 1e-3 * largest, 1e-12):
            wrong.append(name)
    return wrong
