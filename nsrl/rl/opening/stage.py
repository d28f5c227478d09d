"""The opening as a stage of a run: what happens in which order, and what is recorded of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.logger import INFO
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor

from nsrl.reading.limits import Unreadable
from nsrl.reading.values import finite, mapping, whole
from nsrl.rl.opening.block import FreeBlock
from nsrl.rl.opening.columns import redraw_columns
from nsrl.rl.opening.regression import open_outputs
from nsrl.rl.opening.spread import wide_log_std
from nsrl.rl.opening.states import (
    FEWEST,
    STRETCH,
    NewStates,
    exchanged_states,
    nothing_happened,
    pays_better,
    random_states,
    resting_action,
    resting_states,
    visited_states,
)
from nsrl.rl.opening.targets import CoinTargets, MeanTargets, SoftmaxTargets, SpreadTargets, Targets
from nsrl.rl.opening.units import OPEN_WHERE_IT_PAYS, free_units
from nsrl.rl.policies.actor_critic import Observation, joined, policy_outputs, select
from nsrl.rl.retention.constraint import RetentionConstraint

#: What "auto" opens to, and the share from which on it lets a policy be.
OPEN = 0.9
OPEN_ENOUGH = 0.7
#: Openings on states that the opened policy itself goes to, at most; states a time, as a share of the first ones.
CYCLES = 4
FOLLOWING = 0.5
#: Share of the wanted openness, measured where the policy goes, that ends the cycles.
CLOSE_ENOUGH = 0.95
#: KL at most, nats a state, between what the policy does in the new task before units are freed and behind it, where
#: that pays.
WHERE_IT_PAYS = 0.01
#: Share of the opening's budget that condensing the old task on a part of the units may spend, and at most, where it
#: cannot be had for that. It is spent for good, and an actor that is given more units need not spend anything.
CONDENSING, CONDENSING_AT_MOST = 0.001, 0.05
#: Fields of the record that earlier versions did not write.
LATER = ("units", "pays", "added")
#: Steps of an episode over which the old behaviour has to pay before that is believed, or may do so later.
LONGER = 256
#: Share of a run's timesteps that the opening may take.
MOST_STEPS = 0.1


@dataclass(frozen=True)
class OpeningRecord:
    """What the opening did.

    Attributes:
        states: timesteps spent in the new task.
        columns: inputs that were given a random column (see `redraw_columns`).
        units: hidden units that were freed for the new task (see `free_units`).
        before, after: how open the policy was and is where it goes in the new task: entropy as a share of the largest,
            for gSDE its standard deviation as a share of a wide one, for other Gaussians, which explore by a standard
            deviation of their own, the share of means inside the action space.
        kl: measured KL on the buffer behind it, nats a state.
        steps: of the regression.
        seconds: wall time.
        skipped: why nothing was opened; empty if something was.
        added: units that every hidden layer of the actor was given beforehand, since the old task needs all others.
        pays: whether the old behaviour earned more in the new task than random actions do, and was kept for a start.
    """

    states: int
    columns: int
    before: float
    after: float
    kl: float
    steps: int
    seconds: float
    skipped: str = ""
    units: int = 0
    pays: bool = False
    added: int = 0

    def text(self) -> str:
        """A line for logs and reports."""
        cost = f"KL {self.kl:.2g} on the buffer, {self.states:,} timesteps, {self.seconds:.1f} s"
        freed = [f"{count} free {what}" for count, what in ((self.columns, "columns"), (self.units, "units")) if count]
        freed += [f"{self.added} units added to every layer"] if self.added else []
        if self.skipped:
            return f"opening skipped: {', '.join([self.skipped, *freed])}; {cost}"
        # of a Gaussian, whose spread is not what is opened, there is nothing to be told
        opened = [f"{self.before:.0%} -> {self.after:.0%} open on new states"] if self.before != self.after else []
        return f"opening: {', '.join([*opened, *freed])}; {cost}"


class Opening:
    """Opens the policy of one model before its first roll-out.

    1. States of the new task, by random actions and by the policy, and what either earns there; where the policy earns
       more, or neither earns anything, over longer stretches, too.
    2. Where inputs never moved on the buffer and tell the tasks apart, the old task is condensed on a part of the
       hidden units, and the others become a fresh network for the new one (`free_units`), which has a copy of the old
       one inside it where the old behaviour pays. Where units cannot be had, and it does not pay, such inputs
       get a random column instead, which costs no KL at all.
    3. If the policy is not open where it goes: its outputs are opened by regression inside the budget, on these states
       and those of the buffer with the new task's value of such inputs; then on the states that the opened policy goes
       to, until it is open there too.

    Args:
        constraint: policy against buffer.
        setting: "auto", "off", or the share to open to, in (0, 1].
        states: of the new task, by random actions.
        budget: KL on the buffer that the opening may spend, nats a state.
        seed: of states and columns.

    Attributes:
        added: units that every hidden layer was given when the policy was taken over.
        block: the units that were freed; None where there are none.
        record: what was done; None before.
        states: states of the new task that the policy was opened on; None where it was not.
    """

    def __init__(self, constraint: RetentionConstraint, setting: float | str, states: int, budget: float, seed: int):
        self._constraint = constraint
        self._setting = setting
        self._count = states
        self._budget = budget
        self._seed = seed
        self.added = 0
        self.block: FreeBlock | None = None
        self.record: OpeningRecord | None = None
        self.states: Observation | None = None

    def hold_to(self, constraint: RetentionConstraint) -> None:
        """Another buffer is what counts from now on."""
        self._constraint = constraint

    @property
    def pending(self) -> bool:
        """Whether it is still to be done."""
        return self.record is None and self._setting != "off"

    def run(self, model: OnPolicyAlgorithm) -> OpeningRecord:
        """Do it; steps count as the run's own, and what is found out is logged.

        An exception, of the environment or Ctrl-C, leaves the policy as it was, and the opening to be done.

        Args:
            model: the constraint's, after `_setup_learn`.
        """
        start, first = perf_counter(), model.num_timesteps
        policy, constraint = model.policy, self._constraint
        # SB3 calls the timesteps of a run that goes on _total_timesteps too
        room = max(int(MOST_STEPS * (model._total_timesteps - model.num_timesteps)), 1)
        count = min(self._count, max(int(room / (1.0 + (CYCLES + 2) * FOLLOWING)), 1))
        modes = [(module, module.training) for module in policy.modules()]
        weights = {name: value.detach().clone() for name, value in policy.state_dict().items()}
        policy.eval()
        try:
            targets = targets_of(constraint)
            follow = int(FOLLOWING * count) or 1
            # what is played by the policy has to hold a whole stretch of every environment
            stretch = min(STRETCH, -(-follow // model.n_envs))
            new = random_states(model, count, self._seed, stretch)
            visited = visited_states(model, follow, self._seed + 1, stretch)
            before = 1.0 if targets is None else self._openness(targets, visited)
            paying = None
            # noise on means beyond the action space changes nothing there, and bringing them back gives the gait up
            if not isinstance(targets, MeanTargets) or before >= OPEN_WHERE_IT_PAYS:
                paying = self._where_it_pays(model, visited, new, room + first - model.num_timesteps)
            pays = paying is not None
            self.block = self._free(new, paying)
            units = 0 if self.block is None else self.block.units
            columns = 0 if units or pays else self._redraw(new)
            if columns:  # it goes elsewhere now
                visited = visited_states(model, len(visited), self._seed + 1)
            if targets is None:
                after, steps, skipped = before, 0, "a Gaussian without bounds explores by its standard deviation"
            else:
                after, steps, skipped = self._open(model, targets, new, visited, pays)
        except BaseException:  # half an opening measures anywhere
            policy.load_state_dict(weights)
            self.states = self.block = None
            raise
        finally:
            for module, training in modes:
                module.training = training
        if units and not pays:
            skipped = ""  # that has opened it
        self.record = OpeningRecord(
            states=model.num_timesteps - first,
            columns=columns,
            before=before,
            after=after,
            kl=constraint.binding_divergence(),
            steps=steps,
            seconds=perf_counter() - start,
            skipped=skipped,
            units=units,
            pays=pays,
            added=self.added,
        )
        self._log(model, self.record)
        return self.record

    def _where_it_pays(
        self, model: OnPolicyAlgorithm, visited: NewStates, random: NewStates, room: int
    ) -> NewStates | None:
        """States that the old behaviour leads to in the new task, if it earns something there; else None.

        A first look may say that it does: but a gait that goes to and fro earns in the wrong direction for a part of
        its period, and where random actions cost something, any behaviour that is calm earns more than they do. So it
        has to earn more over longer stretches, and more than doing nothing, too. Or the first look may say nothing at
        all, since nothing has happened: whoever reaches a goal far away is seen to only over longer stretches.

        Args:
            model: whose policy it is.
            visited, random: states of the first look, by the policy and by random actions.
            room: timesteps that there are for another.
        """
        likely = pays_better(visited, random)
        if not likely and not nothing_happened(visited, random):
            return None
        envs = model.n_envs
        rounds = -(-FEWEST // envs)
        others = [random_states] + [resting_states] * (resting_action(model.action_space) is not None)
        length = min(LONGER, room // ((1 + len(others)) * envs * rounds))
        if length <= STRETCH:
            return visited if likely else None
        count = length * envs * rounds
        own = visited_states(model, count, self._seed + 2, length)
        if not likely and nothing_happened(visited, own):
            return None
        surely = all(pays_better(own, play(model, count, self._seed + 2, length)) for play in others)
        return own if surely else None

    def leave_out(self, why: str, units: int = 0, block: Any = None) -> None:
        """It is not to be done, and this is why; so many units are free already, in this block as it was written.

        Raises:
            Unreadable: the block is damaged.
        """
        kl = self._constraint.binding_divergence()
        self.block = self._read(block)
        self.record = OpeningRecord(0, 0, 0.0, 0.0, kl, 0, 0.0, why, units)

    def share_of_states(self, share: float) -> Observation | None:
        """The first so many of the states; None where there are none."""
        if self.states is None:
            return None
        size = len(next(iter(self.states.values())) if isinstance(self.states, dict) else self.states)
        count = int(share * size)
        return select(self.states, slice(count)) if count > 0 else None

    def _open(
        self, model: OnPolicyAlgorithm, targets: Targets, new: NewStates, visited: NewStates, pays: bool
    ) -> tuple[float, int, str]:
        """Openness behind it, steps made, and why nothing was done."""
        share, enough = OPEN, OPEN_ENOUGH
        if self._setting != "auto":
            share = enough = float(self._setting)
        if pays:
            share, enough = min(share, OPEN_WHERE_IT_PAYS), min(enough, OPEN_WHERE_IT_PAYS)
        valid = self._constraint.valid
        exchanged = exchanged_states(self._constraint.inputs, new, valid, len(new), self._seed)
        pool = new if exchanged is None else new.joined(exchanged)
        after, steps = self._openness(targets, visited), 0
        if after >= enough:
            return after, 0, f"the policy is open already ({after:.0%})"
        for cycle in range(CYCLES):
            pool = pool.joined(visited)
            made = open_outputs(
                self._constraint.policy, self._constraint, pool, targets, share, self._budget, block=self.block
            )
            steps += made
            visited = visited_states(model, len(visited), self._seed + 2 + cycle)
            after = self._openness(targets, visited)
            if after >= CLOSE_ENOUGH * share or (made == 0 and cycle > 0):
                break
        generator = torch.Generator().manual_seed(self._seed)
        kept = torch.randperm(len(pool), generator=generator)[: self._count]
        self.states = pool.select(kept.to(self._constraint.reference.device)).inputs
        return after, steps, ""

    @torch.no_grad()
    def _free(self, new: NewStates, paying: NewStates | None) -> FreeBlock | None:
        """Free units for the new task, if the old one is as good without them, and what pays in the new one too.

        Args:
            new: states of the new task.
            paying: those that the policy visits there, where what it does pays.
        """
        constraint = self._constraint
        # nothing is fitted to the held-out states
        used, alike = select(constraint.inputs, constraint.train), None
        if paying is not None:
            used = joined(used, paying.inputs)
            alike = policy_outputs(constraint.policy, paying.inputs)

        def divergence() -> float:
            if paying is not None and alike is not None:
                now = policy_outputs(constraint.policy, paying.inputs)
                if isinstance(constraint.policy.action_dist, StateDependentNoiseDistribution):
                    # what is to be as it was is the behaviour; it explores with a spread of its own
                    half = now.shape[1] // 2
                    now = torch.cat([now[:, :half], alike[:, half:]], 1)
                if not constraint.divergence_between(alike, now, paying.valid) <= WHERE_IT_PAYS:
                    return math.inf
            return constraint.binding_divergence()

        before = constraint.binding_divergence()
        for share in (CONDENSING, CONDENSING_AT_MOST):
            # of the opening's budget; a policy that is on its way is condensed for as little as a fresh one
            block = free_units(
                constraint.policy,
                select(constraint.inputs, constraint.train),
                new.inputs,
                divergence,
                min(before + share * self._budget, self._budget),
                self._seed,
                go_on=paying is not None,
                used=used,
            )
            if block is not None:
                return block
        return None

    def _redraw(self, new: NewStates) -> int:
        """Draw the free columns, unless the bias cannot hold what they said: its rounding grows with the inputs."""
        constraint = self._constraint
        before, limit = constraint.parameters.read(), max(constraint.binding_divergence(), self._budget)
        columns = redraw_columns(constraint.policy, constraint.inputs, new.inputs, self._seed)
        if columns and constraint.binding_divergence() > limit:
            constraint.parameters.write(before)
            return 0
        return columns

    def _openness(self, targets: Targets, states: NewStates) -> float:
        with torch.no_grad():
            return float(targets.share(policy_outputs(self._constraint.policy, states.inputs), states.valid).mean())

    def _log(self, model: OnPolicyAlgorithm, record: OpeningRecord) -> None:
        model.logger.log(record.text(), level=INFO)
        model.logger.record("opening/before", record.before)
        model.logger.record("opening/after", record.after)
        model.logger.record("opening/kl", record.kl)
        model.logger.record("opening/columns", record.columns)
        model.logger.record("opening/units", record.units)
        model.logger.record("opening/seconds", record.seconds)

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return {
            "record": None if self.record is None else asdict(self.record),
            "states": self.states,
            "block": None if self.block is None else self.block.written(),
        }

    def check_state(self, state: Any) -> None:
        """Raise Unreadable unless `state_dict()` can have given this."""
        mapping(state, "opening", ["record", "states"], ["block"])  # earlier versions wrote no block
        record, states = state["record"], state["states"]
        self._read(state.get("block"))
        if record is not None:
            required = [key for key in OpeningRecord.__dataclass_fields__ if key not in LATER]
            for key, value in mapping(record, "opening record", required, LATER).items():
                if key == "skipped":
                    if type(value) is not str:
                        raise Unreadable("the record of the opening is damaged")
                elif key in ("states", "columns", "steps", "units", "added"):
                    whole(value, key)
                elif key == "pays":
                    if type(value) is not bool:
                        raise Unreadable("the record of the opening is damaged")
                else:
                    finite(value, key)
        if states is None:
            return
        inputs = self._constraint.inputs
        known, given = (x if isinstance(x, dict) else {"": x} for x in (inputs, states))
        sizes = {len(value) if isinstance(value, Tensor) and value.ndim else 0 for value in given.values()}
        if known.keys() != given.keys() or len(sizes) != 1 or 0 in sizes:
            raise Unreadable("the states of the opening are damaged")
        for key, value in given.items():
            like = known[key]
            if value.dtype != like.dtype or value.shape[1:] != like.shape[1:] or not bool(value.isfinite().all()):
                raise Unreadable("the states of the opening are damaged")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.record = None if state["record"] is None else OpeningRecord(**state["record"])
        self.block = self._read(state.get("block"))
        states, device = state["states"], self._constraint.reference.device
        if isinstance(states, dict):
            self.states = {key: value.to(device) for key, value in states.items()}
        else:
            self.states = None if states is None else states.to(device)

    def _read(self, block: Any) -> FreeBlock | None:
        return None if block is None else FreeBlock.read(block, self._constraint.policy, self._constraint.inputs)


def targets_of(constraint: RetentionConstraint) -> Targets | None:
    """What open means for a policy's family of action distributions; None where nothing can be closed."""
    policy, family = constraint.policy, constraint.distribution.family
    if family == "bernoulli":
        return CoinTargets()
    if family == "gaussian":
        space: Any = policy.action_space
        low, high = (torch.as_tensor(bound.astype("float64").flatten()) for bound in (space.low, space.high))
        half = 0.5 * (high - low)
        half = torch.where(half > 0.0, half, torch.inf)
        if not bool(half.isfinite().any()):
            return None
        centre = torch.where(half.isfinite(), low + half, 0.0)
        return MeanTargets(centre.to(policy.device), half.to(policy.device))
    if family == "state_dependent":
        return SpreadTargets(torch.as_tensor(wide_log_std(policy.action_space), device=policy.device))  # type: ignore[arg-type]
    return SoftmaxTargets(constraint.distribution.sizes(policy.action_space))
