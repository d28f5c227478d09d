"""The way of the parameters since a pinned reference, projected: W_ref + P(W - W_ref), whatever the optimizer did.

Projecting the whole way and not the single step is a retraction: nothing adds up, however many steps lie in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nsrl.editing.post_training.preserved import Preserved, called, evaluated
from nsrl.errors import NsrlError
from nsrl.projection.constraints.features import FeatureConstraint
from nsrl.projection.constraints.filters import Budget, Hard
from nsrl.projection.constraints.kronecker import KroneckerConstraint
from nsrl.projection.constraints.thin import ThinProjection
from nsrl.projection.jacobians.columns import parameter_columns
from nsrl.projection.jacobians.linearise import jacobian
from nsrl.projection.optimizer import FlatParameters

Kind = Literal["features", "kronecker", "none"]

#: Numbers that the rows of a Kronecker factor's batch may hold.
AT_ONCE = 2**24


class Way:
    """The way since the reference, and its projection.

    Weights in half precision are written rounded, and the rest is remembered in float32: what the optimizer adds to the
    rounded weights is added to the exact way, so that neither small steps nor the projection are lost in rounding.

    Args:
        parameters: those that move, by name, in the order of the columns.
        project: P, from a displacement (P,) to one (P,), or a thin projection, which works layer by layer.
        reference: where the way begins, (P,); default here.

    Attributes:
        kept: |P d| / |d| of the latest projection; of a thin one in the layers that it protects.
    """

    kept = 1.0

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        project: Callable[[Tensor], Tensor] | ThinProjection,
        reference: Tensor | None = None,
    ):
        self.flat = FlatParameters(list(parameters.values()))
        self.project = project.null if isinstance(project, ThinProjection) else project
        here = self.flat.read()
        self.reference = here if reference is None else reference.to(here)
        rounded = any(p.dtype in (torch.bfloat16, torch.float16) for p in parameters.values())
        self.made = here.float() - self.reference.float() if rounded else None
        self.written = here if rounded else None
        whole = all(p.is_contiguous() and p.dtype == here.dtype for p in parameters.values())
        self._thin = project if isinstance(project, ThinProjection) and whole and not rounded else None

    def retract(self) -> None:
        """Project the way, and put the parameters there."""
        if self._thin is not None:
            self.kept = self._thin.retract([p.data for p in self.flat.parameters], self.reference)
            return
        here = self.flat.read()
        if self.made is None or self.written is None:
            way = here - self.reference
            projected = self.project(way)
            # What is free keeps its bits: to go to the reference and back would round.
            self.flat.write(torch.where(projected == way, here, self.reference + projected))
        else:
            way = self.made + (here.float() - self.written.float())
            projected = self.project(way)
            self.flat.write(self.reference.float() + projected)
            self.made, self.written = projected, self.flat.read()
        norm = float(way.norm())
        self.kept = float(projected.norm()) / norm if norm > 0.0 else 1.0

    def restart(self) -> None:
        """Somebody else has moved the parameters: the way is from the reference to where they are."""
        if self.made is not None:
            self.written = self.flat.read()
            self.made = self.written.float() - self.reference.float()

    def progress(self) -> dict[str, Any]:
        """The pinned reference, and what rounding has held back."""
        return {"reference": self.reference.clone(), "made": self.made, "written": self.written}

    def resume(self, progress: dict[str, Any]) -> None:
        """Go on from there."""
        self.reference = progress["reference"].to(self.reference)
        if self.made is not None:
            self.made, self.written = progress["made"], progress["written"]

    def nbytes(self) -> int:
        """Memory held, in bytes."""
        held = (self.reference, self.made, self.written)
        return sum(t.numel() * t.element_size() for t in held if t is not None)


def feature_projection(
    preserved: Preserved, names: list[str], energy: float, hold_uncovered: bool, precision: torch.dtype
) -> ThinProjection:
    """The null space of what every layer saw of the preserved tokens.

    Args:
        preserved: whose inputs are run through the module, padding left out.
        names: parameters that own columns.
        energy: share of every layer's feature energy that is protected, in (0, 1].
        hold_uncovered: norm scales, embeddings and tied heads do not move at all.
        precision: of the products.

    Raises:
        NsrlError: no layer has features to protect, or nothing would be left to train.
    """
    module = preserved.module
    constraint = FeatureConstraint(module, names)
    with evaluated(module):
        for batch in preserved.batches:
            constraint.update(module, batch.inputs, called, batch.mask)
    if not constraint.covered:
        raise NsrlError(
            "no trainable layer has features to protect (Linear, Conv and transformers' Conv1D have); take "
            "constraint='none', with which the KL budget alone minds them"
        )
    constraint.consolidate(Hard() if energy == 1.0 else Hard(energy=energy))
    thin = ThinProjection.of(constraint, precision, hold_uncovered)
    if thin.rank >= thin.width:
        raise NsrlError(
            "the preserved tokens fill the features of every layer, so that nothing could be learnt; protect a share "
            "of their energy (energy=0.9), preserve fewer tokens, or take constraint='none'"
        )
    return thin


def kronecker_projection(
    preserved: Preserved, names: list[str], kl_budget: float, hold_uncovered: bool, seed: int
) -> tuple[KroneckerConstraint, Callable[[Tensor], Tensor]]:
    """As little as has to be taken for the Kronecker-factored model of the KL to be inside the budget.

    The factors are those of one backward pass a draw: classes drawn from the module's own answers stand for the
    Hessian of the KL. Sequences are taken without their padding, of one length at a time.

    Args:
        preserved: whose inputs are run through the module.
        names: parameters that own columns.
        kl_budget: that the model keeps, nats a token.
        hold_uncovered: parameters without factors do not move at all.
        seed: of the draws.

    Raises:
        NsrlError: no layer has factors.
    """
    module = preserved.module
    probe = FeatureConstraint(module, names)
    linear = sorted(set(names) - set(probe.uncovered))
    if not linear:
        raise NsrlError("no trainable layer has Kronecker factors; take constraint='none'")
    columns = parameter_columns(module, names)
    # The linear layers' own columns, between those of the others.
    inner = KroneckerConstraint(parameter_columns(module, linear))
    generator = torch.Generator().manual_seed(seed)
    for inputs, positions in _unpadded(preserved):
        with evaluated(module):
            rows = jacobian(
                module,
                inputs,
                forward=lambda module, given: called(module, given).flatten(1),
                parameters=linear,
                seed=partial(_drawn, positions, generator),
                scale=preserved.tokens**-0.5,
                check=False,
            )
        inner.update(rows)
    factored = set(inner.covered)
    places = torch.cat([torch.arange(*columns[name]) for name in inner.columns])
    free = [columns[name] for name in names if name not in factored] if hold_uncovered else []

    def project(displacement: Tensor) -> Tensor:
        out = displacement.clone()
        out[places] = inner.project(displacement[places], Budget(kl_budget)).displacement
        for start, stop in free:
            out[start:stop] = 0.0
        return out

    return inner, project


def _unpadded(preserved: Preserved) -> Iterator[tuple[dict[str, Any], int]]:
    """Sequences without padding, grouped by length, and the length."""
    groups: dict[int, list[Tensor]] = {}
    for batch in preserved.batches:
        inputs = batch.inputs if isinstance(batch.inputs, dict) else {}
        ids = inputs.get("input_ids")
        if ids is None:
            raise NsrlError("constraint='kronecker' needs batches with 'input_ids'; take 'features' or 'none'")
        for row, sequence in enumerate(ids):
            real = sequence if batch.mask is None else sequence[batch.mask[row]]
            if len(real):
                groups.setdefault(len(real), []).append(real)
    for length, sequences in sorted(groups.items()):
        for part in torch.stack(sequences).split(max(1, AT_ONCE // (length * 1024))):
            yield {"input_ids": part}, length


def _drawn(positions: int, generator: torch.Generator, outputs: Tensor) -> Tensor:
    """One row a sample, e_y - p at every position with y drawn from p: S^T S = H on average, (N, 1, T V)."""
    logits = outputs.view(len(outputs) * positions, -1)
    p = torch.softmax(logits, -1)
    chosen = torch.multinomial(p.cpu(), 1, generator=generator).to(p.device)
    return (torch.zeros_like(p).scatter_(1, chosen, 1.0) - p).view(len(outputs), 1, -1)
