"""The closed forms against dense float64 algebra, and against the official code's own formula."""

from __future__ import annotations

import pytest
import torch

from nsrl.editing.closed_form import Preservation, solve_update
from nsrl.editing.methods import METHODS, Method, find_method
from nsrl.errors import NsrlError
from nsrl.projection.constraints.feature_moments import LayerMoments
from tests.editing.builders import OUT, WIDTH, draws, moments


def dense_projector(part: LayerMoments, threshold: float) -> torch.Tensor:
    """As the official code forms it: singular vectors below an absolute threshold."""
    mean = part.moment / part.count
    left, singular, _ = torch.linalg.svd(mean)
    small = left[:, singular < threshold]
    return small @ small.T


@pytest.mark.parametrize("count", [1, 7, 60])
@pytest.mark.parametrize("name", ["alphaedit", "alphaedit_official"])
def test_alphaedit_is_the_official_formula(name: str, count: int) -> None:
    part, method = moments(), METHODS[name]
    keys, residuals, earlier = draws(count)
    projector = dense_projector(part, method.threshold)
    assert 0 < projector.trace() < WIDTH - 0.5
    cache = earlier.T @ earlier
    left = projector @ (keys.T @ keys + cache) + method.ridge * torch.eye(WIDTH, dtype=torch.float64)
    official = torch.linalg.solve(left, projector @ keys.T @ residuals).T
    ours = solve_update(Preservation.of(part, method), keys, residuals, earlier)
    assert float((ours - official).norm()) <= 1e-6 * float(official.norm())


@pytest.mark.parametrize("count", [1, 7, 60])
@pytest.mark.parametrize(
    "method",
    [
        Method(penalty=3.0),
        Method(penalty=3.0, ridge=0.2),
        Method(penalty=0.5, relative_ridge=1e-3),
        find_method("betaedit", penalty=30.0, threshold=0.05),
    ],
)
def test_the_minimiser_is_that_of_dense_algebra(method: Method, count: int) -> None:
    part = moments()
    keys, residuals, earlier = draws(count)
    mean = part.moment / part.count
    projector = torch.eye(WIDTH, dtype=torch.float64)
    if method.threshold is not None:
        projector = dense_projector(part, method.threshold)
    ridge = method.ridge + method.relative_ridge * method.penalty * float(mean.trace()) / WIDTH
    form = keys.T @ keys + earlier.T @ earlier + method.penalty * mean
    if method.projects:
        # D = D P: the normal equations inside the range of P
        values, vectors = torch.linalg.eigh(projector)
        basis = vectors[:, values > 0.5]
    else:
        basis = projector
    inner = basis.T @ form @ basis + ridge * torch.eye(basis.shape[1], dtype=torch.float64)
    dense = (torch.linalg.solve(inner, basis.T @ keys.T @ residuals)).T @ basis.T
    ours = solve_update(Preservation.of(part, method), keys, residuals, earlier)
    # float64, condition of the inner matrix at most 1e7
    assert float((ours - dense).norm()) <= 1e-8 * float(dense.norm())


def test_a_projected_update_does_not_reach_the_excluded_keys() -> None:
    part = moments()
    method = Method(energy=0.9, ridge=1.0)
    preservation = Preservation.of(part, method)
    keys, residuals, _ = draws(9)
    update = solve_update(preservation, keys, residuals)
    leading = part.residual()[1][:, : preservation.excluded]
    assert float((update @ leading).norm()) <= 1e-6 * float(update.norm())
    assert preservation.nbytes()[0] < preservation.nbytes()[1]


def test_deflation_closes_the_directions_of_earlier_keys() -> None:
    preservation = Preservation.of(moments(), Method(history=False, energy=0.5, ridge=1.0, deflation=1.0))
    earlier, _, _ = draws(4, seed=5)
    keys, residuals, _ = draws(3)
    assert preservation.close(earlier, 1.0) == 4
    update = solve_update(preservation, keys, residuals)
    assert float((update @ earlier.T).norm()) > 0.0  # what lies in the excluded directions P does not see
    inside = preservation.project(earlier)
    assert float(inside.norm()) <= 1e-10 * float(earlier.norm())
    assert float((update @ preservation.closed.basis()).norm()) <= 1e-10 * float(update.norm())


def test_history_in_batches_is_all_edits_at_once() -> None:
    """Recursive least squares: with fixed keys MEMIT with history forgets nothing of a batch."""
    part, method = moments(), Method(penalty=2.0, ridge=0.1)
    preservation = Preservation.of(part, method)
    keys, targets, _ = draws(12)
    total = torch.zeros(OUT, WIDTH, dtype=torch.float64)
    for start in range(0, 12, 3):
        now = slice(start, start + 3)
        residual = targets[now] - keys[now] @ total.T
        total = total + solve_update(preservation, keys[now], residual, keys[:start])
    at_once = solve_update(preservation, keys, targets)
    assert float((total - at_once).norm()) <= 1e-9 * float(at_once.norm())


@pytest.mark.parametrize("scale, word", [(1e-4, "next to nothing"), (1e6, "lets next to nothing be edited")])
def test_a_threshold_off_the_scale_is_refused(scale: float, word: str) -> None:
    with pytest.raises(NsrlError, match=word):
        Preservation.of(moments(scale), METHODS["alphaedit"])
    Preservation.of(moments(scale), find_method("alphaedit", kept=(0.0, 1.0)))


def test_a_singular_system_is_refused() -> None:
    with pytest.raises(NsrlError, match="span 5 of 24 dimensions"):
        Preservation.of(moments(rows=5), METHODS["memit"])
    keys, residuals, _ = draws(2)
    with pytest.raises(NsrlError, match="NaN or infinite"):
        solve_update(Preservation.of(moments(), METHODS["memit"]), keys * torch.inf, residuals)


@pytest.mark.parametrize(
    "flags, what",
    [
        ({"penalty": -1.0}, "not negative"),
        ({"penalty": 0.0}, "singular"),
        ({"energy": 1.5}, "share"),
        ({"threshold": 1.0, "energy": 0.5}, "not both"),
        ({"deflation": 0.5}, "narrows a projector"),
        ({"kl_budget": 0.0}, "positive"),
        ({"colour": 1}, "no flag"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, what: str) -> None:
    with pytest.raises(NsrlError, match=what):
        find_method("memit_history", **flags)


def test_an_editor_that_there_is_not() -> None:
    with pytest.raises(NsrlError, match="did you mean alphaedit"):
        find_method("alphaedits")
