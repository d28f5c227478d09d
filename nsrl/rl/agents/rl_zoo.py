"""Agents in the layout of rl-zoo3, whose scripts can then play them: FOLDER/ALGO/ENV_N/ENV.zip and what belongs to it.

    run = zoo.export_run(model, "logs")
    rl_zoo3 enjoy --folder logs --algo ppo --env nsrl/CartPole-v0 --gym-packages nsrl_envs

`nsrl.rl.agents.load` reads such a folder too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from gymnasium.envs.registration import EnvSpec, registry
from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from nsrl.errors import NsrlError, check_kind, check_path
from nsrl.files import written_atomically
from nsrl.rl.agents.agent import export_weights
from nsrl.rl.agents.normalization import save_stock
from nsrl.rl.agents.stock_models import hyperparameters

#: What rl-zoo3 calls an algorithm.
NAMES: dict[type[OnPolicyAlgorithm], str] = {PPO: "ppo", A2C: "a2c", TRPO: "trpo"}


def export_run(
    model: OnPolicyAlgorithm,
    folder: str | Path,
    env: str | None = None,
    *,
    env_kwargs: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model as the next run of its algorithm and environment in a folder of rl-zoo3.

    Written are `ENV.zip`, a stock agent; `ENV/vecnormalize.pkl`, where the model's environment is inside a
    VecNormalize; `ENV/config.yml`, its hyper-parameters; and `ENV/args.yml`, the environment.

    Args:
        model: a model with its environment.
        folder: the folder of all algorithms; rl-zoo3's own is called logs.
        env: id of the environment that the scripts are to make; default that of the model's.
        env_kwargs: arguments to make it with; default those that the model's was made with.
        settings: further entries of `config.yml`, as `frame_stack` or `env_wrapper`: what wraps the environment besides
            its registration is not known here.

    Returns:
        The zip.

    Raises:
        NsrlError: an algorithm that rl-zoo3 does not know, an environment without id, or arguments or settings that are
            no plain data.
    """
    check_kind("the model", model, OnPolicyAlgorithm, "an on-policy Stable-Baselines3 model")
    check_path("folder", folder)
    check_kind("env", env, (str, type(None)), "the id of an environment")
    for what, entries in (("env_kwargs", env_kwargs), ("settings", settings)):
        check_kind(what, entries, (Mapping, type(None)), "a mapping")
    algorithm = next((cls for cls in type(model).__mro__ if cls in NAMES), None)
    if algorithm is None:
        raise NsrlError(
            f"rl-zoo3 has no name for {type(model).__name__} that nsrl knows; export PPO, A2C or TRPO, or use save"
        )
    spec = _spec(model) if env is None else None
    env = env or (spec.id if spec is not None else None)
    if env is None:
        raise NsrlError("the model's environment was not made from an id; pass env, the id that rl-zoo3 is to make")
    if env_kwargs is None:
        env_kwargs = _own_arguments(spec) if spec is not None else {}
    normalize = model.get_vec_normalize_env()
    config = _config(model, algorithm) | {"normalize": normalize is not None} | dict(settings or {})
    arguments = {"algo": NAMES[algorithm], "env": env, "env_kwargs": dict(env_kwargs) or None, "seed": model.seed}
    texts = {"config.yml": _plain_yaml(config), "args.yml": _plain_yaml(arguments)}
    name = env.replace("/", "-")  # as huggingface_sb3.EnvironmentName
    run = _next_run(Path(folder).expanduser() / NAMES[algorithm], name)
    for file, text in texts.items():
        with written_atomically(run / name / file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if normalize is not None:
        save_stock(normalize, run / name / "vecnormalize.pkl")
    return export_weights(model, run / f"{name}.zip")


def _spec(model: OnPolicyAlgorithm) -> EnvSpec | None:
    """Registration of the first environment, None when it was not made from the registry."""
    env = model.get_env()
    try:
        return None if env is None else env.get_attr("spec", 0)[0]
    except AttributeError:
        return None


def _own_arguments(spec: EnvSpec) -> dict[str, Any]:
    """What an environment was made with, less what its id implies and how it was shown."""
    implied = registry[spec.id].kwargs if spec.id in registry else {}
    # By their texts, since arrays do not compare to one truth value.
    told = {key: value for key, value in spec.kwargs.items() if repr(value) != repr(implied.get(key))}
    return {key: value for key, value in told.items() if key != "render_mode"}


def _config(model: OnPolicyAlgorithm, algorithm: type[OnPolicyAlgorithm]) -> dict[str, Any]:
    """Hyper-parameters that are plain data, and the run's own numbers."""
    found = hyperparameters(model, algorithm).items()
    plain = {key: value for key, value in found if type(value) in (bool, int, float, type(None))}
    aliases = {cls: alias for alias, cls in algorithm.policy_aliases.items()}
    policy = aliases.get(model.policy_class, model.policy_class.__name__)  # type: ignore[call-overload, union-attr]
    return {"policy": policy, "n_timesteps": int(model.num_timesteps), "n_envs": int(model.n_envs), **plain}


def _plain_yaml(values: Mapping[str, Any]) -> str:
    try:
        return yaml.safe_dump(dict(values))
    except yaml.YAMLError as error:
        raise NsrlError(
            f"{', '.join(values)} cannot be written as YAML ({error}); pass env_kwargs and settings of plain data"
        ) from error


def _next_run(folder: Path, name: str) -> Path:
    """A fresh folder NAME_N, N one more than the largest there is."""
    pattern = re.compile(rf"{re.escape(name)}_(\d+)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            taken = [int(match[1]) for path in folder.iterdir() if (match := pattern.fullmatch(path.name))]
            run = folder / f"{name}_{max(taken, default=0) + 1}"
            try:
                run.mkdir()
                return run
            except FileExistsError:  # another run has taken the number meanwhile
                continue
    except OSError as error:
        raise NsrlError(f"cannot make a run folder in {folder}: {error.strerror or error}") from error
