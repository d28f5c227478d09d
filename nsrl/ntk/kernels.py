"""The empirical neural tangent kernel K(x, x') = J(x) J(x')^T of a finite network, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nsrl.errors import NsrlError
from nsrl.ntk.functions import count_samples, refuse_mismatch, take_samples
from nsrl.projection.jacobians.factored import FactoredJacobian
from nsrl.projection.jacobians.fallback import Forward
from nsrl.projection.jacobians.linearise import jacobian
from nsrl.projection.solvers.plan import available_bytes, readable_bytes

Kind = Literal["full", "trace", "diagonal"]
#: Bytes that the factors of one batch may take when no batch size is given.
BATCH_BYTES = 2**28
#: Kernel rows of one batch when no batch size is given: a float64 tile of 2048 x 2048 takes 32 MB.
BATCH_ROWS = 2048
#: Samples that are linearised first, to weigh their factors.
PROBE = 4


@dataclass(frozen=True)
class Tile:
    """One piece of a kernel: `kernel[rows, columns] = values`.

    Attributes:
        rows: kernel rows, n * O + o of the first inputs (n alone when one output was asked for).
        columns: kernel columns, the same of the second inputs.
        values: on the model's device.
    """

    rows: slice
    columns: slice
    values: Tensor


def empirical_ntk(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    kind: Kind = "full",
    *,
    forward: Forward | None = None,
    batch_size: int | None = None,
    precision: torch.dtype = torch.float64,
) -> Tensor:
    """Inner products of the output gradients at two sets of inputs; test inputs first, training inputs second.

    "full" is the exact kernel of a finite network. "trace" and "diagonal" drop the coupling between outputs, which
    vanishes in infinite width only; they cost a factor O less time, and trace O^2 less memory.

    Args:
        model: any module that `nsrl.projection.jacobian` takes, in eval mode.
        x1: inputs, samples first: a tensor or, with `forward`, a (nested) container of tensors. n1 samples.
        x2: more inputs, n2 samples; None means x1, and half of the work.
        kind: what is returned, O being the number of outputs:
            "full": (n1 * O, n2 * O), row n * O + o as in the Jacobian; `.view(n1, O, n2, O).transpose(1, 2)` is the
            (n1, n2, O, O) of torch.func's tutorial and of neural-tangents.
            "diagonal": (O, n1, n2), for each output the kernel of that output alone.
            "trace": (n1, n2), the sum of "diagonal" over the outputs (neural-tangents divides it by O).
        forward: function (model, inputs) -> outputs (N, O), default `model(inputs)`. For the policy of an SB3 agent:
            `nsrl.rl.policies.actor_critic.policy_outputs`.
        batch_size: samples linearised at once; default as many as keep their factors under 256 MB.
        precision: dtype of the products and of the result. float32 costs half and is enough to look at.

    Returns:
        The kernel, on the model's device. Symmetric to the last bit when x2 is None.

    Raises:
        NsrlError: empty or mismatched inputs, an unknown kind, or a kernel larger than the free memory.
        JacobianError: batch normalisation or dropout in train mode, random outputs or such that depend on other
            samples, derivatives that are not finite, no trainable parameters.
    """
    if kind not in ("full", "trace", "diagonal"):
        raise NsrlError(f'kind must be "full", "trace" or "diagonal", not {kind!r}')
    if x2 is not None:
        refuse_mismatch(x1, x2)
    linearise = _Lineariser(model, x1, forward, batch_size)
    n1, n2, width = count_samples(x1), count_samples(x1 if x2 is None else x2), linearise.outputs
    shape = {"full": (n1 * width, n2 * width), "trace": (n1, n2), "diagonal": (width, n1, n2)}[kind]
    _refuse_size(shape, kind, linearise.device, precision)
    kernel = torch.zeros(shape, dtype=precision, device=linearise.device)
    for output in [None] if kind == "full" else range(width):
        target = kernel[output] if kind == "diagonal" else kernel
        for tile in _tiles(linearise, x1, x2, precision, output):
            target[tile.rows, tile.columns] += tile.values
            if x2 is None and tile.rows != tile.columns:
                target[tile.columns, tile.rows] += tile.values.T
    return kernel


def ntk_tiles(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    output: int | None = None,
    forward: Forward | None = None,
    batch_size: int | None = None,
    precision: torch.dtype = torch.float64,
) -> Iterator[Tile]:
    """The kernel a piece at a time, for kernels that do not fit in memory.

    With x2 None only pieces on and below the diagonal come; the others are their transposes.

    Args:
        output: the kernel of this output alone, (n1, n2); default the full kernel (n1 * O, n2 * O).

    The other arguments and the errors are those of `empirical_ntk`.

    Raises:
        NsrlError: there is no such output; as `empirical_ntk`.
    """
    if x2 is not None:
        refuse_mismatch(x1, x2)
    linearise = _Lineariser(model, x1, forward, batch_size)
    if output is not None and not 0 <= output < linearise.outputs:
        raise NsrlError(f"there is no output {output}: the model has outputs 0 to {linearise.outputs - 1}")
    yield from _tiles(linearise, x1, x2, precision, output)


class _Lineariser:
    """Jacobians of batches of one model.

    Attributes:
        outputs: number of outputs of the model.
        device: of the outputs.
        batch_size: samples to linearise at once.
    """

    def __init__(self, model: nn.Module, inputs: Any, forward: Forward | None, batch_size: int | None):
        if batch_size is not None and batch_size < 1:
            raise NsrlError(f"batch_size must be at least 1, not {batch_size}")
        self._model, self._forward = model, forward
        # Batches that are known to be of single samples: a kernel comes back to each of them.
        self._seen: set[tuple[int, int, int]] = set()
        few = min(count_samples(inputs), PROBE)
        probe = self(inputs, 0, few)
        if probe.outputs.shape[0] != few:
            raise NsrlError(f"the model made {probe.outputs.shape[0]} rows of output from {few} samples")
        self.outputs, self.device = probe.outputs.shape[1], probe.outputs.device
        a_sample = max(probe.nbytes() // few, 1)
        self.batch_size = batch_size or max(1, min(BATCH_BYTES // a_sample, BATCH_ROWS // self.outputs))

    def __call__(self, inputs: Any, start: int, stop: int, output: int | None = None) -> FactoredJacobian:
        """Jacobian of the samples from start to stop, of all outputs or of one."""

        def pick(outputs: Tensor) -> Tensor:
            return torch.eye(self.outputs).to(outputs)[output].expand(outputs.shape[0], 1, -1)

        batch = id(inputs), start, stop
        result = jacobian(
            self._model,
            take_samples(inputs, start, stop),
            forward=self._forward,
            seed=None if output is None else pick,
            check=batch not in self._seen,
        )
        self._seen.add(batch)
        return result


def _tiles(linearise: _Lineariser, x1: Any, x2: Any, precision: torch.dtype, output: int | None) -> Iterator[Tile]:
    rows_a_sample = linearise.outputs if output is None else 1

    def rows(start: int, stop: int) -> slice:
        return slice(start * rows_a_sample, stop * rows_a_sample)

    for start, stop in _batches(count_samples(x1), linearise.batch_size):
        ours = linearise(x1, start, stop, output)
        here = rows(start, stop)
        # of a symmetric kernel the batches before this one are enough
        others, until = (x1, start) if x2 is None else (x2, count_samples(x2))
        for begin, end in _batches(until, linearise.batch_size):
            yield Tile(here, rows(begin, end), ours.cross_gram(linearise(others, begin, end, output), precision))
        if x2 is None:
            yield Tile(here, here, ours.gram(precision))


def _batches(samples: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, samples, size):
        yield start, min(start + size, samples)


def _refuse_size(shape: tuple[int, ...], kind: Kind, device: torch.device, precision: torch.dtype) -> None:
    needed, free = torch.Size(shape).numel() * precision.itemsize, available_bytes(device)
    if free is not None and needed > free:
        smaller = "" if kind == "trace" else ' or ask for kind="trace"'
        raise NsrlError(
            f"the {kind} kernel has shape {shape} and takes {readable_bytes(needed)}, but only "
            f"{readable_bytes(free)} of memory are free; walk it in pieces with nsrl.ntk.ntk_tiles{smaller}"
        )
