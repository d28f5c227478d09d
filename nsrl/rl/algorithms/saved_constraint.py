"""The constraint that a zip was saved under: what it asks for when the model learns again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from nsrl.errors import NsrlError
from nsrl.reading.documents import parse_json
from nsrl.reading.limits import Unreadable, shown
from nsrl.reading.values import finite, mapping, whole
from nsrl.rl.budget.config import RetentionConfig

#: Fields that zips of earlier versions do not have.
LATER = ("method", "penalty", "trusted", "opened", "units", "block", "given")


@dataclass(frozen=True)
class SavedConstraint:
    """How a model was held when it was saved; the buffer itself is not in the zip, only its digest.

    Attributes:
        config: how the budget was kept.
        digest: of the buffer (`RetainedStates.digest`).
        method: of the engine: "null_space", "kl_penalty" or "finetune".
        penalty: coefficient of the KL penalty.
        trusted: whether the buffer was taken with `trust_buffer`.
        opened: whether the opening was behind it; zips of before this was noted were saved behind it as a rule.
        units: hidden units that the opening had freed.
        block: which they are (`FreeBlock.written`); None where there are none, or where nobody noted it.
        given: digest of the buffer that the run began with, where refreshes have added states to it since; else empty.
    """

    config: RetentionConfig
    digest: str
    method: str = "null_space"
    penalty: float = 1.0
    trusted: bool = False
    opened: bool = True
    units: int = 0
    block: dict[str, Any] | None = None
    given: str = ""

    def written(self) -> str:
        """As a line of JSON, which SB3 stores as it is."""
        return json.dumps({**vars(self), "config": asdict(self.config)})

    @classmethod
    def read(cls, text: str) -> SavedConstraint:
        """Inverse of `written`.

        Raises:
            NsrlError: anything that `written` cannot have given.
        """
        try:
            content = mapping(parse_json(text), "it", ("config", "digest"), LATER)
            settings = mapping(content["config"], "its settings")
            known = {entry.name for entry in fields(RetentionConfig)}
            if settings.keys() <= known:
                return cls(**{**content, "config": RetentionConfig(**settings)})._checked()
            reason = f"its settings {shown(sorted(settings.keys() - known))} are unknown to this nsrl"
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            reason = shown(f"{type(error).__name__}: {error}", 200)
        raise NsrlError(
            f"the zip's record of its retention constraint cannot be read ({reason}); protect the model anew"
        )

    def _checked(self) -> SavedConstraint:
        """Itself.

        Raises:
            Unreadable: a field is of another kind than `written` gives.
        """
        for name, kind in (("digest", str), ("method", str), ("trusted", bool), ("opened", bool), ("given", str)):
            if type(getattr(self, name)) is not kind:
                raise Unreadable(f"its {name} is {shown(getattr(self, name))}")
        finite(self.penalty, "its penalty", 0.0)
        whole(self.units, "its units")
        if self.block is not None:
            mapping(self.block, "its free block")
        return self

    def resumed(self) -> RetentionConfig:
        """The configuration to go on with: what happens once at the start of a run has happened.

        The opening is left in, since it says that a Gaussian explores with a spread of its own.
        """
        return replace(self.config, critic="keep", log_std_init=None)

    def other(self, digest: str) -> str:
        """The sentence for a buffer of another digest than the model was saved under."""
        if digest == self.given:
            return (
                "the buffer that the run began with has been refreshed since, and the model is held to all of its "
                "states: give that one, which model.retention.constraint.buffer.save(path) writes beside the zip"
            )
        return (
            f"the model was saved under another buffer (digest {self.digest[:12]}, this one has {digest[:12]}); give "
            "that one, or load without retain and call protect(model, retain=buffer)"
        )

    def missing(self, name: str) -> str:
        """The sentence for a model of class `name` that would learn without."""
        return (
            f"this model was saved under a KL budget of {self.config.kl_budget:g} on a retention buffer (digest "
            f"{self.digest[:12]}) that has not been given again, and would forget what it retained: load it with "
            f"{name}.load(path, env=env, retain=RetentionBuffer.load(...)), or call protect(model, retain=buffer)"
        )
