"""What an editor says of a batch and of all it has done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchReport:
    """One batch of edits.

    Attributes:
        edits: how many.
        kl: of the preserved text after the batch, nats per token; None without a budget, where nothing is measured.
        penalty: weight that keeps the budget; None without one.
        missing: mean distance to the wanted hidden state, in units of the way there.
        written: share of the edits that miss at most a tenth of the way.
        change: |W - W0| / |W0|, mean over the layers.
        searching: seconds for the values; 0 where they were given.
        seconds: all of it.
    """

    edits: int
    kl: float | None
    penalty: float | None
    missing: float
    written: float
    change: float
    searching: float
    seconds: float


@dataclass(frozen=True)
class EditorReport:
    """All batches.

    Attributes:
        edits: how many have been applied.
        batches: one report each.
        tokens: preserved ones that were counted.
        kl_mean: of the preserved text now, nats per token; None where no text is measured.
        kl_heldout: of held-out preserved text.
        budget: on `kl_mean`; None without one.
        kept_share: of the directions of every layer, how many may be edited.
        bytes_thin: memory of the excluded directions as they are stored.
        bytes_dense: memory of the projectors, were they matrices.
    """

    edits: int
    batches: tuple[BatchReport, ...]
    tokens: int
    kl_mean: float | None
    kl_heldout: float | None
    budget: float | None
    kept_share: Mapping[str, float]
    bytes_thin: int
    bytes_dense: int

    def __str__(self) -> str:
        def number(value: float | None) -> str:
            return "-" if value is None else f"{value:.3g}"

        return (
            f"{self.edits} edits in {len(self.batches)} batches, KL of preserved text {number(self.kl_mean)} "
            f"(held out {number(self.kl_heldout)}, budget {number(self.budget)}), excluded directions in "
            f"{self.bytes_thin / 2**20:.2f} MiB (as matrices {self.bytes_dense / 2**20:.2f} MiB)"
        )
