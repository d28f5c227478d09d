"""The recorder: rides on an optimizer's step hooks and adds up path integrals on a set of queries as training runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nsrl.errors import NsrlError
from nsrl.ntk.path.result import PathResult, StepRecord
from nsrl.ntk.path.rules import Rule, find_rule
from nsrl.ntk.path.steps import gradient_scale
from nsrl.ntk.path.weightings import KernelNode, Weighting, contribution
from nsrl.projection.jacobians.factored import FactoredJacobian
from nsrl.projection.jacobians.fallback import Forward
from nsrl.projection.jacobians.linearise import jacobian
from nsrl.projection.optimizer import FlatParameters, StepHooks

_UNRECORDED: ContextVar[bool] = ContextVar("unrecorded", default=False)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Within the block a recorder takes no call of its module for training; gradients are on."""
    token = _UNRECORDED.set(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        _UNRECORDED.reset(token)


@dataclass(frozen=True)
class _Batch:
    """Samples of one optimizer step: their Jacobian at its start, dL/df, who they are, and whether it is the first."""

    jacobian: FactoredJacobian
    cotangents: Tensor
    indices: Tensor
    first: bool


class PathRecorder:
    """Records the path of a module's parameters under any `torch.optim.Optimizer`, on queries, without checkpoints.

        recorder = PathRecorder(model, optimizer, queries, samples=len(x))
        for _ in range(steps):                      # the training loop as it is
            optimizer.zero_grad(); loss(model(x), y).backward(); optimizer.step()
        result = recorder.result()                  # result.predicted, .certificate, .contributions, .rest

    The samples of a step are what the module was called with, with gradients on, since the step before; call
    `expect(indices)` ahead of a minibatch to say which they are, or `add_batch` where the module is not called itself.
    Training goes exactly as without the recorder.

    Args:
        module: in eval mode or without dropout and batch normalisation.
        optimizer: what moves it.
        queries: inputs on which predictions are followed, N samples.
        rule: "left", "midpoint", "gauss2", "gauss3" (see `RULES`) or a `Rule`; each node costs a Jacobian of the
            queries a step.
        samples: number of training samples M, for per-sample contributions; None records none.
        weightings: what else is summed up, by name, beside "contribution".
        query_slope: derivative of the queries' loss in their outputs, (N, O) -> (N, O), for `tracin` and its kin.
        forward: function (module, inputs) -> outputs (N, O); default `module(inputs)`.
        parameters: names of the followed parameters; default all trainable ones.
        memory: batches kept, so that momentum's share of an earlier batch can be told from the rest; 1 keeps the
            present one only.
        residuals: keep a `StepRecord` of every step, for one more Jacobian a step.

    Raises:
        NsrlError: an unknown rule, a parameter that the optimizer does not have, bad numbers.
        JacobianError: a random module, batch normalisation or dropout in train mode.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        queries: Any,
        *,
        rule: str | Rule = "gauss3",
        samples: int | None = None,
        weightings: Mapping[str, Weighting] | None = None,
        query_slope: Callable[[Tensor], Tensor] | None = None,
        forward: Forward | None = None,
        parameters: Sequence[str] | None = None,
        memory: int = 1,
        residuals: bool = False,
    ):
        if memory < 1 or (samples is not None and samples < 1):
            raise NsrlError(f"memory and samples must be at least 1, not {memory} and {samples}")
        self.module = module
        self.optimizer = optimizer
        self.queries = queries
        self.rule = find_rule(rule)
        self.samples = samples
        self.weightings = {"contribution": contribution, **(weightings or {})} if samples else {}
        self.query_slope = query_slope
        self.residuals = residuals
        self._forward: Forward = forward or (lambda module, inputs: module(inputs))
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        unknown = [name for name in parameters or () if name not in named]
        if unknown:
            raise NsrlError(f"the module has no trainable parameter {', '.join(unknown)}; it has {', '.join(named)}")
        self.names = tuple(name for name in named if parameters is None or name in parameters)
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        strange = [name for name in self.names if id(named[name]) not in owned]
        if strange or not self.names:
            raise NsrlError(f"the optimizer does not have {', '.join(strange) or 'any parameter'} of the module")
        self.flat = FlatParameters([named[name] for name in self.names])
        self._checked: set[str] = set()
        self._calls: list[tuple[Any, Tensor]] = []
        self._given: list[tuple[Any, Tensor, Tensor]] = []
        self._expected: Tensor | None = None
        self._batches: deque[_Batch | None] = deque(maxlen=memory)
        self._raw: dict[nn.Parameter, Tensor] = {}
        self.restart()
        self._hooks = StepHooks(optimizer, self._before_step, self._after_step)
        self._watches: list[RemovableHandle] = []
        if samples:
            self._watches.append(module.register_forward_hook(self._on_forward))
            self._watches += [p.register_post_accumulate_grad_hook(self._on_gradient) for p in self.flat.parameters]

    def restart(self, samples: int | None = None) -> None:
        """Begin a new path here, of `samples` training samples (default: as many as before).

        Raises:
            NsrlError: the model has no outputs on the queries.
        """
        if samples is not None and self.samples is not None:
            self.samples = samples
        self._calls.clear()
        self._given.clear()
        self._batches.clear()
        self._raw.clear()
        self._here = self.flat.read()
        self._initial = self._evaluate()
        if not self._initial.numel():
            raise NsrlError(f"there are no queries to follow: the outputs have shape {tuple(self._initial.shape)}")
        self._steps = torch.zeros_like(self._initial)
        self._outside = torch.zeros_like(self._initial)
        self._totals: dict[str, Tensor] = {}
        self._history: list[StepRecord] = []

    def expect(self, indices: Tensor | Sequence[int]) -> None:
        """Which training samples the coming batch is made of, (B,); without it they are 0 to B - 1."""
        self._expected = torch.as_tensor(indices, dtype=torch.long)

    def add_batch(self, inputs: Any, cotangents: Tensor, indices: Tensor | Sequence[int]) -> None:
        """Say by hand what the coming step is made of: inputs of B samples, dL/df (B, O), and which they are (B,)."""
        self._given.append((inputs, cotangents.detach(), torch.as_tensor(indices, dtype=torch.long)))

    def flush(self) -> None:
        """Take in what has moved the parameters since the last step."""
        now = self.flat.read()
        if not torch.equal(now, self._here):
            with self._parked(now):
                for change, _ in self._nodes(self._here, now):
                    self._outside += change
        self._here = now

    def result(self) -> PathResult:
        """The path from the start, or the last `restart`, to here."""
        self.flush()
        final = self._evaluate()
        predicted = self._initial + self._steps + self._outside
        moved = (final - self._initial).norm(dim=1)
        error = (final - predicted).norm(dim=1)
        totals = {name: total.clone() for name, total in self._totals.items()}
        owned = totals["contribution"].sum(-1) if totals else torch.zeros_like(self._steps)
        return PathResult(
            self._initial.clone(),
            final,
            predicted,
            self._steps.clone(),
            self._outside.clone(),
            totals,
            self._steps - owned,
            torch.where(moved > 0, error / moved.clamp_min(1e-300), error),
            tuple(self._history),
        )

    def detach(self) -> None:
        """Stop recording; results stay."""
        self.flush()
        self._hooks.detach()
        for watch in self._watches:
            watch.remove()

    # -- hooks ------------------------------------------------------------------------------------------------------

    def _on_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if (
            _UNRECORDED.get()
            or not isinstance(output, Tensor)
            or not output.requires_grad
            or not torch.is_grad_enabled()
        ):
            return
        if not args:
            raise NsrlError("the module was called with keywords alone; give its samples to add_batch, or no `samples`")
        inputs = args[0].detach() if isinstance(args[0], Tensor) else args[0]
        output.register_hook(lambda gradient: self._calls.append((inputs, gradient.detach().clone())))

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        if not _UNRECORDED.get() and parameter.grad is not None:
            self._raw[parameter] = parameter.grad.detach().clone()

    def _before_step(self) -> None:
        self.flush()
        if self.samples:
            self._batches.appendleft(self._take_batch())

    def _after_step(self) -> None:
        now = self.flat.read()
        with self._parked(now):
            for change, queries in self._nodes(self._here, now):
                self._steps += change
                self._attribute(*queries)
            if self.residuals:
                self._record(now)
        self._here = now

    def _take_batch(self) -> _Batch | None:
        pieces = self._given + [(x, c, self._indices(len(c))) for x, c in self._calls]
        raw, self._calls, self._given, self._expected, self._raw = self._raw, [], [], None, {}
        if not pieces:
            return None
        if len(pieces) > 1:
            raise NsrlError(
                "the module was differentiated more than once for one step; call it for other ends inside "
                "nsrl.ntk.path.unrecorded(), or give the samples in one piece with add_batch"
            )
        inputs, cotangents, indices = pieces[0]
        strange = [index for index in indices.tolist() if not 0 <= index < (self.samples or 0)]
        if len(indices) != len(cotangents) or strange:
            raise NsrlError(
                f"a batch of {len(cotangents)} samples needs as many indices from 0 to {(self.samples or 0) - 1}, "
                f"not {len(indices)}{f' with {strange[0]} among them' if strange else ''}; see PathRecorder.expect"
            )
        with unrecorded():
            factors = self._linearise("batch", inputs)
        cotangents = cotangents.to(factors.outputs)
        first = not any(self.optimizer.state.get(p) for p in self.flat.parameters)
        return _Batch(factors, self._clipping(raw, factors, cotangents) * cotangents, indices, first)

    def _clipping(self, raw: dict[nn.Parameter, Tensor], factors: FactoredJacobian, cotangents: Tensor) -> float:
        """What the optimizer is given, as a multiple of what the backward pass left: clipping scales all of it."""
        if raw:
            asked = torch.cat([raw.get(p, torch.zeros_like(p)).flatten() for p in self.flat.parameters])
        else:  # the gradients were written by hand
            asked = factors.rmatvec(cotangents.flatten())
        asked = asked.to(factors.outputs)
        return float(asked @ self.flat.gradient().to(asked)) / max(float(asked @ asked), 1e-300)

    def _indices(self, count: int) -> Tensor:
        return torch.arange(count) if self._expected is None else self._expected

    # -- along a segment --------------------------------------------------------------------------------------------

    def _nodes(self, start: Tensor, end: Tensor) -> Iterator[tuple[Tensor, tuple[FactoredJacobian, float]]]:
        """The change of the queries node by node, (N, O), with their Jacobian and the weight there."""
        displacement = end - start
        for node, weight in zip(self.rule.nodes, self.rule.weights, strict=True):
            self.flat.write(start + node * displacement)
            factors = self._linearise("queries", self.queries)
            yield weight * factors.matvec(displacement).view_as(self._initial), (factors, weight)

    def _attribute(self, factors: FactoredJacobian, weight: float) -> None:
        slopes = None if self.query_slope is None else self.query_slope(factors.outputs)
        rows: Tensor | None = None
        for lag, batch in enumerate(self._batches):
            if batch is None:
                continue
            scale = gradient_scale(self.optimizer, self.flat.parameters, lag, batch.first)
            if scale is None:
                continue
            if isinstance(scale, float):
                kernel = scale * factors.cross_gram(batch.jacobian)
            else:
                rows = factors.dense() if rows is None else rows
                kernel = batch.jacobian.matmat((rows * scale.to(rows)).T).T
            queries, outputs = self._initial.shape
            kernel = weight * kernel.to(self._initial).view(queries, outputs, -1, outputs)
            node = KernelNode(kernel, batch.cotangents, slopes)
            for name, weighting in self.weightings.items():
                self._add(name, weighting(node), batch.indices)

    def _add(self, name: str, values: Tensor, indices: Tensor) -> None:
        if name not in self._totals:
            self._totals[name] = values.new_zeros(*values.shape[:-1], self.samples or 0)
        self._totals[name].index_add_(-1, indices.to(values.device), values)

    def _record(self, now: Tensor) -> None:
        self.flat.write(self._here)
        factors = self._linearise("queries", self.queries)
        displacement = now - self._here
        self.flat.write(now)
        change = self._evaluate() - factors.outputs
        linear = factors.matvec(displacement).view_as(change)
        self._history.append(
            StepRecord(float(displacement.norm()), float(change.norm()), float((change - linear).norm()))
        )

    def _linearise(self, kind: str, inputs: Any) -> FactoredJacobian:
        # Factors are compared with autograd every time; that samples do not meet is seen once.
        result = jacobian(
            self.module, inputs, forward=self._forward, parameters=self.names, check=kind not in self._checked
        )
        self._checked.add(kind)
        return result

    def _evaluate(self) -> Tensor:
        with unrecorded(), torch.no_grad():
            return self._forward(self.module, self.queries).detach().clone()

    @contextmanager
    def _parked(self, end: Tensor) -> Iterator[None]:
        """The parameters may be moved along the path, and are back at `end`, bit for bit, afterwards."""
        try:
            with unrecorded():
                yield
        finally:
            self.flat.write(end)
