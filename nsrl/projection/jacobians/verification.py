"""What factors are held against before they are trusted: autograd's own answer, and the module on other batches.

A layer's factors are right if its parameters act through its own call alone and if samples do not meet behind it.
Neither can be seen from the outside, and both may depend on the batch (sorting by length, a mixture of experts, a
branch), so every batch is checked: one product J^T u with a random u, which no error survives but on a set of measure
zero, and two more evaluations in which half of the samples are exchanged for others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from nsrl.projection.jacobians.blocks import Block, Range
from nsrl.projection.jacobians.capture import JacobianError, gradients
from nsrl.projection.jacobians.fallback import flat

Evaluate = Callable[[Any], Tensor]


class Probe:
    """One product J^T u with a fixed pseudo-random u, by autograd, parameter by parameter.

    Args:
        outputs: shape (N, O), in their graph.
        seeds: S, shape (N, R, O).
        parameters: by name.
        columns: start and stop of each in the flat vector.
        precision: of the factors.

    Attributes:
        reached: names of the parameters that the outputs depend on.

    Raises:
        JacobianError: autograd cannot differentiate the outputs, or its answer is not finite.
    """

    def __init__(
        self,
        outputs: Tensor,
        seeds: Tensor,
        parameters: Mapping[str, Tensor],
        columns: Mapping[str, Range],
        precision: torch.dtype,
    ):
        self._columns = columns
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(seeds.shape[:2], generator=generator, dtype=torch.float64).to(outputs)
        cotangent = torch.einsum("nr,nro->no", rows, seeds)
        grads = gradients(outputs, list(parameters.values()), cotangent)
        self._rows = rows.to(precision)
        self._answers = {
            name: flat(grad).to(precision) for name, grad in zip(parameters, grads, strict=True) if grad is not None
        }
        self.reached = tuple(self._answers)
        self._width = max(stop for _, stop in columns.values())
        norms = dict(zip(self._answers, _norms(list(self._answers.values())), strict=True))
        broken = [name for name, norm in norms.items() if not norm < float("inf")]
        if broken:
            raise JacobianError(
                f"the derivative of the outputs in {', '.join(broken)} is NaN or infinite at these samples; look for a "
                "square root, a norm or a logarithm at zero, or an overflow, and add a small constant there"
            )
        self._norms, self._largest = norms, max(norms.values(), default=0.0)
        self._share, self._floor = TOLERANCES[precision]

    def wrong(self, blocks: Iterable[Block], names: Iterable[str]) -> list[str]:
        """Those of the names whose columns, as the blocks have them, are not what autograd says."""
        ours = self._rows.new_zeros(self._width)
        for block in blocks:
            block.rmatvec_into(self._rows, ours)
        names = list(names)
        parts = [ours[slice(*self._columns[name])] for name in names]
        errors = _norms(
            [
                part - self._answers[name] if name in self._answers else part
                for name, part in zip(names, parts, strict=True)
            ]
        )
        allowed = [self._share * self._norms.get(name, 0.0) + self._floor * self._largest for name in names]
        return [name for name, error, most in zip(names, errors, allowed, strict=True) if not error <= most]  # NaN is


def _norms(vectors: Sequence[Tensor]) -> list[float]:
    """Norms of vectors, with one look at the device."""
    return torch.stack([torch.linalg.vector_norm(vector) for vector in vectors]).tolist() if vectors else []


#: Error that a parameter's part of J^T u may have, as a share of itself and of the largest part beside it. Two ways of
#: summing the same terms differ by round-off times the condition of the sum: 6e-5 in float32 and 2e-13 in float64
#: where a normalisation takes nearly all of a gradient away, 1e-6 and 1e-15 elsewhere. A part that cancels altogether
#: (a bias before a softmax) leaves round-off of its neighbours.
TOLERANCES = {torch.float32: (1e-3, 1e-6), torch.float64: (1e-9, 1e-12)}
#: Relative difference of two evaluations that is put down to round-off.
REPEATABLE = {torch.float32: 1e-4, torch.float64: 1e-9}


def refuse_dependence(evaluate: Evaluate, inputs: Any, outputs: Tensor, precision: torch.dtype) -> None:
    """Evaluate again with a random half of the samples exchanged for others, and with the other half: the rest stays.

    Inputs that are no tensors with the samples first cannot be exchanged; they are evaluated again as they are.

    Raises:
        JacobianError: the module is random, or an output depends on other samples than its own.
    """
    changed = torch.zeros(len(outputs), dtype=torch.bool)
    # a seed whose halves are not their own mirror images, so that outputs in reverse order show for every N
    changed[torch.randperm(len(outputs), generator=torch.Generator().manual_seed(10))[: len(outputs) // 2]] = True
    for half in (changed, ~changed) if len(outputs) > 1 else (changed,):
        _compare(evaluate, inputs, outputs, half, precision)


def refuse_mixing(evaluate: Evaluate, inputs: Any, outputs: Tensor, precision: torch.dtype) -> None:
    """As `refuse_dependence`, until every sample has been exchanged while every other one was not.

    Two samples differ in a binary digit of their numbers: 2 log2(N) evaluations.

    Raises:
        JacobianError: the module is random, or an output depends on other samples than its own.
    """
    numbers = torch.arange(len(outputs))
    for digit in range((len(outputs) - 1).bit_length()):
        for value in (0, 1):
            _compare(evaluate, inputs, outputs, (numbers >> digit) & 1 == value, precision)


def _compare(evaluate: Evaluate, inputs: Any, outputs: Tensor, changed: Tensor, precision: torch.dtype) -> None:
    again = _evaluated(evaluate, inputs, changed)
    kept = ~changed.to(outputs.device)
    if again.shape == outputs.shape and _same(again[kept], outputs[kept], precision):
        return
    if _same(evaluate(inputs), outputs, precision):
        raise JacobianError(
            "the output of a sample seems to depend on other samples of the batch; a Jacobian of single samples needs "
            "inputs with the samples first (recurrent layers: batch_first=True) and nothing that mixes them"
        )
    raise JacobianError("two evaluations of the module differ: it is random; switch its noise off first")


def _evaluated(evaluate: Evaluate, inputs: Any, changed: Tensor) -> Tensor:
    """Outputs at inputs whose changed samples are copies of others."""
    kept = (~changed).nonzero().flatten()
    far = torch.arange(len(changed))
    far[changed] = kept[(torch.arange(int(changed.sum())) + len(kept) // 2) % len(kept)]
    # The sample before it, or the first: an order of the samples (descending lengths) stays one.
    near = kept[(torch.searchsorted(kept, torch.arange(len(changed)), right=True) - 1).clamp_min(0)]
    for sources in (far, near):
        try:
            return evaluate(_exchanged(inputs, sources))
        except Exception:  # not every batch is one that the module takes
            continue
    return evaluate(inputs)


def _exchanged(inputs: Any, sources: Tensor) -> Any:
    def exchange(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided and leaf.shape[:1] == sources.shape:
            return leaf[sources.to(leaf.device)]
        return leaf

    # the tensors of packed sequences have no samples in front
    return pytree.tree_map(exchange, inputs, is_leaf=lambda leaf: isinstance(leaf, PackedSequence))


def _same(one: Tensor, other: Tensor, precision: torch.dtype) -> bool:
    if one.shape != other.shape:
        return False
    one, other = one.detach(), other.detach()
    if torch.equal(one, other):
        return True
    # Round-off of an entry is relative to what it was summed up from. A typical entry stands for that, and not the
    # largest one: masked logits of -1e4 would hide any difference.
    sizes = other.abs().flatten()
    sizes = sizes[sizes > 0]
    typical = sizes.kthvalue(max(1, len(sizes) // 4)).values if len(sizes) else 0.0
    return bool(((one - other).abs() <= REPEATABLE[precision] * (other.abs() + typical)).all())
