"""Transformers: single facts edited into a language model, and post-training beside what it knows already.

The names below load on first use, so that `nsrl edit --help` and a mistyped key are answered without torch.
"""

from typing import TYPE_CHECKING, Any

from nsrl.face import lazily

if TYPE_CHECKING:
    from nsrl.editing.edits import Edit as Edit

_names, _load = lazily(
    __name__,
    {
        "nsrl.editing.edits": "Edit",
    },
)
__all__ = [*_names]


def __getattr__(name: str) -> Any:
    return _load(name)
