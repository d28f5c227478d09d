"""The editors by name: flags on one closed form.

With keys K (d_in, n) and residuals R (d_out, n) of the edits at hand, keys Kp of earlier ones and the second moment C
of the keys of preserved text, all of them are

    minimise |D K - R|^2 + [history] |D Kp|^2 + penalty tr(D C D^T) + ridge |D|^2    over D = D P

with P the identity, or the projector onto the directions of C below a threshold. `nsrl` asks for the answers instead of
D K = R, at the least of the two last terms (`nsrl.editing.joint.search`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from nsrl.errors import NsrlError, nearest


@dataclass(frozen=True)
class Method:
    """One editor.

    Attributes:
        history: keys of earlier edits count as preserved.
        penalty: weight of the second moment of the preserved keys, per token.
        ridge: weight of |D|^2.
        relative_ridge: weight of |D|^2 in units of `penalty` times the mean eigenvalue of the second moment.
        threshold: directions of the second moment with a larger eigenvalue are excluded; absolute, as published, and
            therefore not scale free. None excludes none.
        energy: exclude the leading directions that hold this share of the trace instead.
        deflation: share of the energy of a batch's projected keys whose directions are closed to later batches.
        anchor: a value vector gets the norm of the hidden state that it replaces.
        kl_budget: nats per token of the preserved text, measured after every batch and kept; None keeps none.
        together: weight of what writing costs, where values of all edits are searched for at once and written from the
            original weights (`nsrl.editing.joint.search`): moving one hidden state by its own length costs as much as
            an answer that misses its margin by sqrt(together) nats. None takes each value as found alone.
        kept: share of all directions that a projector has to leave, least and most.
    """

    history: bool = True
    penalty: float = 0.0
    ridge: float = 0.0
    relative_ridge: float = 0.0
    threshold: float | None = None
    energy: float | None = None
    deflation: float | None = None
    anchor: bool = False
    kl_budget: float | None = None
    together: float | None = None
    kept: tuple[float, float] = (0.01, 0.99)

    def __post_init__(self) -> None:
        for key in ("penalty", "ridge", "relative_ridge"):
            if not 0.0 <= getattr(self, key) < math.inf:
                raise NsrlError(f"{key} must be finite and not negative, not {getattr(self, key)}")
        if not self.penalty and not self.ridge:
            raise NsrlError("an editor needs a penalty or a ridge, or its system is singular; give one of them")
        if self.threshold is not None and self.energy is not None:
            raise NsrlError("give a threshold or an energy, not both")
        if self.threshold is not None and not 0.0 <= self.threshold < math.inf:
            raise NsrlError(f"the threshold is an eigenvalue, so it cannot be {self.threshold}")
        for key in ("energy", "deflation"):
            share = getattr(self, key)
            if share is not None and not 0.0 < share <= 1.0:
                raise NsrlError(f"{key} is a share in (0, 1], not {share}")
        if self.deflation is not None and not self.projects:
            raise NsrlError("deflation narrows a projector; give a threshold or an energy too")
        if self.deflation is not None and self.penalty:
            raise NsrlError("deflation goes with a ridge alone; leave the penalty at 0")
        if self.kl_budget is not None and not 0.0 < self.kl_budget < math.inf:
            raise NsrlError(f"the KL budget must be positive and finite, not {self.kl_budget}")
        if self.kl_budget is not None and not self.penalty:
            raise NsrlError("a KL budget is kept by a stronger penalty, so it needs one to begin with")
        if self.together is not None:
            if not 0.0 < self.together < math.inf:
                raise NsrlError(f"the weight of a search together must be positive and finite, not {self.together}")
            if self.kl_budget is None or self.anchor or self.projects or not (self.ridge or self.relative_ridge):
                raise NsrlError(
                    "values are searched for together where a KL budget and a ridge are given, without projector and "
                    "anchor; change these, or set together to None"
                )

    @property
    def projects(self) -> bool:
        """Whether directions are excluded."""
        return self.threshold is not None or self.energy is not None


#: `memit` and `alphaedit_official` have the constants of the official code; the paper of AlphaEdit has 1e-2 and 1.
METHODS: Mapping[str, Method] = {
    "memit": Method(history=False, penalty=15000.0),
    "memit_history": Method(penalty=15000.0),
    "alphaedit": Method(threshold=1e-2, ridge=1.0),
    "alphaedit_official": Method(threshold=2e-2, ridge=10.0),
    "alphaedit_energy": Method(energy=0.9, ridge=1.0),
    "betaedit": Method(threshold=2e-2, ridge=1.0, penalty=3000.0),
    "evoedit": Method(history=False, threshold=2e-2, ridge=1.0, deflation=0.9),
    "anchored": Method(penalty=15000.0, anchor=True),
    "nsrl": Method(penalty=1.0, relative_ridge=1e-4, together=10.0, kl_budget=0.01),
}


def find_method(name: str, **options: Any) -> Method:
    """An editor by name, with some of its flags replaced.

    Raises:
        NsrlError: there is no such editor, or it has no such flag.
    """
    if name not in METHODS:
        near = nearest(name, METHODS, 0.5)
        hint = f"did you mean {near}?" if near else f"there are {', '.join(METHODS)}"
        raise NsrlError(f"there is no editor {name!r}; {hint}")
    known = [item.name for item in fields(Method)]
    for key in options:
        if key not in known:
            raise NsrlError(f"an editor has no flag {key!r}; it has {', '.join(known)}")
    return replace(METHODS[name], **options)
