"""The settings of every command: frozen dataclasses, one a command, which YAML files and the command line fill in.

Nothing heavy is imported here, so that `--help` and a mistyped key are answered at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from nsrl.errors import NsrlError
from nsrl.rl.budget.config import RetentionConfig
from nsrl.runs.hyperparameters import Algorithm, PPOOverrides, PPOSettings, TRPOOverrides, check_chosen, check_ranges

Context = Literal["auto", "add", "off"]
Method = Literal["null_space", "kl_penalty", "finetune", "l2", "ewc", "der", "frozen", "agem", "gradient_only"]


@dataclass(frozen=True)
class PolicySettings:
    """The network, a stock SB3 policy.

    Attributes:
        kind: "MlpPolicy" for vectors, "CnnPolicy" for images, "MultiInputPolicy" for Dict observations.
        hidden: widths of the hidden layers, the same for actor and critic.
        log_std_init: initial log standard deviation of continuous actions.
    """

    kind: Literal["MlpPolicy", "CnnPolicy", "MultiInputPolicy"] = "MlpPolicy"
    hidden: list[int] = field(default_factory=lambda: [64, 64])
    log_std_init: float = 0.0

    def __post_init__(self) -> None:
        if any(width < 1 for width in self.hidden):
            raise NsrlError(f"policy.hidden must be widths of at least 1, not {self.hidden}")
        if not math.isfinite(self.log_std_init):
            raise NsrlError(f"policy.log_std_init must be finite, not {self.log_std_init}")


@dataclass(frozen=True)
class EvaluationSettings:
    """When and how both tasks are played to see what the policy can do.

    Attributes:
        every: steps between evaluations during training.
        episodes: episodes of each evaluation during training.
        final_episodes: episodes of the evaluations before and after, which make the table.
        deterministic: play the most likely action instead of drawing one.
        choose: which policy of the run is handed on: the "best" on the new task, by these evaluations, of those that
            kept the old one; or the "last". Pretraining with normalize, and baselines, always hand on the last.
        floor: share of the old return that the best one may have lost.
    """

    every: int = 10_000
    episodes: int = 10
    final_episodes: int = 50
    deterministic: bool = True
    choose: Literal["best", "last"] = "best"
    floor: float = 0.01

    def __post_init__(self) -> None:
        check_ranges(self, "evaluation.")


@dataclass(frozen=True)
class BufferSettings:
    """How a retention buffer is collected: states that the pretrained agent visits on its own task.

    Attributes:
        n_states: states to keep.
        select: "expert" keeps visited states uniformly; "advantage" only among those of highest advantage, which drops
            states from which the agent recovers.
        quantile: share of the transitions that select="advantage" draws from.
        heldout: share of the states held out, on which generalisation is measured.
        oversample: transitions played for each state kept.
        n_envs: environments stepped side by side.
    """

    n_states: int = 2048
    select: Literal["expert", "advantage"] = "expert"
    quantile: float = 0.5
    heldout: float = 0.2
    oversample: float = 4.0
    n_envs: int = 8

    def __post_init__(self) -> None:
        check_ranges(self, "states.")


@dataclass(frozen=True)
class PretrainConfig:
    """Train an agent from scratch with stock PPO.

    Attributes:
        env: environment id, as in nsrl/CartPole-v0.
        total_timesteps: environment steps, over all environments.
        normalize: wrap the environment in VecNormalize (observations and rewards).
        ppo: settings of PPO.
        policy: the network.
        evaluation: when the agent is evaluated.
        checkpoint_every: steps between checkpoints, from which --resume continues.
        seed: of everything drawn at random.
        name: name of the run in its folder and report; null takes the environment's.
        out: output folder; null makes a fresh one under runs/.
    """

    env: str | None = None
    total_timesteps: int = 100_000
    normalize: bool = False
    ppo: PPOSettings = field(default_factory=PPOSettings)
    policy: PolicySettings = field(default_factory=PolicySettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoint_every: int = 50_000
    seed: int = 0
    name: str | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class CollectConfig:
    """Collect a retention buffer from an agent on its own task.

    Attributes:
        agent: path of an SB3 zip, or of a run folder.
        env: environment id of the task that the agent is good at.
        states: how many states, and which.
        seed: of everything drawn at random.
        trust: unpickle objects inside the agent's files, which can run any code in them.
        name: name of the run in its folder; null takes the environment's.
        out: output folder; null makes a fresh one under runs/.
    """

    agent: str | None = None
    env: str | None = None
    states: BufferSettings = field(default_factory=BufferSettings)
    seed: int = 0
    trust: bool = False
    name: str | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tune a pretrained agent on a new task while it keeps its old behaviour.

    Attributes:
        agent: path of the pretrained agent: an SB3 zip, or a run folder.
        pair: name of a task pair of nsrl_envs, as in cartpole_swapped; or give old_env and new_env.
        old_env: environment id of the task that the agent is good at.
        new_env: environment id of the task to learn.
        context: "auto" gives the agent the inputs behind its own in which the tasks show which of them it is; "add"
            lets both tasks show it in one more, 0 for the old and 1 for the new, where nothing in their observations
            does; "off" takes agent and tasks as they are.
        buffer: path of a saved retention buffer (npz or run folder); null collects one, as `states` says.
        states: how the buffer is collected.
        method: "null_space" keeps the KL budget; "kl_penalty" and "finetune" (no constraint) are the baselines.
        penalty: coefficient of method kl_penalty.
        retention: how the budget is kept.
        refresh_every: steps between refreshes of the buffer with states that the policy visits in the old task by then,
            labelled by the agent; null for none. The states that are there stay.
        refresh_states: states that each refresh adds.
        algorithm: "ppo" or "trpo", whatever the agent was trained with.
        ppo: settings of algorithm ppo that differ from the agent's own.
        trpo: settings of algorithm trpo that differ from the agent's own.
        total_timesteps: environment steps on the new task, over all environments.
        evaluation: when both tasks are evaluated.
        checkpoint_every: steps between checkpoints, from which --resume continues.
        seed: of everything drawn at random.
        trust: unpickle objects inside the agent's files, which can run any code in them.
        trust_buffer: accept a buffer that another agent made, and hold this agent to that one's behaviour.
        name: name of the run in its folder and report; null takes the pair's or the new environment's.
        out: output folder; null makes a fresh one under runs/.
    """

    agent: str | None = None
    pair: str | None = None
    old_env: str | None = None
    new_env: str | None = None
    context: Context = "auto"
    buffer: str | None = None
    states: BufferSettings = field(default_factory=BufferSettings)
    method: Method = "null_space"
    penalty: float = 1.0
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    refresh_every: int | None = None
    refresh_states: int = 256
    algorithm: Algorithm = "ppo"
    ppo: PPOOverrides = field(default_factory=PPOOverrides)
    trpo: TRPOOverrides = field(default_factory=TRPOOverrides)
    total_timesteps: int = 100_000
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoint_every: int = 20_000
    seed: int = 0
    trust: bool = False
    trust_buffer: bool = False
    name: str | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        check_chosen(self.algorithm, self.ppo, self.trpo)
        if self.refresh_every is not None and self.trust_buffer:
            raise NsrlError(
                "refresh_every asks the agent what it does in new states, and trust_buffer holds it to another agent's "
                "behaviour; leave one of them out"
            )


@dataclass(frozen=True)
class EvaluateConfig:
    """Play an agent on one or several tasks and say how well it does.

    Attributes:
        agent: path of an SB3 zip, or of a run folder.
        env: environment id.
        pair: name of a task pair of nsrl_envs, whose two tasks are both played.
        buffer: path of a retention buffer; the agent's KL to the buffer's reference policy is measured on it.
        episodes: episodes on each task.
        deterministic: play the most likely action instead of drawing one.
        seed: of the environments.
        trust: unpickle objects inside the agent's files, which can run any code in them.
        out: folder for metrics.json; null only prints.
    """

    agent: str | None = None
    env: str | None = None
    pair: str | None = None
    buffer: str | None = None
    episodes: int = 50
    deterministic: bool = True
    seed: int = 0
    trust: bool = False
    out: str | None = None

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class DemoConfig:
    """Pretrain on a task (or take the cached agent), then learn its counterpart with plain PPO and with nsrl.

    Attributes:
        pair: name of the task pair.
        pretraining: how the agent is trained; its env is the pair's retained task.
        finetuning: how it learns the new task; the method is set by the demo.
        cache: folder in which pretrained agents are kept.
        out: output folder; null makes a fresh one under runs/.
    """

    pair: str = "cartpole_swapped"
    pretraining: PretrainConfig = field(
        default_factory=lambda: PretrainConfig(
            total_timesteps=120_000,
            ppo=PPOSettings(n_steps=128, batch_size=256, gamma=0.98),
            evaluation=EvaluationSettings(every=7_680, episodes=20, final_episodes=20),
        )
    )
    finetuning: FinetuneConfig = field(
        default_factory=lambda: FinetuneConfig(
            total_timesteps=60_000,
            ppo=PPOOverrides(learning_rate=1e-3),
            evaluation=EvaluationSettings(every=5_120),
        )
    )
    cache: str = "runs/cache"
    out: str | None = None
