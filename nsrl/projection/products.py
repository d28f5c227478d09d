"""Inner products of the rows of a linear layer's Jacobian, in the cheapest of three equal forms.

Row (n, o) is the matrix M[n,o] = sum_t G[n,o,t] A[n,t]^T. With k = N R rows, k' of the other batch:

    hadamard      one position a sample: <A[n],A[m]> <G[n,o],G[m,p]>                     k k' d_out
    pairs         <G[n,o], (A[n] A[m]^T) G[m,p]>                                         k k' T d_out (T' + R) / R
    materialised  <M[n,o], M[m,p]>                                                       k k' d_in d_out

Factors stay in their own precision; products are made in float64 unless asked otherwise, because a Gram matrix
squares the condition number: a float32 one is useless from a condition of 3e3 on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Numbers that a temporary may hold (256 MB in float64).
CHUNK = 2**25
#: A product of `pairs` takes this much longer than one of `materialised`: its matrices are thin, and memory binds it.
SLOWER = 2.0
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
    form = _cheapest(inputs, grads, inputs, grads)
    if form is _materialised:
        return _materialised(inputs, grads, None, None, precision)
    return _symmetric(grads, precision, lambda i, j: form(inputs[i], grads[i], inputs[j], grads[j], precision))


def cross_gram(inputs: Tensor, grads: Tensor, other_inputs: Tensor, other_grads: Tensor,
               precision: torch.dtype = torch.float64) -> Tensor:  # fmt: skip
    """Inner products with the rows of another batch, shape (N R, M S)."""
    form = _cheapest(inputs, grads, other_inputs, other_grads)
    return form(inputs, grads, other_inputs, other_grads, precision)


def row_gram(rows: Tensor, precision: torch.dtype = torch.float64) -> Tensor:
    """Rows rows^T, shape (k, k)."""
    rows = rows.to(precision)
    return _symmetric(rows, precision, lambda i, j: rows[i] @ rows[j].T)


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
    other_positions = other_inputs.shape[1]
    if positions == 1 == other_positions:
        return _hadamard
    pairs = positions * (other_positions + grads.shape[1])
    return _pairs if SLOWER * pairs < grads.shape[1] * width_in else _materialised


def _hadamard(inputs: Tensor, grads: Tensor, other_inputs: Tensor, other_grads: Tensor,
              precision: torch.dtype) -> Tensor:  # fmt: skip
    (n, r), (m, s) = grads.shape[:2], other_grads.shape[:2]
    samples = inputs[:, 0].to(precision) @ other_inputs[:, 0].to(precision).T
    gram = grads[:, :, 0].flatten(0, 1).to(precision) @ other_grads[:, :, 0].flatten(0, 1).to(precision).T
    gram.view(n, r, m, s).mul_(samples.view(n, 1, m, 1))
    return gram


def _pairs(inputs: Tensor, grads: Tensor, other_inputs: Tensor, other_grads: Tensor,
           precision: torch.dtype) -> Tensor:  # fmt: skip
    """Move the gradients of one sample of the other batch through A[n] A[m]^T, then meet ours, in a cache's size."""
    (n, r, t, _), (m, s) = grads.shape, other_grads.shape[:2]
    ours, theirs = _sliced(grads, precision), _sliced(other_grads, precision)
    out = ours.new_zeros(m, n, r, s)
    for other in range(m):
        between = inputs.flatten(0, 1).to(precision) @ other_inputs[other].to(precision).T
        for start in range(0, n, SAMPLES):
            stop = min(start + SAMPLES, n)
            moving = between[start * t : stop * t].expand(s, -1, -1)
            for mine, yours in zip(ours, theirs, strict=True):
                moved = torch.bmm(moving, yours[other]).view(s, stop - start, -1).permute(1, 2, 0)
                out[other, start:stop].baddbmm_(mine[start:stop].flatten(2), moved)
    return out.permute(1, 2, 0, 3).reshape(n * r, m * s)


def _sliced(grads: Tensor, precision: torch.dtype) -> Tensor:
    """Gradients with a slice of features as the first axis, (slices, N, R, T, features of a slice)."""
    width = grads.shape[-1]
    slices = width // FEATURES if width % FEATURES == 0 else 1
    return grads.unflatten(-1, (slices, -1)).permute(3, 0, 1, 2, 4).to(precision).contiguous()


def _materialised(inputs: Tensor, grads: Tensor, other_inputs: Tensor | None, other_grads: Tensor | None,
                  precision: torch.dtype) -> Tensor:  # fmt: skip
    """A slice of output features at a time, so that the matrices never lie in memory all at once."""
    rows, width, width_in = grads.shape[0] * grads.shape[1], grads.shape[-1], inputs.shape[-1]
    others = rows if other_grads is None else other_grads.shape[0] * other_grads.shape[1]
    out = grads.new_zeros(rows, others, dtype=precision)
    step = max(1, CHUNK // ((rows + others) * width_in))
    for start in range(0, width, step):
        ours = matrices(inputs, grads[..., start : start + step]).flatten(1)
        if other_inputs is None or other_grads is None:
            out += row_gram(ours, precision)
        else:
            theirs = matrices(other_inputs, other_grads[..., start : start + step]).flatten(1)
            out += ours.to(precision) @ theirs.to(precision).T
    return out


def _symmetric(rows: Tensor, precision: torch.dtype, product: Callable[[slice, slice], Tensor]) -> Tensor:
    """A symmetric matrix from its lower stripes; `product` maps two slices of samples to their block."""
    samples = rows.shape[0]
    a_sample = rows.shape[1] if rows.dim() == 4 else 1
    step = max(1, -(-samples // STRIPES))
    out = rows.new_empty(samples * a_sample, samples * a_sample, dtype=precision)
    for start in range(0, samples, step):
        stop = min(start + step, samples)
        here = slice(start * a_sample, stop * a_sample)
        stripe = product(slice(start, stop), slice(0, stop))
        corner = stripe[:, start * a_sample :]
        out[here, here] = (corner + corner.T) / 2
        out[here, : start * a_sample] = stripe[:, : start * a_sample]
        out[: start * a_sample, here] = stripe[:, : start * a_sample].T
    return out
