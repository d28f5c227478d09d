"""Any training loop inside a KL budget on preserved tokens: `protect_module`.

Everything happens in the optimizer's own step hooks, so that the loop, transformers' Trainer or trl's trainers run as
they are:

    before a step   multiplier * grad KL of one preserved batch is added to the gradients (a Lagrangian gradient)
    after a step    every `project_every` steps the way since the reference is projected; every `measure_every` steps
                    the KL is measured on all preserved tokens and, where it is over the budget, brought back

The promise: after every measurement, and so after `enforce()`, `finish()`, `state_dict()` and the end of a `with`
block, the mean KL(then || now) over the preserved tokens is at most `kl_budget`, measured in evaluation mode on the
parameters as they are. Between two measurements it may be larger. It is a statement about the preserved tokens.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nsrl.editing.post_training.options import GuardOptions
from nsrl.editing.post_training.preserved import Preserved, Reference
from nsrl.editing.post_training.replicas import Replicas, refuse_sharded, unwrapped
from nsrl.editing.post_training.report import GuardReport
from nsrl.editing.post_training.token_budget import Projector, TokenBudget
from nsrl.editing.post_training.way import Way, feature_projection, kronecker_projection
from nsrl.editing.retention_file import RetentionFile
from nsrl.errors import NsrlError, nearest
from nsrl.projection.optimizer import FlatParameters, StepHooks

if TYPE_CHECKING:
    from typing_extensions import Self

#: Layout of `ModuleGuard.state_dict`.
FORMAT = 1


class ModuleGuard:
    """Keeps what a module answers to preserved tokens; made by `protect_module`.

    Args:
        model: as the loop calls it.
        optimizer: a torch optimizer over some of its parameters.
        preserve: batches, or a retention file.
        options: budget and how.
        resume: a `state_dict()` of before: the reference is that of then, not what the model answers now.
        writer: a TensorBoard writer.

    Attributes:
        replicas: the processes that train the same model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        preserve: Any,
        options: GuardOptions,
        resume: dict[str, Any] | None = None,
        writer: Any = None,
    ):
        self.options = options
        self.model = unwrapped(model)
        self.writer = writer
        refuse_sharded(self.model)
        _refuse_moving_statistics(self.model)
        self._optimizer = _inner(optimizer)
        self._named = self._guarded()
        self.replicas = Replicas(model)
        file = preserve if isinstance(preserve, RetentionFile) else None
        if isinstance(preserve, str | Path):
            file = RetentionFile.load(preserve)
        flat = FlatParameters(list(self._named.values()))
        here = flat.read()
        if resume is not None:
            self._check_state(resume, flat)
            flat.write(resume["reference"].to(here))  # what follows is made where the reference is
        try:
            self.preserved = self._preserved(file, preserve, resume)
            self._begin(flat)
        finally:
            if resume is not None:
                flat.write(here)
        self.steps = 0
        self._moved = False
        self.seconds = {"pull": 0.0, "project": 0.0, "measure": 0.0}
        self._started = time.monotonic()
        if resume is not None:
            self._resume(resume)
        self._hooks = StepHooks(self._optimizer, self._before_step, self._after_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.finish()
        else:
            self.remove()

    def enforce(self) -> GuardReport:
        """Project, measure and bring the KL inside the budget now, whatever the schedule says.

        Raises:
            NsrlError: the parameters are NaN or infinite; the last feasible ones have been put back.
        """
        self._refuse_changes()
        self._project()
        self._enforce()
        return self.report()

    def finish(self) -> GuardReport:
        """Enforce for the last time, and give the optimizer back as it was."""
        report = self.enforce()
        self.remove()
        return report

    def remove(self) -> None:
        """Give the optimizer back as it was, without enforcing."""
        self._hooks.detach()

    def report(self) -> GuardReport:
        """The latest measurement, and what it took."""
        last = self.budget.last
        assert last is not None
        thin = self._projection
        nbytes = {
            "constraint": 0 if thin is None else thin.nbytes(),
            "reference": self.preserved.nbytes(),
            "parameters": self.way.nbytes() + self.budget.feasible.numel() * self.budget.feasible.element_size(),
        }
        return GuardReport(
            kl_mean=last.kl_mean,
            kl_max=last.kl_max,
            agreement=last.agreement,
            kl_budget=self.options.kl_budget,
            tokens=last.tokens,
            steps=self.steps,
            multiplier=self.budget.multiplier.integral,
            kept_share=self.way.kept,
            rank=getattr(thin, "rank", 0),
            parameters=sum(self.way.flat.sizes),
            measurements=self.budget.measurements,
            restorations=self.budget.restorations,
            fallbacks=self.budget.fallbacks,
            seconds={**self.seconds, "all": time.monotonic() - self._started},
            nbytes=nbytes,
            dense_nbytes=thin.dense_nbytes() if hasattr(thin, "dense_nbytes") else 0,
        )

    def state_dict(self) -> dict[str, Any]:
        """Enforce, and return all that a later `protect_module(..., resume=...)` needs: tensors and plain values."""
        self.enforce()
        return {
            "format": FORMAT,
            "kl_budget": self.options.kl_budget,
            "names": list(self._named),
            "preserved": self.preserved.digest,
            "answers": [[r.outputs, r.indices, r.rest] for r in self.preserved.references],
            "steps": self.steps,
            **self.way.progress(),
            "budget": self.budget.progress(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict()`: the reference, the constraint and the schedule are those of then.

        Raises:
            NsrlError: it is of other parameters or other preserved tokens.
        """
        flat = self.way.flat
        self._check_state(state, flat)
        here = flat.read()
        flat.write(state["reference"].to(here))
        try:
            self.preserved = Preserved(
                self.model, self.preserved.batches, self.options.top_k, _references(state, here.device)
            )
            self._begin(flat)
        finally:
            flat.write(here)
        self._resume(state)

    def _preserved(self, file: RetentionFile | None, preserve: Any, resume: dict[str, Any] | None) -> Preserved:
        if file is not None:
            file.check(self.model)
            return file.preserved(self.model)
        held = _references(resume, next(iter(self._named.values())).device) if resume else None
        found = Preserved(self.model, _batches(preserve), self.options.top_k, held)
        if resume is not None and found.digest != resume["preserved"]:
            raise NsrlError("the state is of other preserved tokens; give the same loader, in the same order")
        return found

    def _begin(self, flat: FlatParameters) -> None:
        """Everything that is made where the reference is."""
        options = self.options
        idle = math.isinf(options.kl_budget)
        self.budget = TokenBudget(
            self.preserved,
            flat.parameters,
            options.kl_budget,
            target=options.target,
            multiplier=options.multiplier,
            rate=options.rate,
            damping=options.damping,
            restore_steps=options.restore_steps,
            restore_tokens=options.restore_tokens,
            seed=options.seed,
        )
        self.budget.reduce = self.replicas.largest
        self._projection: Any = None
        project: Projector = _unchanged
        names = list(self._named)
        if options.constraint == "features" and not idle:
            precision = torch.float64 if options.precision == "float64" else torch.float32
            self._projection = feature_projection(
                self.preserved, names, options.energy, options.hold_uncovered, precision
            )
            project = self._projection.null
        elif options.constraint == "kronecker" and not idle:
            self._projection, project = kronecker_projection(
                self.preserved, names, options.kl_budget, options.hold_uncovered, options.seed
            )
        if options.constraint == "features":
            self.budget.projector = None if self._projection is None else project
        self.way = Way(self._named, self._projection if options.constraint == "features" and not idle else project)
        kl = self.budget.binding_divergence()
        if kl > options.kl_budget:
            raise NsrlError(
                f"on the preserved tokens the model is {kl:.3g} nats from the reference before any training, more than "
                f"the budget of {options.kl_budget:g}; give the model that the reference was made with"
            )

    def _before_step(self) -> None:
        self._refuse_changes()
        every = self.options.pull_every
        if every and not math.isinf(self.options.kl_budget) and self.steps % every == 0:
            start = time.monotonic()
            self.budget.add_gradient()
            self.seconds["pull"] += time.monotonic() - start

    def _after_step(self) -> None:
        self.steps += 1
        self._moved = True
        due = self.steps % self.options.measure_every == 0
        if due or self.steps % self.options.project_every == 0:
            self._project()
        if due:
            self._enforce()

    def _project(self) -> None:
        # without a step in between there would be round-off to project
        if self._projection is not None and self._moved:
            self._moved = False
            start = time.monotonic()
            self.way.retract()
            self.seconds["project"] += time.monotonic() - start

    def _enforce(self) -> None:
        start = time.monotonic()
        broken = not bool(torch.isfinite(self.way.flat.read()).all())
        if broken:
            self.way.flat.write(self.budget.feasible)
            self.way.restart()
        changed = self.budget.restorations + self.budget.fallbacks
        self.budget.enforce()
        if self.budget.restorations + self.budget.fallbacks > changed:
            self.way.restart()
        self.replicas.share(self.way.flat)
        self.seconds["measure"] += time.monotonic() - start
        if broken:
            raise NsrlError(
                "the training has diverged: parameters are NaN or infinite; the last ones inside the budget were put "
                "back. Lower the learning rate or clip the gradients, and make a new optimizer: this one's moments "
                "have diverged too"
            )
        if self.writer is not None:
            self._write()

    def _write(self) -> None:
        report = self.report()
        for tag, value in (
            ("retain/kl_mean", report.kl_mean),
            ("retain/kl_max", report.kl_max),
            ("retain/agreement", report.agreement),
            ("nullspace/rank", report.rank),
            ("nullspace/rank_fraction", report.rank / report.parameters),
            ("nullspace/multiplier", report.multiplier),
            ("nullspace/update_kept", report.kept_share),
            ("nullspace/restore_steps", report.restorations),
            ("nullspace/rollbacks", report.fallbacks),
            ("nullspace/overhead_fraction", report.overhead_fraction),
        ):
            self.writer.add_scalar(tag, value, self.steps)

    def _guarded(self) -> dict[str, nn.Parameter]:
        """Trainable parameters of the model that the optimizer moves, in the model's order."""
        moved = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        found = {n: p for n, p in self.model.named_parameters() if p.requires_grad and id(p) in moved}
        if not found:
            raise NsrlError("the optimizer moves no trainable parameter of this model; make it from model.parameters()")
        return found

    def _refuse_changes(self) -> None:
        now = self._guarded()
        if len(now) != len(self._named) or any(now.get(name) is not p for name, p in self._named.items()):
            raise NsrlError(
                "the trainable parameters of the model or of its optimizer are others than when it was protected; "
                "remove the guard and protect the module again after such a change"
            )

    def _check_state(self, state: dict[str, Any], flat: FlatParameters) -> None:
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise NsrlError("this is no state of a guard, or one of another version; give what state_dict() returned")
        if state["names"] != list(self._named) or len(state["reference"]) != sum(flat.sizes):
            raise NsrlError("the state is of a guard over other parameters; resume with the same model and optimizer")
        known = getattr(self, "preserved", None)
        if known is not None and state["preserved"] != known.digest:
            raise NsrlError("the state is of other preserved tokens; give the same loader, in the same order")

    def _resume(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])
        self.way.resume(state)
        self.budget.resume(state["budget"])
        if state["kl_budget"] != self.options.kl_budget:
            warnings.warn(
                f"resumed with a budget of {self.options.kl_budget:g} nats where it was {state['kl_budget']:g}",
                stacklevel=3,
            )


def protect_module(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    preserve: Any,
    kl_budget: float = GuardOptions.kl_budget,
    *,
    resume: dict[str, Any] | None = None,
    writer: Any = None,
    **options: Any,
) -> ModuleGuard:
    """Keep what a model answers to some tokens while any loop trains it.

        guard = protect_module(model, optimizer, preserve=loader, kl_budget=0.02)
        ...                              # your loop, or a Trainer: nothing changes
        print(guard.finish().kl_mean)    # measured, at most 0.02 nats a token

    Args:
        model: a module that gives logits (..., classes): a transformers model, one with peft's adapters, one inside
            DistributedDataParallel, or any other. Parameters that are frozen or that the optimizer does not hold stay
            out of it.
        optimizer: any torch optimizer. Its moments, its decay, clipping and the accumulation of gradients are the
            loop's: what it does is projected, not only what it is given.
        preserve: batches (mappings with "input_ids" and "attention_mask", tensors, or tuples that begin with one), a
            `RetentionFile` or its path. They are read once, and held.
        kl_budget: largest mean KL(then || now), nats a token; infinity only measures.
        resume: what `state_dict()` returned in the run that goes on here.
        writer: a TensorBoard writer for `retain/` and `nullspace/` tags.
        options: other fields of `GuardOptions`.

    Raises:
        NsrlError: an unknown option or a bad value; nothing to preserve; parameters that are sharded, or no parameters;
            layers with moving statistics; a retention file of another model; a state of another guard.
    """
    known = {field.name for field in fields(GuardOptions)}
    for name in options:
        if name not in known:
            hint = nearest(name, known)
            told = f"did you mean {hint}?" if hint else f"there are {', '.join(sorted(known))}"
            raise NsrlError(f"protect_module has no option {name!r}; {told}")
    chosen = replace(GuardOptions(), kl_budget=float(kl_budget), **options)
    return ModuleGuard(model, optimizer, preserve, chosen, resume, writer)


def _unchanged(displacement: Tensor) -> Tensor:
    return displacement


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer itself: accelerate wraps it in one whose step is the inner one's."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise NsrlError(
            f"the optimizer is a {type(optimizer).__name__}, which has no step hooks; give a torch.optim.Optimizer"
        )
    return optimizer


def _batches(preserve: Any) -> Iterable[Any]:
    if isinstance(preserve, Tensor):
        return [preserve]
    if isinstance(preserve, dict):
        return [preserve]
    if not isinstance(preserve, Iterable):
        raise NsrlError(f"preserve is a {type(preserve).__name__}; give batches of token ids, or a retention file")
    return preserve


def _references(state: dict[str, Any], device: torch.device) -> list[Reference]:
    return [Reference(*answer).to(device) for answer in state["answers"]]


def _refuse_moving_statistics(model: nn.Module) -> None:
    for name, child in model.named_modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.track_running_stats and child.training:
            raise NsrlError(
                f"{name}: its running statistics move with every batch, outside of the optimizer; put it into "
                "evaluation mode, or use a layer norm"
            )
