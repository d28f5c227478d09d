"""How retention is enforced: the knobs of `NullSpacePPO` and `protect`, with their measured defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from statistics import harmonic_mean

from nsrl.errors import NsrlError, check_annotated, check_kind, check_number

#: Measured KL that still counts as zero for `kl_budget=0`.
ZERO_BUDGET = 1e-6

#: Smallest budget above zero, nats. Single-precision outputs of size 10 are off by some 1e-5 from one batch size or
#: processor to the next, which is a KL of 5e-11 by itself: what is smaller cannot be measured, let alone kept.
SMALLEST_BUDGET = 1e-10

CHOICES = {
    "preserve": ("distribution", "mode"),
    "gradient": ("lagrangian", "projected", "plain"),
    "projection": ("none", "euclidean", "optimizer"),
    "critic": ("keep", "reset"),
    "selection": ("random", "active"),
    "values": ("standardised", "raw"),
    "room": ("auto", "off"),
    "confine": ("auto", "off"),
    "fused": ("auto", "off"),
}


def accepted(budget: float) -> float:
    """The largest measured KL that a budget accepts after an update, nats: itself, or 1e-6 for budget 0."""
    return budget if budget > 0.0 else ZERO_BUDGET


@dataclass(frozen=True)
class RetentionConfig:
    """Everything that decides how the KL budget is kept.

    Attributes:
        kl_budget: largest mean KL(pi_ref || pi) on the buffer, in nats per state; 0 asks for the hard null space
            (measured KL at most 1e-6). Other budgets are at least 1e-10, below which single precision cannot measure.
        task_budgets: budgets of the tasks of a merged buffer, by name, nats per state: after every update the mean KL
            of each task's states is within its own. `kl_budget` then becomes their harmonic mean, and the KL that the
            multiplier sees weighs every task by 1 / budget. None has one budget for the mean over all states.
        worst_budget: largest mean KL over the worst states, nats a state: kept beside the mean's, after every update.
            None promises nothing of them.
        worst_share: share of the states that are the worst ones.
        agreement: smallest share of states on which the policy acts as the reference does (same likeliest action;
            Gaussian means within half a reference standard deviation), kept in the same way. None promises none.
        preserve: "distribution" protects mean and standard deviation; "mode" protects the mean of a Gaussian policy
            (measured in reference standard deviations) and leaves log_std to the new task. Discrete policies, and gSDE,
            whose standard deviation depends on the network: the whole distribution either way.
        gradient: what the optimizer is given. "lagrangian" adds multiplier * grad KL of a fresh buffer minibatch, the
            multiplier driven by measured KL against the budget, so that Adam's moments vanish where the constrained
            optimum is; "projected" removes the protected directions from the gradient; "plain" leaves it alone.
        projection: metric in which realised displacements are projected inside the update: "none", "euclidean", or
            "optimizer" (Adam's own; Euclidean in the first rollout, when Adam has no second moments yet). In any case
            the budget is enforced after every update. With kl_budget 0, "none" counts as "euclidean" and the gradient
            "lagrangian" as "projected": the hard null space has no finite multiplier.
        project_every: project after every so many minibatches.
        subset_states: states linearised, re-drawn for every rollout, when something is projected inside the update.
        selection: which states are linearised: "random" ones, or "active", half of them those of largest current KL and
            half random, each weighted by how many states it stands for. On CartPole no fewer states suffice then than
            at random (`nsrl bench cartpole_selection`).
        batch_states: buffer states in each Lagrangian minibatch.
        target: share of the budget that the multiplier and the restoration aim at; the rest is slack.
        confine: whether only the units that the opening has freed move, where it has freed some: "auto" or "off". They
            are the null space of the old task itself, not of its linearisation, so that an update of whatever length
            spends nothing of the budget (see `nsrl.rl.opening.block`).
        free_target: share of the budget that is aimed at where units are free and `confine` is "off": what is spent
            buys little there. `target`, if that is smaller.
        rate: integral gain of the multiplier, per minibatch, on the relative excess of KL.
        damping: proportional gain of the multiplier.
        tempering: share of the uniform distribution mixed into the Hessian of softmax policies.
        restore_steps: Gauss-Newton restorations tried after an update before falling back along the segment.
        critic: "keep" the pretrained critic, or "reset" it: values of the old task mislead where rewards differ.
        critic_warmup: rollouts in which only the critic learns.
        values: units in which the critic is learnt: "standardised" ones (mean and spread of the roll-out's returns, see
            `nsrl.rl.algorithms.value_scale`), so that the scale of the rewards does not matter, or "raw".
        opening: what is done before the first roll-out so that a certain policy tries things on the new task's states
            (see `nsrl.rl.opening`), inside the budget: "auto" measures and opens where there is need of it, "off" does
            nothing, a number in (0, 1] is the share of the largest entropy to open to. Baselines are opened by a number
            only. A Gaussian explores with a standard deviation of its own, wide where the policy's is narrow; what is
            retained, saved and exported keeps its standard deviation.
        room: whether `from_pretrained` adds units (`nsrl.rl.surgery.add_units`) to an actor that the old task needs
            whole, where an input may tell the tasks apart: "auto" or "off". The exported agent's actor is wider then.
        fused: how PPO's updates are computed: "auto" in closed form where all about them is known (see
            `nsrl.rl.algorithms.fused_update`), which is SB3's update to rounding in a fraction of its time; "off" by
            SB3's own `train`, always. Where something watches the optimizer or a module, "auto" leaves it to SB3.
        opening_states: states of the new task, by random actions, that the policy is opened on; they count as
            timesteps, and take no more than a tenth of a run.
        opening_budget: share of the budget that the opening may spend.
        opening_fade: share of a run over which the states of the opening, fewer and fewer, belong to the trust region
            of a natural-gradient step: so the policy stays open where its roll-outs have not been yet.
        settle: share of a run, at its end, over which the actor's updates grow shorter, to nothing: where all that is
            left of the gradient is noise, updates of full length carry away what has been learnt.
        log_std_init: value that log_std is set to at the start; None keeps it. Needs preserve="mode".
        seed: of the subsets and minibatches drawn from the buffer.
    """

    kl_budget: float = 0.01
    task_budgets: dict[str, float] | None = None
    worst_budget: float | None = None
    worst_share: float = 0.05
    agreement: float | None = None
    preserve: str = "distribution"
    gradient: str = "lagrangian"
    projection: str = "none"
    project_every: int = 1
    subset_states: int = 128
    selection: str = "random"
    batch_states: int = 256
    target: float = 0.9
    free_target: float = 0.1
    rate: float = 0.03
    damping: float = 0.3
    tempering: float = 0.01
    restore_steps: int = 4
    critic: str = "reset"
    critic_warmup: int = 0
    values: str = "standardised"
    opening: float | str = "auto"
    room: str = "auto"
    confine: str = "auto"
    fused: str = "auto"
    opening_states: int = 1024
    opening_budget: float = 0.8
    opening_fade: float = 0.5
    settle: float = 0.33
    log_std_init: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_annotated({entry.name: getattr(self, entry.name) for entry in fields(self)}, self.__annotations__)
        for task, budget in (self.task_budgets or {}).items():
            check_kind("a task in task_budgets", task, str, "its name")
            check_number(f"the budget of {task}", budget)
        if math.isnan(self.kl_budget) or self.kl_budget < 0:
            raise NsrlError(
                f"kl_budget must be a number of nats >= 0 (0 for the hard null space), not {self.kl_budget}"
            )
        for budget in (self.kl_budget, *(self.task_budgets or {}).values()):
            if 0.0 < budget < SMALLEST_BUDGET:
                raise NsrlError(
                    f"a budget of {budget:g} nats is less than single precision can measure; take at least "
                    f"{SMALLEST_BUDGET:g}, or kl_budget 0 for the hard null space"
                )
        if self.task_budgets is not None and not all(0.0 < budget < math.inf for budget in self.task_budgets.values()):
            raise NsrlError(
                f"task_budgets must be numbers of nats > 0, not {self.task_budgets}; for the hard null space of all "
                "tasks set kl_budget to 0 and leave task_budgets out"
            )
        if self.worst_budget is not None and not 0.0 < self.worst_budget < math.inf:
            raise NsrlError(f"worst_budget must be a number of nats > 0, not {self.worst_budget}")
        if not 0.0 < self.worst_share <= 1.0:
            raise NsrlError(f"worst_share must be a share of the states in (0, 1], not {self.worst_share}")
        if self.agreement is not None and not 0.0 <= self.agreement <= 1.0:
            raise NsrlError(f"agreement must be a share of the states in [0, 1], not {self.agreement}")
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise NsrlError(f"{key} must be one of {', '.join(choices)}, not {getattr(self, key)!r}")
        for key in ("project_every", "subset_states", "batch_states", "restore_steps", "opening_states"):
            if getattr(self, key) < 1:
                raise NsrlError(f"{key} must be at least 1, not {getattr(self, key)}")
        if self.critic_warmup < 0:
            raise NsrlError(f"critic_warmup must be a number of rollouts >= 0, not {self.critic_warmup}")
        for key in ("target", "free_target"):
            if not 0.0 < getattr(self, key) <= 1.0:
                raise NsrlError(f"{key} must lie in (0, 1], not {getattr(self, key)}")
        share = self.opening
        if share not in ("auto", "off") and (isinstance(share, str | bool) or not 0.0 < share <= 1.0):
            raise NsrlError(f"opening must be auto, off or a share of the largest entropy in (0, 1], not {share!r}")
        if not 0.0 < self.opening_budget <= 1.0:
            raise NsrlError(f"opening_budget must be a share of the budget in (0, 1], not {self.opening_budget}")
        if not 0.0 <= self.opening_fade <= 1.0:
            raise NsrlError(f"opening_fade must be a share of the run in [0, 1], not {self.opening_fade}")
        if not 0.0 <= self.settle <= 1.0:
            raise NsrlError(f"settle must be a share of the run in [0, 1], not {self.settle}")
        if not 0.0 <= self.tempering <= 1.0:
            raise NsrlError(f"tempering is a share from 0 to 1, not {self.tempering}")
        for key in ("rate", "damping"):
            if not 0.0 <= getattr(self, key) < math.inf:
                raise NsrlError(f"{key} must be a finite number >= 0, not {getattr(self, key)}")
        if self.log_std_init is not None and not math.isfinite(self.log_std_init):
            raise NsrlError(f"log_std_init must be finite, not {self.log_std_init}")
        if self.log_std_init is not None and self.preserve != "mode":
            raise NsrlError(
                "log_std_init changes the action distribution, which preserve='distribution' protects; "
                "set preserve='mode' or leave log_std_init out"
            )

    @property
    def tolerance(self) -> float:
        """The KL that is accepted after an update: the budget, or 1e-6 for budget 0."""
        return accepted(self.kl_budget)

    def with_overall_budget(self) -> RetentionConfig:
        """The configuration with `kl_budget` as the budgets of the tasks make it."""
        return replace(self, kl_budget=harmonic_mean(list(self.task_budgets.values()))) if self.task_budgets else self

    @property
    def projects(self) -> bool:
        """Whether something is linearised and projected inside the update."""
        return self.effective_projection != "none" or self.effective_gradient == "projected"

    @property
    def effective_projection(self) -> str:
        """`projection`, except that the hard null space cannot do without one."""
        return "euclidean" if self.kl_budget == 0 and self.projection == "none" else self.projection

    @property
    def effective_gradient(self) -> str:
        """`gradient`, except that the hard null space has no finite multiplier."""
        return "projected" if self.kl_budget == 0 and self.gradient == "lagrangian" else self.gradient
