"""Retention: what happens around and inside one policy update so that the KL budget holds after it.

    begin   remember the feasible parameters; linearise if the configuration projects inside the update
    before  every optimizer step: shape the gradient (Lagrangian or projected)
    after   every optimizer step: project the realised displacement
    end     measure on the whole buffer; restore (Gauss-Newton on all states); if that fails, fall back along the
            segment to the last feasible parameters
    abandon in place of the end, after an exception: back to the last feasible parameters

Where the new task has units to itself, the update is confined to them instead: the gradient before every step, the
displacement at the end, which is then in the null space itself (`nsrl.rl.opening.block`), whatever its length.

It attaches to the optimizer's own step hooks, so the algorithm's `train()` is the stock one.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor

from nsrl.errors import NsrlError
from nsrl.projection.budget.enforcement import Enforcement
from nsrl.projection.budget.model import Projection
from nsrl.projection.budget.multiplier import Multiplier
from nsrl.projection.budget.projection import SpectralProjection
from nsrl.projection.optimizer import StepHooks
from nsrl.reading.limits import Unreadable
from nsrl.reading.values import finite, mapping, whole
from nsrl.rl.budget.config import RetentionConfig
from nsrl.rl.budget.confinement import Confinement
from nsrl.rl.budget.draws import StateDraw, active_subset
from nsrl.rl.budget.premises import Premises
from nsrl.rl.opening.spread import ExplorationSpread
from nsrl.rl.opening.stage import Opening
from nsrl.rl.retention.constraint import Evaluation, Measurement, RetentionConstraint
from nsrl.rl.retention.packing import packed, training_states, unpacked
from nsrl.rl.retention.states import RetainedStates

#: What the displacements of updates are multiplied by after one that was rolled back, down to the least, and after one
#: that was not, up to 1.
SHORTER, LEAST_STRIDE, LONGER = 0.5, 1e-3, 1.1
#: Roll-backs in a row after which a warning says so.
MANY = 3

#: Roll-outs in which only the critic learns, where the old behaviour pays in the new task: a fresh critic's advantages
#: are noise at first.
WARMUP_WHERE_IT_PAYS = 4

#: Measured over mean KL, at most, that the aim of the multiplier is lowered for.
MOST_GAP = 100.0

#: Relative difference of a measured KL that rounding may explain.
ROUNDING = 1e-4

#: Rows that are decomposed to say what the rank is: at most, and where there are more, since their time is cubic.
DIAGNOSED, SHOWN = 1536, 512

#: Rows that are decomposed at most to project inside an update.
LINEARISED = 8192

#: Entries of a state that checkpoints of older versions, or of other engines, do not have.
ADDED = (
    *("restored", "guess", "stride", "kl_most", "held", "opening", "exploration"),
    *("refreshes", "refreshed", "constant"),
)


class Retention:
    """Keeps one algorithm's policy inside the budget.

    Args:
        model: an SB3 on-policy algorithm with one optimizer (PPO, A2C, ...).
        constraint: policy against buffer.
        config: how.

    Attributes:
        exploration: the standard deviation that the new task is explored with; None where there is none of its own.
        opening: the stage before the first roll-out.
        last: measurement after the latest update.
        multiplier: the dual variable.
        enforcement: what brings the policy back inside the budget.
        updates: policy updates made.
        restored: Gauss-Newton restorations made.
        rollbacks: updates that had to fall back towards the last feasible parameters.
        refreshes: buffers that have taken the place of the first one.
        given: digest of the first one.
        kl_most: largest KL that counted against the budget behind an update.
        held: updates behind which it was within the budget.
        stride: what is made of the displacement of an update: 1, and less after updates that were rolled back.
    """

    def __init__(self, model: OnPolicyAlgorithm, constraint: RetentionConstraint, config: RetentionConfig):
        self.model = model
        self.exploration: ExplorationSpread | None = None
        self.constraint = constraint
        self.config = config
        self.multiplier = Multiplier(config.target * config.kl_budget, config.rate, config.damping)
        aim = config.target * config.kl_budget if config.kl_budget > 0 else 0.25 * config.tolerance
        self.enforcement = Enforcement(constraint, config.tolerance, aim, config.restore_steps)
        self.refreshes = 0
        self._first = constraint.buffer
        self.given = self._first.digest()
        self._draw_from(constraint)
        # baselines are compared as they are; a number opens them as everybody else
        setting = "off" if config.opening == "auto" and not self.enforces else config.opening
        spend = config.opening_budget * config.tolerance
        self.opening = Opening(constraint, setting, config.opening_states, spend, config.seed)
        self.updates = 0
        self.restored = 0
        self.rollbacks = 0
        self.kl_most = 0.0
        self.held = 0
        self.stride = 1.0
        self._in_a_row = 0
        self.last: Measurement = constraint.measure()
        self.premises = Premises(model, constraint)
        self._feasible, self._still = constraint.parameters.read(), self.premises.still()
        self._start = self._feasible
        stages = ("linearise", "lagrangian", "project", "confine", "measure", "restore")
        self.seconds = dict.fromkeys(stages, 0.0)
        self._coefficients: list[float] = []
        self._projections: list[Projection] = []
        self._gap = 1.0
        self._hooks: StepHooks | None = None
        self._projector: SpectralProjection | None = None
        self._confinement: Confinement | None = None
        self._constant: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """All but what lives within an update only."""
        return {**vars(self), "_hooks": None, "_projector": None, "_confinement": None}

    def verify(self) -> None:
        """Raise NsrlError unless what the budget rests on is as it was, and the policy inside it.

        Weights that somebody else has set since the last measurement are measured.
        """
        self.premises.check()
        if self.enforces and not self._as_measured():
            kl = self.constraint.binding_divergence()
            if not self.accepts(kl):
                raise NsrlError(
                    f"the policy was given weights that are at a mean KL of {kl:.3g} on the buffer, over the budget of "
                    f"{self.config.kl_budget:g}; give it weights inside the budget, or protect it anew with a buffer "
                    "of its own or a larger kl_budget"
                )
        self._hold()

    def accepts(self, kl: float) -> bool:
        """Whether a KL that counts against the budget is inside it, as far as rounding lets one say."""
        return kl <= self.config.tolerance * (1.0 + ROUNDING)

    def begin(self) -> None:
        """Prepare one policy update."""
        start = perf_counter()
        self.premises.check()
        self.seconds["measure"] += perf_counter() - start
        self._keep_feasible()
        self._take_aim()
        self._steps, self._restored_before = 0, self.restored
        self._coefficients, self._projections = [], []
        self._frozen = self.updates < self.warmup
        self._projector = None
        start = perf_counter()
        self._confinement = self._confined()
        self.seconds["confine"] += perf_counter() - start
        if self.config.projects and not self._frozen and self._confinement is None:
            self._linearise()
        self._hooks = StepHooks(self.model.policy.optimizer, self._before_step, self._after_step)

    def end(self) -> dict[str, float]:
        """Finish one policy update: measure, restore if needed; returns what is worth logging, by TensorBoard tag."""
        self._detach()
        self.model.policy.set_training_mode(False)  # what is measured is the policy as it acts
        proposed = self._make_displacement(self.length() if self.enforces else 1.0)
        restored, rolled_back = self._enforce()
        self._pace(rolled_back)
        # what restorations move is more than the new task's own
        kept = self._confinement is not None and not rolled_back and self.restored == self._restored_before
        constant = self._confinement.constant if kept and self._confinement is not None else None
        self.kl_most = max(self.kl_most, self.last.kl_bound)
        self.held += self.last.kl_bound <= self.config.tolerance
        self.updates += 1
        self.rollbacks += rolled_back
        made = float((self.constraint.parameters.read() - self._feasible).norm())
        self._hold()
        self._constant = None if constant is None else (constant, self._feasible)
        return self._scalars(made / max(float(proposed.norm()), 1e-12), restored)

    def abandon(self) -> None:
        """End an update that an exception has ended: back to the last parameters that were measured inside the budget.

        A baseline, which promises nothing, stays where the exception left it.
        """
        self._detach()
        if self.enforces:
            self._go_back()

    def hold_to(self, buffer: RetainedStates) -> bool:
        """Hold the policy to another buffer of the same reference, from now on: to states that it visits by now, too.

        Where the policy is over the budget there, it is brought inside: by restorations, else along the segment to
        the policy that this engine began with. Where even that is outside, everything stays as it was.

        Args:
            buffer: with the reference's outputs; the old buffer's states are no longer held unless they are in it.

        Returns:
            Whether the buffer was taken.

        Raises:
            NsrlError: the buffer's outputs are not of this policy's kind, or what the budget rests on is not as it was.
        """
        self.premises.check()  # those of the new buffer are read from what is there
        constraint = self.constraint.against(buffer)
        if self.enforces:
            here = constraint.parameters.read()
            if (confinement := self._confined()) is not None:
                confinement.against(constraint).settle()
            enforcement = replace(self.enforcement, retained=constraint)
            try:
                taken = self.accepts(enforcement.keep(self._start).kl)
            except BaseException:
                constraint.parameters.write(here)
                raise
            if not taken:
                constraint.parameters.write(here)
                return False
        self._exchange(constraint)
        self.refreshes += 1
        self.last = constraint.measure()
        self._hold()
        return True

    def _exchange(self, constraint: RetentionConstraint) -> None:
        self.constraint = constraint
        self._constant = None
        self.enforcement = replace(self.enforcement, retained=constraint)
        self.opening.hold_to(constraint)
        self.premises = Premises(self.model, constraint)
        self._draw_from(constraint)

    def _draw_from(self, constraint: RetentionConstraint) -> None:
        self.minibatches = StateDraw(constraint.train, self.config.seed)
        self.subsets = StateDraw(constraint.train, self.config.seed + 1)

    @property
    def warmup(self) -> int:
        """Roll-outs in which only the critic learns: a policy that earns something already has that to lose."""
        record = self.opening.record
        paying = WARMUP_WHERE_IT_PAYS if record is not None and record.pays else 0
        return max(self.config.critic_warmup, paying)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that continue the run where it is (the policy's parameters are not among them)."""
        return {
            "multiplier": self.multiplier.integral,
            "target": self.multiplier.target,
            "gap": self._gap,
            "updates": self.updates,
            "restored": self.restored,
            "rollbacks": self.rollbacks,
            "stride": self.stride,
            "kl_most": self.kl_most,
            "held": self.held,
            "seconds": dict(self.seconds),
            "opening": self.opening.state_dict(),
            "exploration": None if self.exploration is None else self.exploration.log_std,
            "constant": self._known_constant(),
            "refreshes": self.refreshes,
            # of the first buffer, which a run is resumed with, there is no need
            "refreshed": None if self.refreshes == 0 else packed(self.constraint.buffer),
            **{f"minibatches_{key}": value for key, value in self.minibatches.state().items()},
            **{f"subsets_{key}": value for key, value in self.subsets.state().items()},
        }

    def check_state(self, state: Any) -> None:
        """Raise Unreadable unless `state_dict()` can have given this."""
        mapping(state, "retention", [key for key in self.state_dict() if key not in ADDED], ADDED)
        for key in ("multiplier", "target", "gap"):
            finite(state[key], key)
        for key in ("updates", "restored", "rollbacks"):
            whole(state.get(key, 0), key)
        for key, value in mapping(state["seconds"], "seconds", (), self.seconds).items():
            finite(value, key)
        finite(state.get("stride", 1.0), "stride", 0.0)
        finite(state.get("kl_most", 0.0), "kl_most", 0.0)
        whole(state.get("held", 0), "held")
        # earlier versions held what they retained to the budget while they explored with it, where it was wide
        if state.get("exploration") is None and self.exploration is not None:
            raise NsrlError('its run explored with the standard deviation that is retained; resume with opening="off"')
        self.opening.check_state(state.get("opening", self.opening.state_dict()))
        wide, ours = state.get("exploration"), self.exploration
        if (wide is None) != (ours is None) or (ours is not None and not same_kind(wide, ours.log_std)):
            raise Unreadable("the exploration's standard deviation is damaged")
        constant = state.get("constant")
        if constant is not None and not same_kind(constant, self.constraint.reference[0].double()):
            raise Unreadable("the constant of the free units is damaged")
        whole(state.get("refreshes", 0), "refreshes")
        train = self.constraint.train.cpu()
        if state.get("refreshed") is not None:
            train = training_states(unpacked(state["refreshed"]))
        for name in ("minibatches", "subsets"):
            draw = StateDraw(train, 0)
            draw.check_state({key: state[f"{name}_{key}"] for key in ("generator", "queue")})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; call it after the policy's parameters are back."""
        self.multiplier.integral, self.multiplier.target = float(state["multiplier"]), float(state["target"])
        self._gap = float(state["gap"])
        self.updates, self.rollbacks = int(state["updates"]), int(state["rollbacks"])
        self.refreshes = int(state.get("refreshes", 0))
        refreshed = state.get("refreshed")
        buffer = self._first if refreshed is None else unpacked(refreshed)
        if buffer is not self.constraint.buffer:
            self._exchange(self.constraint.against(buffer))
        self.restored = int(state.get("restored", 0))  # checkpoints of older versions did not count them
        self.stride = float(state.get("stride", 1.0))
        self.kl_most, self.held = float(state.get("kl_most", 0.0)), int(state.get("held", self.updates))
        self.seconds.update(state["seconds"])
        if "opening" in state:
            self.opening.load_state_dict(state["opening"])
        else:
            self.opening.leave_out("the run was begun by a version of nsrl without one")
        if self.exploration is not None:
            self.exploration.log_std = state["exploration"].to(self.exploration.log_std)
        for name, draw in (("minibatches", self.minibatches), ("subsets", self.subsets)):
            draw.set_state({key: state[f"{name}_{key}"] for key in ("generator", "queue")})
        self.last = self.constraint.measure()
        constant = state.get("constant")
        device = self.constraint.reference.device
        self._constant = None if constant is None else (constant.to(device), self.constraint.parameters.read())

    @property
    def enforces(self) -> bool:
        """Whether the budget is a promise (baselines only watch it)."""
        return True

    @property
    def hooks(self) -> StepHooks | None:
        """What is done before and after each optimizer step; None outside an update."""
        return self._hooks

    def diagnose(self, states: int = 64) -> tuple[int, float]:
        """Rank of the whitened Jacobian on a few training states, and its effective dimension at the multiplier.

        Policies with many outputs are asked on fewer states and rows: both numbers are lower bounds then.
        """
        count, rows = shown_rows(min(states, len(self.constraint.train)), self.constraint.rows_of_a_state)
        model = self.constraint.linearise(self.constraint.train[:count], rows=rows)
        parts = SpectralProjection.of(model).spectrum
        return parts.rank, parts.effective_dimension(self._damping)

    @property
    def _damping(self) -> float:
        """Lambda of the last projection; for the Lagrangian 1 / (multiplier * learning rate), its equivalent."""
        if self._projections:
            return self._projections[-1].damping
        coefficient = self._coefficients[-1] if self._coefficients else 0.0
        rate = self.model.policy.optimizer.param_groups[0]["lr"]
        return 1.0 / (coefficient * rate) if coefficient > 0.0 and rate > 0.0 else math.inf

    # -- what an update can go back to ------------------------------------------------------------------------------

    def _hold(self) -> None:
        """Take the present parameters for the last feasible ones."""
        self._feasible, self._still = self.constraint.parameters.read(), self.premises.still()

    def _as_measured(self) -> bool:
        still = zip(self._still, self.premises.still(), strict=True)
        return torch.equal(self.constraint.parameters.read(), self._feasible) and all(
            torch.equal(before, now) for before, now in still
        )

    def _keep_feasible(self) -> None:
        """Hold the present parameters; where somebody else has set them, only if they measure inside the budget."""
        if self.enforces and not self._as_measured():
            kl = self.constraint.binding_divergence()
            if not self.accepts(kl):
                warnings.warn(
                    f"the policy was given weights at a mean KL of {kl:.3g} on the buffer, over the budget of "
                    f"{self.config.kl_budget:g}; this update brings it back inside",
                    stacklevel=2,
                )
                return
        self._hold()

    def _go_back(self) -> None:
        self.premises.put_back(self._still)
        self.constraint.parameters.write(self._feasible)

    def _check_kept(self) -> None:
        """Go all the way back, or raise NsrlError, where the way back to the feasible parameters ends outside.

        It does where something moved in the update that is not protected: a buffer, a parameter frozen at the time.
        """
        if self.accepts(self.constraint.binding_divergence()):
            return
        self._go_back()
        kl = self.constraint.binding_divergence()
        if not self.accepts(kl):
            raise NsrlError(
                f"the policy is at a mean KL of {kl:.3g} on the buffer with the very weights that were inside the "
                f"budget of {self.config.kl_budget:g}: something else that it acts by has changed in this update; "
                "check its own modules for what they remember, and protect it again"
            )

    def _detach(self) -> None:
        if self._hooks is not None:
            self._hooks.detach()
            self._hooks = None

    # -- inside the update ------------------------------------------------------------------------------------------

    def _before_step(self) -> None:
        if self._frozen:
            spread: Any = getattr(self.model.policy, "log_std", None)  # not always protected, yet the actor's
            for parameter in [*self.constraint.parameters.parameters, spread]:
                if parameter is not None:
                    parameter.grad = None
            return
        if self._confinement is not None:
            start = perf_counter()
            self._confinement.shape_gradients()
            self.seconds["confine"] += perf_counter() - start
        elif self.config.effective_gradient == "lagrangian":
            self._add_lagrangian()
        elif self.config.effective_gradient == "projected":
            start = perf_counter()
            assert self._projector is not None
            damping = self._projections[-1].damping if self._projections else 0.0
            if not math.isinf(damping):
                flat = self.constraint.parameters
                flat.set_gradient(self._projector.null(flat.gradient(), damping))
            self.seconds["project"] += perf_counter() - start

    def _after_step(self) -> None:
        self._steps += 1
        if self._frozen or self._projector is None or self.config.effective_projection == "none":
            return
        if self._steps % self.config.project_every == 0:
            start = perf_counter()
            flat = self.constraint.parameters
            projection = self._projector.project(flat.read() - self._feasible, self._aim)
            flat.write(self._feasible + projection.displacement)
            self._projections.append(projection)
            self.seconds["project"] += perf_counter() - start

    def _add_lagrangian(self) -> None:
        start = perf_counter()
        kl, pull = self.constraint.probe(self.minibatches.draw(self.config.batch_states))
        coefficient = self.multiplier.update(kl)
        if coefficient > 0.0:
            self.constraint.parameters.add_gradients(pull(), coefficient)
        self._coefficients.append(coefficient)
        self.seconds["lagrangian"] += perf_counter() - start

    def _confined(self) -> Confinement | None:
        """The confinement of an update to the units that the new task has to itself; None where it has none."""
        block = self.opening.block
        if block is None or not self.enforces or self.config.confine == "off":
            return None
        return Confinement(block, self.constraint, self._known_constant())

    def _known_constant(self) -> Tensor | None:
        """What free units are held to on the old task, (O,), if the weights are those that an update has ended with."""
        if self._constant is None or not torch.equal(self._constant[1], self.constraint.parameters.read()):
            return None
        return self._constant[0]

    def _make_displacement(self, share: float) -> Tensor:
        """Make a share of what the optimizer has proposed, which is returned, (P,).

        It is confined where the update is: momentum and decay move what has no gradient.
        """
        flat = self.constraint.parameters
        proposed = flat.read() - self._feasible
        if self._confinement is not None:
            start = perf_counter()
            self._confinement.project(self._feasible, share)
            made = flat.read() - self._feasible
            proposed = proposed * self._confinement.free(flat.parameters) if share < 1.0 else made
            self.seconds["confine"] += perf_counter() - start
        elif share < 1.0:
            flat.write(self._feasible + share * proposed)
        return proposed

    def _linearise(self) -> None:
        start = perf_counter()
        indices, importance = self._subset()
        few = max(1, LINEARISED // len(indices))
        model = self.constraint.linearise(indices, importance, few if few < self.constraint.rows_of_a_state else None)
        scale = None
        if self.config.effective_projection == "optimizer":
            scale = self.constraint.parameters.scale_of(self.model.policy.optimizer)
        self._projector = SpectralProjection.of(model, scale)
        self.seconds["linearise"] += perf_counter() - start

    def _subset(self) -> tuple[Tensor, Tensor | None]:
        """States to linearise, and how many training states each of them stands for (None: all for equally many)."""
        train, drawn = self.constraint.train, self.subsets.draw(self.config.subset_states)
        if self.config.selection == "random" or len(drawn) == len(train):
            return drawn, None
        return active_subset(self.constraint, drawn)

    @property
    def _aim(self) -> float:
        return self._aimed_at * self.config.kl_budget

    @property
    def _aimed_at(self) -> float:
        """Share of the budget."""
        target, record = self.config.target, self.opening.record
        return target if record is None or record.units == 0 else min(target, self.config.free_target)

    def _take_aim(self) -> None:
        """Aim at what the opening, which comes after this object is built, or a loaded state has left to aim at."""
        self.multiplier.target = self._aim / self._gap
        if self.config.kl_budget > 0:
            self.enforcement = replace(self.enforcement, aim=self._aim)

    # -- after the update -------------------------------------------------------------------------------------------

    def _enforce(self) -> tuple[int, int]:
        """Bring the measured KL under the budget, and measure all that is told of it.

        Returns:
            Restorations made, and 1 if the segment fallback was used.
        """
        start = perf_counter()
        now = self.constraint.evaluate()
        kl, on_training = self.constraint.divergences(now)
        self._calibrate(kl, on_training)
        self.seconds["measure"] += perf_counter() - start
        start = perf_counter()
        kl, restored = self._restore_inside(kl)
        rolled_back = 0
        if kl > self.config.tolerance:
            self.enforcement.fall_back(self._feasible)
            self._check_kept()
            rolled_back = 1
        self.seconds["restore"] += perf_counter() - start
        self._measure(None if restored or rolled_back else now)
        return restored, rolled_back

    def _measure(self, evaluation: Evaluation | None = None) -> None:
        start = perf_counter()
        self.last = self.constraint.measure(evaluation)
        self.seconds["measure"] += perf_counter() - start

    def length(self) -> float:
        """What is made of the displacement of an update now: `stride`, less at the end of a run that settles."""
        if self.config.settle == 0.0:
            return self.stride
        model: Any = self.model
        # as the roll-out began: SB3 counts it already, so that the last update would be none, and the only one of a run
        rollout = model.n_steps * model.n_envs / max(model._total_timesteps, 1)
        left = float(model._current_progress_remaining) + rollout
        return self.stride * min(left / self.config.settle, 1.0)

    def _pace(self, rolled_back: int) -> None:
        """Shorten the coming updates after one that had to be rolled back, and lengthen them again after others.

        A step that always ends over the budget, beyond what restorations reach, would be undone for good.
        """
        self._in_a_row = self._in_a_row + 1 if rolled_back else 0
        self.stride = max(SHORTER * self.stride, LEAST_STRIDE) if rolled_back else min(LONGER * self.stride, 1.0)
        if self._in_a_row == MANY:
            warnings.warn(
                f"{MANY} updates in a row ended over the KL budget and were rolled back; the coming ones are shortened "
                f"to {self.stride:.2g} of their length, and lengthened again as they fit: a lower learning rate or a "
                "larger kl_budget would do the same",
                stacklevel=2,
            )

    def _restore_inside(self, kl: float) -> tuple[float, int]:
        """Restore while that helps and the KL is over the budget; returns the KL reached and how often."""
        kl, made = self.enforcement.restore_inside(kl)
        self.restored += made
        return kl, made

    def _calibrate(self, kl: float, on_training: float) -> None:
        """Aim the multiplier, which sees training states only, at what the whole buffer measures.

        Held-out states have a larger KL. Uncorrected, the multiplier would rest below its aim while every update ends
        over the budget and is restored.
        """
        if math.isfinite(kl) and on_training > 0.0:
            # One task of several can have spent its budget while the others have spent nothing of theirs; and what is
            # promised of few states can be spent while the mean is small.
            most = MOST_GAP if self.constraint.promises.any else max(2.0, len(self.constraint.shares))
            ratio = min(max(kl / on_training, 1.0), most)
            self._gap += 0.1 * (ratio - self._gap)
        self._take_aim()

    def _scalars(self, kept: float, restored: int) -> dict[str, float]:
        scalars: dict[str, Any] = {
            "retain/kl_mean": self.last.kl_mean,
            "retain/kl_max": self.last.kl_max,
            "retain/kl_worst": self.last.kl_worst,
            "retain/kl_heldout": self.last.kl_heldout,
            "retain/agreement": self.last.agreement,
            "nullspace/update_kept": kept,
            "nullspace/restore_steps": restored,
            "nullspace/rollbacks": self.rollbacks,
            "nullspace/stride": self.length(),
            **{f"retain/{task}/kl_mean": kl for task, kl in self.last.kl_by_task.items()},
        }
        if not math.isinf(self._damping):
            scalars["nullspace/lambda"] = self._damping
        if self._coefficients:
            scalars["nullspace/multiplier"] = sum(self._coefficients) / len(self._coefficients)
        if self._projector is not None:
            parts = self._projector.spectrum
            damping = self._damping
            scalars["nullspace/rank"] = parts.rank
            scalars["nullspace/rank_fraction"] = parts.rank / self._projector.jacobian.shape[1]
            scalars["nullspace/effective_dim"] = parts.effective_dimension(damping)
            if self._projections:
                scalars["nullspace/kl_predicted"] = self._projections[-1].predicted
                scalars["nullspace/update_kept"] = kept * self._projections[-1].kept
        return scalars


def shown_rows(states: int, rows: int) -> tuple[int, int | None]:
    """States, and rows of each (None: all), that the rank is told of; eight states at least, if there are."""
    if states * rows <= DIAGNOSED:
        return states, None
    states = min(states, max(8, SHOWN // rows))
    return states, min(max(1, SHOWN // states), rows)


def same_kind(value: Any, like: Tensor) -> bool:
    """Whether something is a finite tensor of this shape and dtype."""
    return (
        isinstance(value, Tensor)
        and value.shape == like.shape
        and value.dtype == like.dtype
        and bool(torch.isfinite(value).all())
    )
