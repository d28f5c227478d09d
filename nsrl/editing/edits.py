"""An edit: what the model should say about a subject from now on."""

from __future__ import annotations

from dataclasses import dataclass

from nsrl.errors import NsrlError


@dataclass(frozen=True)
class Edit:
    """One fact to be written into a model.

    Attributes:
        prompt: text that the target continues, with one {} where the subject goes, as "The capital of {} is".
        subject: what the fact is about; its last token's key carries the edit.
        target: what the model should answer, with the space in front that the tokenizer expects, as " Rome".
    """

    prompt: str
    subject: str
    target: str

    def __post_init__(self) -> None:
        if self.prompt.count("{}") != 1:
            raise NsrlError(
                f"the prompt {self.prompt!r} must have one {{}} where the subject goes, as in 'The capital of {{}} is'"
            )
        if not self.subject.strip() or not self.target.strip():
            raise NsrlError(f"an edit needs a subject and a target, but {self!r} lacks one")

    @property
    def text(self) -> str:
        """The prompt with its subject."""
        return self.prompt.replace("{}", self.subject)
