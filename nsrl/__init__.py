"""nsrl: fine-tune pretrained policies on a new task inside a KL budget on an old one.

The names below load on first use, so that `import nsrl` is quick and `nsrl --help` quicker.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import nsrl_envs  # noqa: F401  gymnasium >= 1.0 reads no plugin entry points: importing registers the "nsrl/..." ids

if TYPE_CHECKING:
    from nsrl.rl.algorithms.ppo import NullSpacePPO as NullSpacePPO
    from nsrl.rl.algorithms.protect import protect as protect
    from nsrl.rl.algorithms.trpo import NullSpaceTRPO as NullSpaceTRPO
    from nsrl.rl.retention.buffer import RetentionBuffer as RetentionBuffer

__version__ = "0.1.0"
__all__ = ["NullSpacePPO", "NullSpaceTRPO", "RetentionBuffer", "__version__", "protect"]

_HOMES = {
    "NullSpacePPO": "nsrl.rl.algorithms.ppo",
    "NullSpaceTRPO": "nsrl.rl.algorithms.trpo",
    "RetentionBuffer": "nsrl.rl.retention.buffer",
    "protect": "nsrl.rl.algorithms.protect",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nsrl' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
