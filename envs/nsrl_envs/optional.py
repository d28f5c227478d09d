"""Environment classes whose packages are optional dependencies."""

import importlib
from typing import Any

from gymnasium.error import DependencyNotInstalled

from nsrl_envs.errors import MissingExtra


def load_environment(entry_point: str, extra: str) -> Any:
    """Import an environment class, or say which extra of nsrl brings what it needs.

    Args:
        entry_point: "module:Class" of the environment.
        extra: Extra of nsrl that installs its dependencies, such as "mujoco".

    Returns:
        The environment class.

    Raises:
        MissingExtra: If a package that the module needs cannot be imported.
    """
    module, name = entry_point.split(":")
    try:
        return getattr(importlib.import_module(module), name)
    # gymnasium raises its own error for MuJoCo and Box2D, but a plain ImportError for the packages these need
    except (ImportError, DependencyNotInstalled) as error:
        raise MissingExtra(
            f"{name} needs the packages of the {extra!r} extra, and one of them cannot be imported; "
            f'install them: pip install "nsrl[{extra}]"'
        ) from error
