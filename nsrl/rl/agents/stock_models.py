"""The stock SB3 model that an archive describes, and the hyper-parameters that a model can hand on."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import torch
from gymnasium import spaces
from sb3_contrib import TRPO, MaskablePPO
from sb3_contrib.common.maskable.policies import (
    MaskableActorCriticCnnPolicy,
    MaskableActorCriticPolicy,
    MaskableMultiInputActorCriticPolicy,
)
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule
from torch import Tensor

from nsrl.errors import NsrlError
from nsrl.reading.limits import shown
from nsrl.rl.agents.archive import Archive

ALGORITHMS: dict[str, type[OnPolicyAlgorithm]] = {"PPO": PPO, "A2C": A2C, "TRPO": TRPO, "MaskablePPO": MaskablePPO}
POLICIES: dict[str, type[BasePolicy]] = {
    cls.__name__: cls
    for cls in (
        ActorCriticPolicy,
        ActorCriticCnnPolicy,
        MultiInputActorCriticPolicy,
        MaskableActorCriticPolicy,
        MaskableActorCriticCnnPolicy,
        MaskableMultiInputActorCriticPolicy,
    )
}
# Constructor arguments that describe a run, not an algorithm: a fine-tuning run sets its own.
OF_THE_RUN = {
    "self",
    "policy",
    "env",
    "policy_kwargs",
    "seed",
    "device",
    "verbose",
    "tensorboard_log",
    "stats_window_size",
    "rollout_buffer_class",
    "rollout_buffer_kwargs",
    "_init_setup_model",
}
# In TRPO these steer the critic's fit and the trust region; in PPO they steer the whole loss and an early
# stop.
TRPO_ONLY = {"learning_rate", "batch_size", "target_kl"}


def rebuilt(archive: Archive, device: str = "cpu") -> OnPolicyAlgorithm:
    """The stock SB3 model that an archive describes, without environment and with a fresh optimizer.

    Raises:
        NsrlError: an algorithm that is not in `ALGORITHMS`, or weights that do not fit the described policy.
    """
    algorithm = named_algorithm(archive.algorithm, archive.path)
    try:
        # Building draws initial weights; the caller's random numbers are not to depend on that.
        with torch.random.fork_rng(devices=[]):
            model = bare(algorithm, POLICIES[archive.policy_class], device)
            for name in arguments(algorithm) & archive.hyperparameters.keys():
                setattr(model, name, archive.hyperparameters[name])
            model.observation_space, model.action_space = archive.observation_space, archive.action_space
            model.policy_kwargs, model.n_envs = dict(archive.policy_kwargs), 1
            model.num_timesteps = int(archive.hyperparameters.get("num_timesteps") or 0)
            given = _fitting(archive, _sketch(archive))
            model._setup_model()
    except NsrlError:
        raise
    except Exception as error:  # SB3 checks its arguments with assertions, numpy and torch with exceptions of all kinds
        reason = shown(str(error) or type(error).__name__, 300)
        raise NsrlError(f"the policy that {archive.path} describes cannot be built: {reason}") from error
    model.policy.load_state_dict(given)
    return model


def bare(algorithm: type[OnPolicyAlgorithm], policy: type[BasePolicy], device: str) -> OnPolicyAlgorithm:
    """An instance without environment, spaces and networks, as SB3's own `load` starts from."""
    return algorithm(policy, None, device=device, _init_setup_model=False)  # type: ignore[call-arg, arg-type]


def _sketch(archive: Archive) -> ActorCriticPolicy:
    """The described policy without memory for its weights, whose sizes a file may choose as it likes."""
    # under gSDE a policy draws its noise when it is built, which needs memory: `_fitting` knows what differs
    odd = ("use_sde", "squash_output")
    kwargs = {**{k: v for k, v in archive.policy_kwargs.items() if k not in odd}, "ortho_init": False}
    nowhere = torch.device("meta")
    sketch: Any = type("Sketch", (POLICIES[archive.policy_class],), {"device": nowhere})
    with nowhere:
        return sketch(_unseeded(archive.observation_space), archive.action_space, lambda _: 0.0, **kwargs)


def _unseeded(space: spaces.Space) -> Any:
    """A space with its own random generator, from which convolutional policies draw an observation to see its size."""
    twin: Any = copy.copy(space)
    twin._np_random = None
    if isinstance(twin, spaces.Dict):
        twin.spaces = {key: _unseeded(part) for key, part in twin.spaces.items()}
    return twin


def _fitting(archive: Archive, policy: ActorCriticPolicy) -> dict[str, Tensor]:
    """The archive's weights under the names of the policy, whose shapes they have."""
    expected, given = policy.state_dict(), dict(archive.state_dict)
    if archive.hyperparameters.get("use_sde") or archive.policy_kwargs.get("use_sde"):
        actions, features = expected["action_net.weight"].shape
        full = archive.policy_kwargs.get("full_std", True)
        expected["log_std"] = torch.empty(features, actions if full else 1, device="meta")
    for alias in ("pi_features_extractor", "vf_features_extractor"):
        # SB3 before 1.7 stored a shared extractor once.
        for name in [name for name in expected if name.startswith(f"{alias}.") and name not in given]:
            shared = name.replace(alias, "features_extractor", 1)
            if shared in given and policy.share_features_extractor:
                given[name] = given[shared]
    wanted, found = ({name: tuple(tensor.shape) for name, tensor in state.items()} for state in (expected, given))
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise NsrlError(
                f"the weights of {archive.path} do not fit its policy: {shown(name)} has shape "
                f"{found.get(name, 'none')}, expected {wanted.get(name, 'none')}; save the agent again"
            )
    return given


def named_algorithm(name: str, path: Path) -> type[OnPolicyAlgorithm]:
    """One of `ALGORITHMS`.

    Raises:
        NsrlError: any other, whose actions depend on memory too.
    """
    if name not in ALGORITHMS:
        raise NsrlError(f"{path} is a {name} agent; only PPO, A2C, TRPO and MaskablePPO agents can be fine-tuned")
    return ALGORITHMS[name]


def arguments(algorithm: type[BaseAlgorithm]) -> set[str]:
    """Constructor arguments of the stock algorithm under `algorithm` that are hyper-parameters."""
    return set(inspect.signature(stock_class(algorithm).__init__).parameters) - OF_THE_RUN


def stock_class(algorithm: type[BaseAlgorithm]) -> type[OnPolicyAlgorithm]:
    """The one of `ALGORITHMS` that a class is or extends; PPO for any other."""
    return next((cls for cls in algorithm.__mro__ if cls in ALGORITHMS.values()), PPO)


#: Schedules with which, at zero throughout, no weight moves: what rl-zoo's enjoy loads agents with.
MOVING = ("learning_rate", "clip_range")


def hyperparameters(model: BaseAlgorithm, algorithm: type[BaseAlgorithm] = PPO) -> dict[str, Any]:
    """Keyword arguments of `algorithm` that fine-tuning inherits from a model: those that both classes have.

    Constant schedules come as plain numbers. Between TRPO and the others, those that mean something else there
    stay behind, and those of `left_behind` and `foreign_defaults`.
    """
    names = _shared(model, algorithm) - left_behind(model, algorithm).keys() - foreign_defaults(model, algorithm).keys()
    return {name: _plain_schedule(vars(model)[name]) for name in sorted(names)}


def left_behind(model: BaseAlgorithm, algorithm: type[BaseAlgorithm] = PPO) -> dict[str, str]:
    """Settings that `algorithm` has too and should not learn with, each with what is the matter with it."""
    names, found = _shared(model, algorithm), {}
    for name in MOVING:
        if name in names and is_zero(vars(model)[name]):
            found[name] = "0, with which no weight moves"
    if "n_steps" in names and stock_class(type(model)) is A2C and stock_class(algorithm) is not A2C:
        found["n_steps"] = f"{vars(model)['n_steps']}, the length of an A2C's rollouts"
    return found


def foreign_defaults(model: BaseAlgorithm, algorithm: type[BaseAlgorithm] = PPO) -> dict[str, Any]:
    """Settings that nobody chose, by name: at the default of the model's algorithm, where `algorithm` has another.

    A2C's advantages are neither normalised nor a trade-off (`gae_lambda` 1), which PPO hardly learns with.
    """
    source, target = stock_class(type(model)), stock_class(algorithm)
    if source is target:
        return {}
    theirs, ours = (inspect.signature(cls.__init__).parameters for cls in (source, target))
    values = {name: _plain_schedule(vars(model)[name]) for name in _shared(model, algorithm)}
    return {
        name: value
        for name, value in sorted(values.items())
        if value == theirs[name].default and theirs[name].default != ours[name].default
        if name not in left_behind(model, algorithm)
    }


def set_in_motion(model: BaseAlgorithm) -> dict[str, Any]:
    """Set a model's schedules that are zero throughout to the algorithm's defaults, in place; returns those."""
    given = inspect.signature(stock_class(type(model)).__init__).parameters
    changed = {name: given[name].default for name in MOVING if name in vars(model) and is_zero(vars(model)[name])}
    for name, value in changed.items():
        setattr(model, name, value if name == "learning_rate" else FloatSchedule(value))
    if "learning_rate" in changed:
        model._setup_lr_schedule()
    return changed


def _shared(model: BaseAlgorithm, algorithm: type[BaseAlgorithm]) -> set[str]:
    names = arguments(algorithm) & arguments(type(model))
    if (stock_class(type(model)) is TRPO) != (stock_class(algorithm) is TRPO):
        names -= TRPO_ONLY
    return names & vars(model).keys()


def _plain_schedule(value: Any) -> Any:
    value = value.value_schedule if isinstance(value, FloatSchedule) else value
    return value.val if isinstance(value, ConstantSchedule) else value


def is_zero(value: Any) -> bool:
    """Whether a number, or a schedule all along (1 is its start, 0 its end), is zero."""
    value = _plain_schedule(value)
    if callable(value):
        return all(float(value(progress)) == 0.0 for progress in (1.0, 0.75, 0.5, 0.25))
    return isinstance(value, int | float) and value == 0
