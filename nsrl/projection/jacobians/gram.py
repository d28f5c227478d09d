"""Inner products of the rows of a linear layer's Jacobian, in the cheapest of three equal forms.

Row (n, o) is the matrix M[n,o] = sum_t G[n,o,t] A[n,t]^T. With k = N R rows, k' of the other batch:

    hadamard      one position a sample: <A[n],A[m]> <G[n,o],G[m,p]>                     k k' d_out
    pairs         <G[n,o], (A[n] A[m]^T) G[m,p]>                                         k k' T d_out (T' + R) / R
    materialised  <M[n,o], M[m,p]>                                                       k k' d_in d_out

Factors stay in their own precision; products are made in float64 unless asked otherwise, because a Gram matrix
squares the condition number: a float32 one is useless from a condition of 3e3 on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def share_out(work: Callable[[Item], Any], items: Sequence[Item]) -> None:
    """Call `work` on every item, on as many threads as torch uses, each of them with one torch thread.

    torch releases the interpreter's lock inside its operators. Parts of a result that different items write to must
    not overlap. An exception of any item is raised here.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(items) < 2:
        for item in items:
            work(item)
        return
    grad = torch.is_grad_enabled()

    def begin() -> None:
        # Both are settings of a thread; the first also becomes the default of new threads until it is put back below.
        torch.set_num_threads(1)
        torch.set_grad_enabled(grad)

    try:
        with ThreadPoolExecutor(min(threads, len(items)), initializer=begin) as pool:
            list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)


#: Numbers that a temporary may hold (32 MB in float64): larger ones are fetched from the system anew each time.
CHUNK = 2**22

#: An operation of `pairs` takes this much longer than one of `materialised`, for 16 outputs and more: its matrices are
#: thin. To build a row takes as long as this many operations an entry, besides the sum over positions.
THIN, BUILD = 2.0, 100

#: Samples and features that `pairs` treats at once: its temporaries stay in a cache.
SAMPLES, FEATURES = 4, 256

#: A symmetric matrix is computed in this many stripes of samples, of which only the lower half is needed.
STRIPES = 8


def gram(inputs: Tensor, grads: Tensor, precision: torch.dtype = torch.float64) -> Tensor:
    """Inner products of all rows with each other, shape (N R, N R).

    Args:
        inputs: A, shape (N, T, d_in).
        grads: G, shape (N, R, T, d_out).
        precision: of the products and of the result.
    """
    rows = grads.shape[0] * grads.shape[1]
    out = grads.new_zeros(rows, rows, dtype=precision)
    add_gram(inputs, grads, out)
    return out


def add_gram(inputs: Tensor, grads: Tensor, out: Tensor) -> None:
    """Add `gram` to a symmetric matrix (N R, N R), in that matrix's precision."""
    precision, a_sample = out.dtype, grads.shape[1]
    form = _cheapest(inputs, grads, inputs, grads)
    if form is _materialised:
        for rows in _row_chunks(inputs, grads, 2 * len(out)):
            add_row_gram(rows, out)
    elif form is _hadamard:
        _add_symmetric(
            len(inputs), a_sample, out, lambda i, j: _hadamard(inputs[i], grads[i], inputs[j], grads[j], precision)
        )
    else:
        features, sliced = inputs.to(precision), _sliced(grads, precision)
        _add_symmetric(
            len(inputs),
            a_sample,
            out,
            lambda i, j: _move_and_meet(features[i], sliced[:, i], features[j], sliced[:, j]),
            threaded=True,
        )


def add_row_gram(rows: Tensor, out: Tensor) -> None:
    """Add rows rows^T to a symmetric matrix (k, k), in that matrix's precision."""
    rows = rows.to(out.dtype)
    _add_symmetric(len(rows), 1, out, lambda i, j: rows[i] @ rows[j].T)


def cross_gram(
    inputs: Tensor, grads: Tensor, other_inputs: Tensor, other_grads: Tensor, precision: torch.dtype = torch.float64
) -> Tensor:
    """Inner products with the rows of another batch, shape (N R, M S)."""
    form = _cheapest(inputs, grads, other_inputs, other_grads)
    return form(inputs, grads, other_inputs, other_grads, precision)


def matrices(inputs: Tensor, grads: Tensor) -> Tensor:
    """M, the rows as matrices, shape (N R, d_out, d_in)."""
    samples, rows, positions, width = grads.shape
    if positions == 1:
        return (grads.transpose(2, 3) * inputs.unsqueeze(1)).flatten(0, 1)
    stacked = grads.transpose(2, 3).reshape(samples, rows * width, positions)
    return torch.bmm(stacked, inputs).view(samples * rows, width, -1)


def squares(inputs: Tensor, grads: Tensor) -> Tensor:
    """Sum over rows of M^2, shape (d_out, d_in), float64."""
    if inputs.shape[1] == 1:
        return grads[:, :, 0].double().square().sum(1).T @ inputs[:, 0].double().square()
    total = torch.zeros(grads.shape[-1], inputs.shape[-1], dtype=torch.float64, device=grads.device)
    step = max(1, CHUNK // (grads.shape[1] * grads.shape[-1] * inputs.shape[-1]))
    for start in range(0, grads.shape[0], step):
        part = matrices(inputs[start : start + step], grads[start : start + step])
        total += part.double().square().sum(0)
    return total


Form = Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]


def _cheapest(inputs: Tensor, grads: Tensor, other_inputs: Tensor, other_grads: Tensor) -> Form:
    positions, width_in = inputs.shape[1:]
    other_positions, outputs = other_inputs.shape[1], grads.shape[1]
    if positions == 1 == other_positions:
        return _hadamard
    rows, others = grads.shape[0] * outputs, other_grads.shape[0] * other_grads.shape[1]
    thin = THIN * max(1.0, 16 / outputs)
    pairs = thin * rows * others * positions * (other_positions + outputs) / outputs
    materialised = width_in * (rows * others + rows * (2 * positions + BUILD))
    return _pairs if pairs < materialised else _materialised


def _hadamard(
    inputs: Tensor, grads: Tensor, other_inputs: Tensor, other_grads: Tensor, precision: torch.dtype
) -> Tensor:
    (n, r), (m, s) = grads.shape[:2], other_grads.shape[:2]
    samples = inputs[:, 0].to(precision) @ other_inputs[:, 0].to(precision).T
    gram = grads[:, :, 0].flatten(0, 1).to(precision) @ other_grads[:, :, 0].flatten(0, 1).to(precision).T
    gram.view(n, r, m, s).mul_(samples.view(n, 1, m, 1))
    return gram


def _pairs(inputs: Tensor, grads: Tensor, other_inputs: Tensor, other_grads: Tensor, precision: torch.dtype) -> Tensor:
    return _move_and_meet(
        inputs.to(precision), _sliced(grads, precision), other_inputs.to(precision), _sliced(other_grads, precision)
    )


def _move_and_meet(inputs: Tensor, grads: Tensor, other_inputs: Tensor, other_grads: Tensor) -> Tensor:
    """Move the gradients of one sample of the other batch through A[n] A[m]^T, then meet ours, in a cache's size."""
    (n, r, t), (m, s) = grads.shape[1:4], other_grads.shape[1:3]
    out = grads.new_zeros(m, n, r, s)
    for other in range(m):
        between = inputs.flatten(0, 1) @ other_inputs[other].T
        for start in range(0, n, SAMPLES):
            stop = min(start + SAMPLES, n)
            moving = between[start * t : stop * t].expand(s, -1, -1)
            for mine, yours in zip(grads, other_grads, strict=True):
                moved = torch.bmm(moving, yours[other]).view(s, stop - start, -1).permute(1, 2, 0)
                out[other, start:stop].baddbmm_(mine[start:stop].flatten(2), moved)
    return out.permute(1, 2, 0, 3).reshape(n * r, m * s)


def _sliced(grads: Tensor, precision: torch.dtype) -> Tensor:
    """Gradients with a slice of features as the first axis, (slices, N, R, T, features of a slice)."""
    width = grads.shape[-1]
    slices = width // FEATURES if width % FEATURES == 0 else 1
    return grads.unflatten(-1, (slices, -1)).permute(3, 0, 1, 2, 4).to(precision).contiguous()


def _materialised(
    inputs: Tensor, grads: Tensor, other_inputs: Tensor, other_grads: Tensor, precision: torch.dtype
) -> Tensor:
    rows, others = grads.shape[0] * grads.shape[1], other_grads.shape[0] * other_grads.shape[1]
    out = grads.new_zeros(rows, others, dtype=precision)
    chunks = zip(
        _row_chunks(inputs, grads, rows + others), _row_chunks(other_inputs, other_grads, rows + others), strict=True
    )
    for ours, theirs in chunks:
        out.addmm_(ours.to(precision), theirs.to(precision).T)
    return out


def _row_chunks(inputs: Tensor, grads: Tensor, rows: int) -> Iterator[Tensor]:
    """The rows, a slice of output features at a time, so that the matrices never lie in memory all at once."""
    width, width_in = grads.shape[-1], inputs.shape[-1]
    step = max(1, CHUNK // (rows * width_in))
    for start in range(0, width, step):
        yield matrices(inputs, grads[..., start : start + step]).flatten(1)


def _add_symmetric(
    samples: int, a_sample: int, out: Tensor, product: Callable[[slice, slice], Tensor], threaded: bool = False
) -> None:
    """Add a symmetric matrix by its lower stripes; `product` maps two slices of samples to their block.

    With `threaded`, for products too thin for BLAS to share them out, stripes are computed side by side.
    """
    step = max(1, -(-samples // STRIPES))

    def add(start: int) -> None:
        stop = min(start + step, samples)
        here, before = slice(start * a_sample, stop * a_sample), slice(0, start * a_sample)
        stripe = product(slice(start, stop), slice(0, stop))
        corner = stripe[:, start * a_sample :]
        out[here, here] += (corner + corner.T) / 2
        out[here, before] += stripe[:, before]
        out[before, here] += stripe[:, before].T

    # The last stripes are the longest: they go first.
    starts = list(range(0, samples, step))[::-1]
    if threaded and not out.is_cuda:
        share_out(add, starts)
    else:
        for start in starts:
            add(start)
