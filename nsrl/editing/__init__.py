"""Transformers: single facts edited into a language model, and post-training beside what it knows already.

The names below load on first use, so that `nsrl edit --help` and a mistyped key are answered without torch.
"""

from typing import TYPE_CHECKING, Any

from nsrl.face import lazily

if TYPE_CHECKING:
    from nsrl.editing.callback import GuardCallback as GuardCallback
    from nsrl.editing.editor import Editor as Editor
    from nsrl.editing.edits import Edit as Edit
    from nsrl.editing.guard import ModuleGuard as ModuleGuard
    from nsrl.editing.guard import protect_module as protect_module
    from nsrl.editing.methods import METHODS as METHODS
    from nsrl.editing.methods import Method as Method
    from nsrl.editing.retention_file import RetentionFile as RetentionFile
    from nsrl.editing.values import Values as Values
    from nsrl.editing.values import ValueSearch as ValueSearch

_names, _load = lazily(
    __name__,
    {
        "nsrl.editing.callback": "GuardCallback",
        "nsrl.editing.edits": "Edit",
        "nsrl.editing.guard": "ModuleGuard protect_module",
        "nsrl.editing.retention_file": "RetentionFile",
        "nsrl.editing.editor": "Editor",
        "nsrl.editing.methods": "METHODS Method",
        "nsrl.editing.values": "Values ValueSearch",
    },
)
__all__ = [*_names]


def __getattr__(name: str) -> Any:
    return _load(name)
