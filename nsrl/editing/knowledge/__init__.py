"""What a language model knows: facts to edit, the judge of edits, and tiny models that have been taught facts."""

from typing import TYPE_CHECKING, Any

from nsrl.face import lazily

if TYPE_CHECKING:
    from nsrl.editing.knowledge.evaluation import Judge as Judge
    from nsrl.editing.knowledge.evaluation import Scores as Scores
    from nsrl.editing.knowledge.facts import Fact as Fact
    from nsrl.editing.knowledge.facts import World as World
    from nsrl.editing.knowledge.sampling import sample_texts as sample_texts
    from nsrl.editing.knowledge.tiny import knowing_gpt2 as knowing_gpt2

_names, _load = lazily(
    __name__,
    {
        "nsrl.editing.knowledge.evaluation": "Judge Scores",
        "nsrl.editing.knowledge.facts": "Fact World",
        "nsrl.editing.knowledge.sampling": "sample_texts",
        "nsrl.editing.knowledge.tiny": "knowing_gpt2",
    },
)
__all__ = [*_names]


def __getattr__(name: str) -> Any:
    return _load(name)
