"""The hyper-parameters of the algorithms as Stable-Baselines3 names them, and the ranges of all numbers.

Nothing heavy is imported here, so that `--help` and a mistyped key are answered at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from nsrl.errors import NsrlError

Algorithm = Literal["ppo", "trpo"]


@dataclass(frozen=True)
class PPOSettings:
    """PPO as Stable-Baselines3 names it.

    Attributes:
        n_envs: environments stepped side by side.
        n_steps: steps of each environment in a rollout.
        batch_size: transitions in a minibatch.
        n_epochs: passes over a rollout.
        learning_rate: of Adam, constant.
        gamma: discount.
        gae_lambda: of the generalised advantage estimate.
        clip_range: of the probability ratio.
        ent_coef: weight of the entropy bonus.
        vf_coef: weight of the value loss.
        max_grad_norm: gradients are clipped to this norm.
    """

    n_envs: int = 8
    n_steps: int = 2048
    batch_size: int = 64
    n_epochs: int = 10
    learning_rate: float = 3e-4
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    ent_coef: float = 0.0
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5

    def __post_init__(self) -> None:
        check_ranges(self, "ppo.")


@dataclass(frozen=True)
class PPOOverrides:
    """PPO settings of the fine-tuning run; null keeps what the pretrained agent was trained with.

    Attributes:
        n_envs: environments stepped side by side.
        n_steps: steps of each environment in a rollout.
        batch_size: transitions in a minibatch.
        n_epochs: passes over a rollout.
        learning_rate: of Adam, constant.
        gamma: discount.
        gae_lambda: of the generalised advantage estimate.
        clip_range: of the probability ratio.
        ent_coef: weight of the entropy bonus.
        vf_coef: weight of the value loss.
        max_grad_norm: gradients are clipped to this norm.
    """

    n_envs: int = 8
    n_steps: int | None = None
    batch_size: int | None = None
    n_epochs: int | None = None
    learning_rate: float | None = None
    gamma: float | None = None
    gae_lambda: float | None = None
    clip_range: float | None = None
    ent_coef: float | None = None
    vf_coef: float | None = None
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        check_ranges(self, "ppo.")


@dataclass(frozen=True)
class TRPOOverrides:
    """TRPO settings of the fine-tuning run; null keeps what the agent was trained with, or else sb3_contrib's default.

    Attributes:
        n_envs: environments stepped side by side.
        n_steps: steps of each environment in a rollout.
        batch_size: transitions in a minibatch of the critic's fit.
        learning_rate: of the critic, constant.
        gamma: discount.
        gae_lambda: of the generalised advantage estimate.
        target_kl: radius of the rollout's trust region, nats a state, of the joint action.
        cg_damping: added to the Fisher information.
        cg_max_steps: iterations of conjugate gradients, at most.
        n_critic_updates: passes of the critic's fit over a rollout.
        sub_sampling_factor: the Fisher information takes every so many states.
    """

    n_envs: int = 8
    n_steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    gamma: float | None = None
    gae_lambda: float | None = None
    target_kl: float | None = None
    cg_damping: float | None = None
    cg_max_steps: int | None = None
    n_critic_updates: int | None = None
    sub_sampling_factor: int | None = None

    def __post_init__(self) -> None:
        check_ranges(self, "trpo.")


LEAST = {
    "n_envs": 1,
    "n_steps": 1,
    "batch_size": 1,
    "n_epochs": 1,
    "total_timesteps": 1,
    "checkpoint_every": 1,
    "every": 1,
    "refresh_every": 1,
    "refresh_states": 1,
    "episodes": 1,
    "final_episodes": 1,
    "seed": 0,
    "penalty": 0.0,
    "learning_rate": 0.0,
    "ent_coef": 0.0,
    "vf_coef": 0.0,
    "max_grad_norm": 0.0,
    "clip_range": 0.0,
    "gamma": 0.0,
    "gae_lambda": 0.0,
    "target_kl": 0.0,
    "cg_damping": 0.0,
    "cg_max_steps": 1,
    "n_critic_updates": 1,
    "sub_sampling_factor": 1,
}
#: numpy's seeds have 32 bits.
MOST = {"gamma": 1.0, "gae_lambda": 1.0, "seed": 2**32 - 1}
#: Bounds that are none where they are infinite.
UNBOUNDED = ("max_grad_norm", "clip_range", "target_kl")


def check_ranges(settings: object, prefix: str = "") -> None:
    """Raise NsrlError, naming the key, for a number out of range; NaN is out of every range, infinity out of most."""
    for key, least in LEAST.items():
        value = vars(settings).get(key)
        most = MOST.get(key, float("inf"))
        if value is not None and not least <= value <= most:
            bounds = f"between {least} and {most}"
            if most == float("inf") or (key == "seed" and value < least):
                bounds = f"at least {least}"
            raise NsrlError(f"{prefix}{key} must be {bounds}, not {value}")
        if value == float("inf") and key not in UNBOUNDED:
            raise NsrlError(f"{prefix}{key} must be finite, not {value}")


def check_chosen(algorithm: Algorithm, ppo: PPOOverrides, trpo: TRPOOverrides) -> None:
    """Raise NsrlError for a setting of the algorithm that was not chosen, which would change nothing."""
    name, others, own = ("trpo", trpo, ppo) if algorithm == "ppo" else ("ppo", ppo, trpo)
    for field in fields(others):
        if getattr(others, field.name) != field.default:
            hint = f"set {algorithm}.{field.name}" if hasattr(own, field.name) else f"set algorithm to {name}"
            raise NsrlError(
                f"{name}.{field.name} is a setting of algorithm {name}, and algorithm is {algorithm}; {hint}, or leave "
                "it out"
            )


def chosen(algorithm: Algorithm, ppo: PPOOverrides, trpo: TRPOOverrides) -> dict[str, Any]:
    """The settings of the algorithm that differ from the agent's, n_envs included."""
    settings = ppo if algorithm == "ppo" else trpo
    return {key: value for key, value in asdict(settings).items() if value is not None}
