"""nsrl: fine-tune pretrained policies on a new task inside a KL budget on an old one.

The names below load on first use, so that `import nsrl` is quick and `nsrl --help` quicker.
"""

from typing import TYPE_CHECKING, Any

import nsrl_envs  # noqa: F401  gymnasium >= 1.0 reads no plugin entry points: importing registers the "nsrl/..." ids
from nsrl.face import lazily
from nsrl.versions import VERSION as __version__

if TYPE_CHECKING:
    from nsrl.rl.algorithms.ppo import NullSpacePPO as NullSpacePPO
    from nsrl.rl.algorithms.protect import protect as protect
    from nsrl.rl.algorithms.trpo import NullSpaceTRPO as NullSpaceTRPO
    from nsrl.rl.retention.buffer import RetentionBuffer as RetentionBuffer

_names, _load = lazily(
    __name__,
    {
        "nsrl.rl.algorithms.ppo": "NullSpacePPO",
        "nsrl.rl.algorithms.protect": "protect",
        "nsrl.rl.algorithms.trpo": "NullSpaceTRPO",
        "nsrl.rl.retention.buffer": "RetentionBuffer",
    },
)
__all__ = [*_names, "__version__"]


def __getattr__(name: str) -> Any:
    return _load(name)
