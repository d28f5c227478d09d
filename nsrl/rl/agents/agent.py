"""Pretrained Stable-Baselines3 agents: loaded safely, with their observation statistics, and saved."""

from __future__ import annotations

import hashlib
import inspect
import io
import os
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from gymnasium import Env
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv

from nsrl.errors import NsrlError, check_kind, check_path, described
from nsrl.files import written_atomically
from nsrl.rl.agents.archive import Archive, check_finite, read_archive, read_members, stored_algorithm
from nsrl.rl.agents.locations import download, find_agent, find_statistics, is_hub_url
from nsrl.rl.agents.normalization import ObservationNormalizer, save_stock
from nsrl.rl.agents.openai_gym import gym_in_gymnasium
from nsrl.rl.agents.spaces import check_spaces
from nsrl.rl.agents.stock_models import bare, hyperparameters, named_algorithm, rebuilt, stock_class
from nsrl.rl.agents.zoo_settings import read_settings, told_schedule
from nsrl.rl.policies.distributions import distribution_of


@dataclass(frozen=True)
class Agent:
    """A pretrained policy and all it needs to act as it was trained."""

    model: OnPolicyAlgorithm
    """Stock, without environment and with a fresh optimizer (see `stock_models.ALGORITHMS`); or the model given."""
    normalizer: ObservationNormalizer | None = None
    """What to do to raw observations before `model` sees them; None if nothing."""
    path: Path | None = None
    """The zip; None for a model that was already in memory."""
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    """See `hyperparameters`."""
    untrusted: tuple[str, ...] = ()
    """Hyper-parameters that exist only pickled and are at their defaults."""

    def __post_init__(self) -> None:
        check_kind(
            "the model of an agent", self.model, BaseAlgorithm, "a Stable-Baselines3 model; agents.load reads one"
        )


def load(
    source: str | os.PathLike[str] | BaseAlgorithm | Agent,
    env: Any = None,
    *,
    trust: bool = False,
    device: str = "cpu",
    statistics: bool = True,
) -> Agent:
    """Load a pretrained on-policy agent and its observation statistics without running code from its files.

    Actions and distributions are those of `PPO.load`. Not restored: Adam's moments, which push along the old
    task. Schedules that exist only pickled are read from rl-zoo3's settings, where those are beside the zip.

    Args:
        source: a zip (with or without its suffix), a run folder (see `nsrl.rl.agents.locations`), an address on the
            Hugging Face hub (`hf://user/repo/file.zip`, see `nsrl.rl.agents.locations`), or an SB3 model.
        env: an environment that the agent's spaces must fit; also supplies bounds that the zip's text elides.
        trust: unpickle, as stock `load` does. It can run any code in the file.
        device: where the policy goes.
        statistics: whether to read the observation statistics beside a zip; without, for environments that normalise
            observations themselves, before they stack them, say.

    Raises:
        NsrlError: no such source, nothing readable there, an agent that cannot be fine-tuned, or spaces that differ
            from the env's.
    """
    if env is not None:
        check_kind("env", env, (Env, VecEnv), "a gymnasium.Env or an SB3 VecEnv")
    if isinstance(source, Agent):
        agent = source
    elif isinstance(source, BaseAlgorithm):
        _check_supported(source, "the agent")
        agent = agent_in_memory(source)  # type: ignore[arg-type]
    elif not isinstance(source, str | os.PathLike):
        raise NsrlError(
            f"the agent is {described(source)}, but must be an on-policy Stable-Baselines3 model, an Agent of "
            "nsrl.rl.agents, or the path of a zip or of a folder with one"
        )
    else:
        path = download(source) if is_hub_url(source) else find_agent(os.fspath(source))  # type: ignore[arg-type]
        agent = _from_disk(path, env, trust, device, statistics)
    if env is not None:
        check_spaces(agent.model, env)
    return agent


def agent_in_memory(model: OnPolicyAlgorithm) -> Agent:
    """A model with the statistics of the VecNormalize around its environment."""
    vec_normalize = model.get_vec_normalize_env()
    normalizer = ObservationNormalizer.from_vec_normalize(vec_normalize) if vec_normalize is not None else None
    return Agent(model, normalizer, None, hyperparameters(model))


def _from_disk(path: Path, env: Any, trust: bool, device: str, with_statistics: bool) -> Agent:
    untrusted: tuple[str, ...] = ()
    if trust:
        data, _, _ = read_members(path)
        vec_normalized = data.get("_last_original_obs") is not None
        algorithm = named_algorithm(stored_algorithm(path, data), path)
        try:
            with gym_in_gymnasium():
                model = algorithm.load(path, device=device)
        except Exception as error:  # whatever the unpickled objects raise
            raise NsrlError(f"Stable-Baselines3 cannot load {path}: {type(error).__name__}: {error}") from error
        check_finite(path, model.policy.state_dict())
    else:
        archive = _completed(read_archive(path, env))
        model, untrusted, vec_normalized = rebuilt(archive, device), archive.untrusted, archive.vec_normalized
    _check_supported(model, str(path))
    statistics = find_statistics(path) if with_statistics else None
    normalizer = ObservationNormalizer.load(statistics, trust=trust) if statistics is not None else None
    if normalizer is not None:
        normalizer.check(model.observation_space)
    if statistics is None and vec_normalized and with_statistics:
        warnings.warn(
            f"{path} was trained inside a VecNormalize, but its statistics are not with it: on raw "
            "observations it will act at random; put vecnormalize.pkl beside the zip",
            stacklevel=3,
        )
    if untrusted:
        warnings.warn(
            f"{', '.join(untrusted)} of {path} exist only pickled and are at their defaults; set them, "
            "or load with trust=True (--trust), which can run any code in the file",
            stacklevel=3,
        )
    return Agent(model, normalizer, path, hyperparameters(model), untrusted)


def _completed(archive: Archive) -> Archive:
    """With the schedules that exist only pickled, where rl-zoo3's settings beside the zip say them in plain text."""
    settings = read_settings(archive.path) if archive.untrusted else {}
    if not settings:
        return archive
    defaults = inspect.signature(named_algorithm(archive.algorithm, archive.path).__init__).parameters
    told = {
        name: told_schedule(settings, name, defaults[name].default) for name in archive.untrusted if name in defaults
    }
    known = {name: schedule for name, schedule in told.items() if schedule is not None}
    return replace(
        archive,
        hyperparameters={**archive.hyperparameters, **known},
        untrusted=tuple(name for name in archive.untrusted if name not in known),
    )


def _check_supported(model: BaseAlgorithm, name: str) -> None:
    policies = ActorCriticPolicy | MaskableActorCriticPolicy
    if not isinstance(model, OnPolicyAlgorithm) or not isinstance(model.policy, policies):
        raise NsrlError(
            f"{name} is a {type(model).__name__}; only on-policy actor-critic agents (PPO, A2C, TRPO, MaskablePPO) can "
            "be fine-tuned"
        )
    distribution_of(model.policy)


def fingerprint(policy: torch.nn.Module) -> str:
    """SHA-256 (hex) of all weights and buffers: names in order, dtypes, shapes and bytes.

    Raises:
        NsrlError: it is no policy.
    """
    check_kind("the policy", policy, torch.nn.Module, "a torch module, as a model's policy is")
    digest = hashlib.sha256()
    for name, tensor in sorted(policy.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_agent(model: BaseAlgorithm, path: str | Path) -> Path:
    """Save a model as SB3 does, atomically; returns the path, with the suffix that SB3 adds."""
    return _save(model, path, exclude=())


def export(model: OnPolicyAlgorithm, path: str | Path) -> Path:
    """Save a model as an agent of the stock algorithm that it extends, atomically, for use without nsrl.

    A VecNormalize around its environment is written beside it, as `vecnormalize.pkl`, for stock
    `VecNormalize.load`.

    Raises:
        NsrlError: no model of SB3, it cannot be written, statistics of another agent lie beside the path, or the model
            is held to a budget and not as it was measured inside it.
    """
    check_kind("the model", model, OnPolicyAlgorithm, "an on-policy Stable-Baselines3 model")
    path, vec_normalize = _zip_path(path), model.get_vec_normalize_env()
    if vec_normalize is None and (foreign := find_statistics(path)) is not None:
        raise NsrlError(
            f"beside {path} lies {foreign.name}, which would be taken for the statistics of this agent; it "
            "has none, so export it to another folder"
        )
    export_weights(model, path)
    if vec_normalize is not None:
        save_stock(vec_normalize, path.with_name("vecnormalize.pkl"))
    return path


def export_weights(model: OnPolicyAlgorithm, path: str | Path) -> Path:
    """As `export`, without the statistics."""
    retention = getattr(model, "retention", None)
    if retention is not None:
        retention.verify()  # nobody measures it where it goes
    stock = bare(stock_class(type(model)), ActorCriticPolicy, "cpu")
    known = {*vars(stock), "observation_space", "action_space", "n_envs", "lr_schedule"}
    return _save(model, path, exclude=vars(model).keys() - known)


def _save(model: BaseAlgorithm, path: str | Path, exclude: Any) -> Path:
    path = _zip_path(path)
    # Not into the file: torch.save tells of a full disk by an error that does not say so.
    content = io.BytesIO()
    model.save(content, exclude=exclude)
    with written_atomically(path) as temporary:
        temporary.write_bytes(content.getbuffer())
    return path


def _zip_path(path: str | Path) -> Path:
    check_path("path", path)
    path = Path(path).expanduser()
    return path if path.suffix == ".zip" else Path(f"{path}.zip")


def resolve_agent(
    agent: BaseAlgorithm | Agent | str | os.PathLike[str], trust: bool = False, env: VecEnv | None = None
) -> tuple[OnPolicyAlgorithm, ObservationNormalizer | None, str | None]:
    """The model, its observation statistics, and the name of its file; its spaces fit `env` if that is given.

    Raises:
        NsrlError: for anything but an on-policy agent or the path of one, and for other spaces.
    """
    loaded = load(agent, env=env, trust=trust)
    return loaded.model, loaded.normalizer, None if loaded.path is None else loaded.path.name
