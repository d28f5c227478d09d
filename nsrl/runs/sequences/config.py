"""The settings of a sequence of tasks: what is learnt in which order, and how much of it each task may forget."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field, replace

from nsrl.errors import NsrlError
from nsrl.rl.budget.config import RetentionConfig
from nsrl.runs.config import BufferSettings, EvaluationSettings, FinetuneConfig, Method, PretrainConfig
from nsrl.runs.folder import slug
from nsrl.runs.hyperparameters import Algorithm, PPOOverrides, PPOSettings, TRPOOverrides, check_chosen, check_ranges


@dataclass(frozen=True)
class SequenceTask:
    """One task of a sequence.

    Attributes:
        env: environment id.
        total_timesteps: environment steps on it, over all environments; those of the first task are of its pretraining,
            and not used where an agent is given.
        kl_budget: mean KL on its states that later tasks may cause, nats per state; null takes retention.kl_budget.
        low: return that counts as performance 0; null measures in returns, and without forward transfer.
        high: return that counts as performance 1.
        name: in TensorBoard, tables and figures; null takes the environment's.
    """

    env: str
    total_timesteps: int = 100_000
    kl_budget: float | None = None
    low: float | None = None
    high: float | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        check_ranges(self, "tasks.")
        if self.kl_budget is not None and not 0.0 <= self.kl_budget < math.inf:
            raise NsrlError(f"tasks.kl_budget must be a number of nats >= 0, not {self.kl_budget}")
        if (self.low is None) != (self.high is None) or (self.low is not None and not self.low < self.high):  # type: ignore[operator]
            raise NsrlError(
                f"tasks.low and tasks.high of {self.env} are {self.low} and {self.high}, but must be two returns, "
                "low below high, or both null"
            )

    @property
    def label(self) -> str:
        """Its name, fit for a folder and a tag."""
        return slug(self.name or self.env)


@dataclass(frozen=True)
class SequenceConfig:
    """Learn tasks one after the other; after each, its states join those on which behaviour is kept.

    Attributes:
        agent: path of an agent that is good at the first task: an SB3 zip, or a run folder; null trains one, as
            `pretraining` says.
        pretraining: how the first agent is trained from scratch, and how the single-task references are, these with
            what `ppo` says otherwise; env, total_timesteps, evaluation and seed are the task's and the sequence's.
        tasks: the tasks in order, the first one included.
        states: how the states of each task are collected.
        method: "null_space" keeps every task's budget; "kl_penalty" and "finetune" (no constraint) are the baselines.
        penalty: coefficient of method kl_penalty.
        retention: how the budgets are kept.
        algorithm: "ppo" or "trpo", with which later tasks are learnt; the first is, and references are, by PPO.
        ppo: settings of algorithm ppo on later tasks that differ from the first agent's own.
        trpo: settings of algorithm trpo on later tasks that differ from the first agent's own.
        references: also train every later task alone, from scratch, for as many steps; the forward transfer needs it.
        evaluation: when all tasks are evaluated.
        checkpoint_every: steps between checkpoints, from which --resume continues.
        seed: of everything drawn at random.
        trust: unpickle objects inside the agent's files, which can run any code in them.
        name: name of the run in its folder and report; null takes the last task's.
        out: output folder; null makes a fresh one under runs/.
    """

    agent: str | None = None
    pretraining: PretrainConfig = field(default_factory=PretrainConfig)
    tasks: list[SequenceTask] = field(default_factory=list)
    states: BufferSettings = field(default_factory=BufferSettings)
    method: Method = "null_space"
    penalty: float = 1.0
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    algorithm: Algorithm = "ppo"
    ppo: PPOOverrides = field(default_factory=PPOOverrides)
    trpo: TRPOOverrides = field(default_factory=TRPOOverrides)
    references: bool = False
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoint_every: int = 20_000
    seed: int = 0
    trust: bool = False
    name: str | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        check_chosen(self.algorithm, self.ppo, self.trpo)
        if self.retention.task_budgets is not None:
            raise NsrlError(
                "retention.task_budgets follows from the tasks of a sequence; give each its kl_budget there"
            )
        repeated = [label for label, count in Counter(self.labels).items() if count > 1]
        if repeated:
            raise NsrlError(f"two tasks are called {repeated[0]}; give each task a name of its own")
        zero = [budget == 0.0 for budget in self.budgets.values()]
        if any(zero) and not all(zero):
            raise NsrlError("some tasks have the kl_budget 0 and some have not; the hard null space is for all or none")

    @property
    def labels(self) -> list[str]:
        """The names of the tasks."""
        return [task.label for task in self.tasks]

    @property
    def budgets(self) -> dict[str, float]:
        """The budget of each task, by name."""
        default = self.retention.kl_budget
        return {task.label: default if task.kl_budget is None else task.kl_budget for task in self.tasks}

    @property
    def total_timesteps(self) -> int:
        """Environment steps on all tasks but the first."""
        return sum(task.total_timesteps for task in self.tasks[1:])

    def first(self) -> PretrainConfig:
        """The training of the agent that the sequence begins with."""
        return self._alone(self.tasks[0], self.pretraining.ppo)

    def reference(self, task: SequenceTask) -> PretrainConfig:
        """The training of a task alone, from scratch: by PPO, for as many steps as it has in the sequence.

        With algorithm ppo it has the settings of later tasks, with algorithm trpo those of the first.
        """
        given = asdict(self.ppo) if self.algorithm == "ppo" else {}
        changed = {key: value for key, value in given.items() if value is not None}
        return self._alone(task, replace(self.pretraining.ppo, **changed))

    def stage(self, number: int) -> FinetuneConfig:
        """The fine-tuning on task `number` (from 1), with the budgets of the tasks before it."""
        task = self.tasks[number]
        budgets = {earlier.label: self.budgets[earlier.label] for earlier in self.tasks[:number]}
        hard = not any(budgets.values())
        retention = replace(self.retention, **({"kl_budget": 0.0} if hard else {"task_budgets": budgets}))  # type: ignore[arg-type]
        return FinetuneConfig(
            new_env=task.env,
            states=self.states,
            method=self.method,
            penalty=self.penalty,
            retention=retention,
            algorithm=self.algorithm,
            ppo=self.ppo,
            trpo=self.trpo,
            total_timesteps=task.total_timesteps,
            evaluation=self.evaluation,
            checkpoint_every=self.checkpoint_every,
            seed=self.seed,
            trust=self.trust,
        )

    def _alone(self, task: SequenceTask, ppo: PPOSettings) -> PretrainConfig:
        return replace(
            self.pretraining,
            env=task.env,
            total_timesteps=task.total_timesteps,
            ppo=ppo,
            evaluation=self.evaluation,
            seed=self.seed,
            name=task.label,
            out=None,
        )
