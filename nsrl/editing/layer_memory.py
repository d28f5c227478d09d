"""What one layer has been taught: keys and wanted changes of its output, and the displacement that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsrl.editing.closed_form import Preservation, least_update, solve_update
from nsrl.editing.layers import EditedLayer
from nsrl.editing.methods import Method
from nsrl.errors import NsrlError
from nsrl.projection.constraints.feature_moments import LayerMoments, Subspace

#: The weakest penalty of an editor with a budget, times the mean leverage k^T C^{-1} k of the keys: about this share of
#: what is asked stays missing.
WEAKEST = 0.01


@dataclass(frozen=True)
class State:
    """Enough to go back to: the weight, and what was known.

    Attributes:
        weight: as the module holds it.
        keys: shape (n, d_in).
        wanted: shape (n, d_out).
        closed: directions that deflation has closed.
    """

    weight: Tensor
    keys: Tensor | None
    wanted: Tensor | None
    closed: Subspace | None


class LayerMemory:
    """The edits of one layer.

    Args:
        layer: the edited map.
        method: how.

    Attributes:
        layer: as given.
        keys: of all edits so far, shape (n, d_in), float64; None before the first.
        wanted: changes of the map's output at these keys, shape (n, d_out), float64.
    """

    def __init__(self, layer: EditedLayer, method: Method):
        self.layer, self.method = layer, method
        self.keys: Tensor | None = None
        self.wanted: Tensor | None = None
        self._preservation: Preservation | None = None
        self._moments: LayerMoments | None = None
        self._original: Tensor | None = None
        self._prices: tuple[float, Tensor, Tensor, Tensor] | None = None
        self._closed_until = 0
        self._seen = self._mark()

    @property
    def kept_share(self) -> float:
        """Share of the directions that may be edited; 1 before anything is known."""
        return 1.0 if self._preservation is None else self._preservation.kept_share

    def prepare(self, moments: LayerMoments) -> None:
        """Decompose the second moment, once.

        Raises:
            NsrlError: as `Preservation.of`.
        """
        if self._preservation is None or self._moments is not moments:
            self._preservation, self._moments = Preservation.of(moments, self.method), moments

    def add(self, keys: Tensor, residual: Tensor, penalty: float | None = None) -> None:
        """Write changes of the output at some keys.

        Args:
            keys: shape (n, d_in), float64.
            residual: what is missing at them now, shape (n, d_out), float64.
            penalty: weight of the second moment, where a budget is kept; None for the weakest.

        Raises:
            NsrlError: the system is singular, or something is NaN.
        """
        preservation = self._known()
        if self._original is None:
            self._original = self.layer.weight.detach().clone()
        displacement = self.layer.displacement(self._original)
        earlier, past = self.keys, self.wanted
        wanted = residual + keys @ displacement.T
        self.keys = keys if earlier is None else torch.cat([earlier, keys])
        self.wanted = wanted if past is None else torch.cat([past, wanted])
        if self.method.kl_budget is not None:
            self.solve(self.weakest() if penalty is None else max(penalty, self.weakest()))
            return
        step = solve_update(preservation, keys, residual, earlier if self.method.history else None)
        self._write(displacement + step)

    def solve(self, penalty: float) -> None:
        """The displacement of all edits at once, from the original weight, at some weight of the second moment.

        Raises:
            NsrlError: the system is singular, or something is NaN.
        """
        assert self.wanted is not None
        self._write(solve_update(self._at(penalty), self._every(), self.wanted))

    def displacement(self) -> Tensor:
        """The weight as it is less the original one, shape (d_out, d_in), float64."""
        if self._original is None:
            self._original = self.layer.weight.detach().clone()
        return self.layer.displacement(self._original)

    def remember(self, keys: Tensor, displacement: Tensor) -> None:
        """Add edits of which no wanted change is known yet: what earlier edits have brought about there is a guess.

        Args:
            keys: shape (n, d_in), float64.
            displacement: that earlier edits have made, shape (d_out, d_in), float64.
        """
        wanted = keys @ displacement.T
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys])
        self.wanted = wanted if self.wanted is None else torch.cat([self.wanted, wanted])

    def price(self, penalty: float) -> Tensor:
        """K A^{-1} K^T of all keys: what it costs to write them, at some weight of the second moment; shape (n, n)."""
        return self._priced(penalty)[1]

    def leverage(self, penalty: float) -> float:
        """Mean of the price's diagonal."""
        return float(self._at(penalty).root(self._every()).square().sum(1).mean())

    def known(self) -> Tensor:
        """Wanted changes of all edits, shape (n, d_out)."""
        assert self.wanted is not None
        return self.wanted

    def interpolate(self, wanted: Tensor, penalty: float) -> None:
        """Write the least displacement, in the metric A, that changes the output at every key as it is wanted.

        Args:
            wanted: of all edits, from the original weight, shape (n, d_out).
            penalty: weight of the second moment.
        """
        rows, price = self._priced(penalty)
        self.wanted = wanted
        self._write(self._at(penalty).root(least_update(rows, price, wanted)))

    def _at(self, penalty: float) -> Preservation:
        assert self._moments is not None
        return Preservation.of(self._moments, self.method, penalty)

    def _priced(self, penalty: float) -> tuple[Tensor, Tensor]:
        """A^{-1/2} times all keys, and their Gram; those of the last call where they are the same."""
        keys = self._every()
        if self._prices is None or self._prices[0] != penalty or self._prices[1] is not keys:
            rows = self._at(penalty).root(keys)
            self._prices = penalty, keys, rows, rows @ rows.T
        return self._prices[2], self._prices[3]

    def _every(self) -> Tensor:
        assert self.keys is not None
        return self.keys

    def weakest(self) -> float:
        """The least weight of the second moment that a budget may ask for."""
        return WEAKEST * self.leverage(1.0)

    def close(self) -> None:
        """Where the method deflates: close the directions of the newest keys to later batches."""
        if self.method.deflation is not None and self.keys is not None:
            self._known().close(self.keys[self._closed_until :], self.method.deflation)
            self._closed_until = len(self.keys)

    def change(self) -> float:
        """|W - W0| / |W0|."""
        if self._original is None:
            return 0.0
        return float(self.layer.displacement(self._original).norm() / self._original.double().norm())

    def nbytes(self) -> tuple[int, int]:
        """Excluded directions as stored, and as a projector matrix, in bytes."""
        return (0, 0) if self._preservation is None else self._preservation.nbytes()

    def state(self) -> State:
        """A copy of what can be gone back to."""
        closed = self._preservation.closed if self._preservation is not None else None
        return State(self.layer.weight.detach().clone(), self.keys, self.wanted, closed)

    def set_state(self, state: State) -> None:
        """Go back to it."""
        self.keys, self.wanted = state.keys, state.wanted
        self._closed_until = 0 if state.keys is None else len(state.keys)
        if self._preservation is not None and state.closed is not None:
            self._preservation.closed = state.closed
        self._set(state.weight)

    def restore(self, moments: LayerMoments, state: State, batches: Sequence[int]) -> None:
        """Go to where another memory of the same unedited layer was.

        Args:
            moments: of the preserved keys.
            state: of the other memory.
            batches: edits of each of its batches; what deflation had closed is closed again, batch by batch.
        """
        self.prepare(moments)
        assert state.keys is not None and state.wanted is not None
        self._original = self.layer.weight.detach().clone()
        stop = 0
        for edits in batches:
            stop += edits
            self.keys = state.keys[:stop]
            self.close()
        self.keys, self.wanted, self._closed_until = state.keys, state.wanted, stop
        self._set(state.weight)

    def show_original(self) -> None:
        """The weight as before the first edit, for a while; `set_state` ends it."""
        if self._original is not None:
            self._set(self._original)

    def reset(self) -> None:
        """The weight as before the first edit, for good."""
        self.show_original()
        self.keys = self.wanted = self._original = self._preservation = self._prices = None
        self._closed_until = 0

    def check_untouched(self) -> None:
        """Raise NsrlError where somebody else has changed the weight since this memory last did.

        Raises:
            NsrlError: naming the layer.
        """
        if self._seen != self._mark():
            raise NsrlError(
                f"the weight of {self.layer.name} has been changed by somebody else since the editor last saw it; make "
                "a new Editor for the model as it is now"
            )

    def _known(self) -> Preservation:
        assert self._preservation is not None
        return self._preservation

    def _write(self, displacement: Tensor) -> None:
        assert self._original is not None
        self.layer.write(self._original, displacement)
        self._seen = self._mark()

    def _set(self, weight: Tensor) -> None:
        with torch.no_grad():
            self.layer.weight.copy_(weight)
        self._seen = self._mark()

    def _mark(self) -> tuple[int, int, int]:
        weight = self.layer.weight
        return id(weight), weight.data_ptr(), weight._version
