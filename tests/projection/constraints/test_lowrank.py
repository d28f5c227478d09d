"""Streaming low-rank constraints: one shot against many, bounded memory, a protected core that never shrinks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nsrl.projection import (
    Hard,
    JacobianConstraint,
    LowRankConstraint,
    SmallestMultiple,
    StackedJacobian,
    Tikhonov,
    jacobian,
    parameter_columns,
)
from tests.projection.builders import matrix_jacobian, mlp, normal

WIDTH = 15


def empty(max_rank: int = 64, width: int = WIDTH) -> LowRankConstraint:
    return LowRankConstraint({"weight": (0, width)}, max_rank)


def form(constraint: LowRankConstraint) -> Tensor:
    return constraint.basis * constraint.values @ constraint.basis.T


def assert_orthonormal(basis: Tensor) -> None:
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]).double(), rtol=0, atol=1e-12)


def test_streaming_equals_one_shot():
    net = mlp(5, 8, 2).double()
    columns = parameter_columns(net)
    batches = [jacobian(net, normal(n, 5, seed=n)) for n in (1, 4, 7)]
    stacked = StackedJacobian(batches)
    matrix = stacked.dense()
    stream, shot = LowRankConstraint(columns, 40), LowRankConstraint(columns, 40)
    for batch in batches:
        stream.update(batch)
    shot.update(stacked)
    full = JacobianConstraint(stacked, columns)
    expected = matrix.T @ matrix
    for constraint in (stream, shot):
        assert float((form(constraint) - expected).norm() / expected.norm()) < 1e-13
        assert_orthonormal(constraint.basis)
        assert constraint.dropped < 1e-14 * float(expected.trace())
        assert constraint.project(normal(len(matrix.T))).rank == full.project(normal(len(matrix.T))).rank == 24
    displacement = normal(len(matrix.T))
    for filter in (Hard(), Tikhonov(0.3)):
        results = [c.project(displacement, filter).displacement for c in (stream, shot, full)]
        torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(results[0], results[2], rtol=1e-9, atol=1e-9)


def test_nothing_is_squared():
    """Eight digits of every singular value survive a stream; a Gram matrix would leave four of the smallest."""
    left, right = torch.linalg.qr(normal(8, 8))[0], torch.linalg.qr(normal(20, 8, seed=1))[0]
    singular = torch.logspace(0, -6, 8).double()
    matrix = left * singular @ right.T
    constraint = empty(width=20)
    for rows in matrix.split(2):
        constraint.update(matrix_jacobian(rows))
    torch.testing.assert_close(constraint.values.sqrt(), singular, rtol=1e-8, atol=0)


def test_a_chunk_at_a_time():
    """A batch with more rows than max_rank is folded in pieces and never held whole."""
    matrix = normal(30, 4) @ normal(4, WIDTH, seed=1)
    constraint = empty(max_rank=6)
    constraint.update(matrix_jacobian(matrix))
    assert constraint.basis.shape == (WIDTH, 4)
    torch.testing.assert_close(form(constraint), matrix.T @ matrix)


def test_rounding_of_single_precision_factors_is_not_rank():
    matrix = (normal(12, 5) @ normal(5, WIDTH, seed=1)).float()
    constraint = empty()
    constraint.update(matrix_jacobian(matrix))
    assert constraint.basis.shape[1] == 5


def test_memory_is_bounded_and_the_dropped_trace_exact():
    constraint = empty(max_rank=5)
    total = torch.zeros(WIDTH, WIDTH).double()
    for seed in range(4):
        matrix = normal(3, WIDTH, seed=seed)
        constraint.update(matrix_jacobian(matrix))
        total += matrix.T @ matrix
        assert constraint.basis.shape[1] <= 5
        assert constraint.nbytes() <= 8 * 5 * (WIDTH + 1)
    assert float(constraint.values.sum()) + constraint.dropped == pytest.approx(float(total.trace()), rel=1e-12)
    missing = torch.linalg.eigvalsh(total - form(constraint))
    assert float(missing.min()) > -1e-12 and float(missing.max()) <= constraint.dropped


def test_strongest_directions_are_kept():
    """Dropping after every batch still finds the leading subspace when the rest is small."""
    strong = normal(3, WIDTH, seed=9)
    constraint = empty(max_rank=6)
    for seed in range(10):
        constraint.update(matrix_jacobian(torch.cat([strong, 1e-3 * normal(4, WIDTH, seed=seed)])))
    expected = torch.linalg.svd(strong, full_matrices=False)[2]
    left = constraint.project(expected.sum(0), Hard(rank=3)).displacement
    assert float(left.norm()) < 1e-4


operations = st.lists(
    st.tuples(st.sampled_from(["update", "repeat", "energy", "rank", "all"]), st.integers(1, 4), st.integers(-4, 4)),
    min_size=1,
    max_size=12,
)


@given(operations=operations, max_rank=st.integers(1, 12))
def test_the_protected_core_never_shrinks(operations, max_rank):
    constraint, exact, seen = empty(max_rank), torch.zeros(WIDTH, WIDTH).double(), [normal(2, WIDTH)]
    displacement = normal(WIDTH, seed=99)
    for step, (operation, size, decade) in enumerate(operations):
        core = constraint.basis[:, : constraint.protected_rank].clone()
        if operation in ("update", "repeat"):
            rows = seen[-1] if operation == "repeat" else 10.0**decade * normal(size, WIDTH, seed=step)
            seen.append(rows)
            constraint.update(matrix_jacobian(rows))
            exact += rows.T @ rows
        else:
            filter = {"energy": Hard(energy=0.2 * size), "rank": Hard(rank=size), "all": Hard()}[operation]
            before = constraint.protected_rank
            assert constraint.consolidate(filter) == constraint.protected_rank - before >= 0
        assert torch.equal(constraint.basis[:, : core.shape[1]], core)  # verbatim, not only its span
        assert constraint.basis.shape[1] <= max_rank
        torch.testing.assert_close(
            constraint.basis.T @ constraint.basis, torch.eye(constraint.basis.shape[1]).double(), rtol=0, atol=1e-10
        )
        if constraint.basis.shape[1]:
            for weak in (Tikhonov(1e12), Hard(rank=0)):
                left = constraint.project(displacement, weak).displacement
                assert float((core.T @ left).norm()) < 1e-10 * float(displacement.norm())
    trace = float(constraint._values.sum()) + constraint.dropped
    assert trace == pytest.approx(float(exact.trace()), rel=1e-9)
    # on the complement of the core nothing but the dropped trace is missing
    core = constraint.basis[:, : constraint.protected_rank]
    beyond = torch.eye(WIDTH).double() - core @ core.T
    scale = float(exact.norm())
    missing = torch.linalg.eigvalsh(beyond @ (exact - form_of(constraint)) @ beyond)
    assert float(missing.min()) >= -1e-10 * scale
    assert float(missing.max()) <= constraint.dropped + 1e-10 * scale


def form_of(constraint: LowRankConstraint) -> Tensor:
    return constraint.basis * constraint._values @ constraint.basis.T


def test_without_consolidation_a_louder_task_takes_the_place():
    """What the core is for: a direction that was not consolidated is dropped when memory is short."""
    old, new = normal(2, WIDTH), 100.0 * normal(4, WIDTH, seed=1)
    for consolidated in (False, True):
        constraint = empty(max_rank=4)
        constraint.update(matrix_jacobian(old))
        if consolidated:
            assert constraint.consolidate() == 2
        constraint.update(matrix_jacobian(new))
        left = constraint.project(normal(WIDTH, seed=2)).displacement
        assert (float((old @ left).norm()) < 1e-12) is consolidated


def test_a_repeated_task_adds_nothing():
    constraint, rows = empty(), normal(3, WIDTH)
    constraint.update(matrix_jacobian(rows))
    assert constraint.consolidate() == 3
    for _ in range(5):
        constraint.update(matrix_jacobian(rows))
        assert constraint.consolidate() == 0
    assert constraint.protected_rank == constraint.basis.shape[1] == 3
    assert float(constraint.values.sum()) == pytest.approx(6 * float(rows.square().sum()))


def test_nscl_rule_sets_free_what_it_protected():
    """The same growing sequence: the core grows, Adam-NSCL's multiple of the smallest eigenvalue shrinks."""
    constraint, exact = empty(), torch.zeros(WIDTH, WIDTH).double()
    protected, nscl = [], []
    for seed in range(6):
        rows = normal(4, WIDTH, seed=seed)
        exact += rows.T @ rows
        constraint.update(matrix_jacobian(rows))
        constraint.consolidate()
        protected.append(constraint.protected_rank)
        nscl.append(int(SmallestMultiple(30.0).removed(torch.linalg.eigvalsh(exact)).sum()))
    assert protected == [4, 8, 12, 15, 15, 15]
    assert max(nscl) > nscl[-1] + 4 and nscl[-1] < 8


@pytest.mark.parametrize("consolidated", [(), (0,), (1,), (0, 1)])
def test_merge(consolidated):
    shared = normal(2, WIDTH, seed=7)
    rows = [torch.cat([shared, normal(3, WIDTH, seed=seed)]) for seed in (0, 1)]
    parts = []
    for index, matrix in enumerate(rows):
        part = empty()
        part.update(matrix_jacobian(matrix))
        if index in consolidated:
            part.consolidate(Hard(rank=3))
        parts.append(part)
    merged = parts[0].merged(parts[1])
    exact = sum(matrix.T @ matrix for matrix in rows)
    assert_orthonormal(merged.basis)
    assert merged.basis.shape[1] == 8 and merged.protected_rank == 3 * len(consolidated)
    assert float(merged.values.sum()) == pytest.approx(float(exact.trace()))
    core = merged.basis[:, : merged.protected_rank]
    for part in parts:
        before = part.basis[:, : part.protected_rank]
        torch.testing.assert_close(core @ (core.T @ before), before, rtol=0, atol=1e-12)
    beyond = torch.eye(WIDTH).double() - core @ core.T
    torch.testing.assert_close(beyond @ form(merged) @ beyond, beyond @ exact @ beyond)
    left = merged.project(normal(WIDTH)).displacement
    assert float((torch.cat(rows) @ left).norm()) < 1e-12


def test_merge_of_one_core_with_itself():
    part = empty()
    part.update(matrix_jacobian(normal(3, WIDTH)))
    part.consolidate()
    assert part.merged(part).protected_rank == 3
    torch.testing.assert_close(form(part.merged(part)), 2 * form(part))


def test_merge_never_drops_a_core():
    parts = []
    for seed in (0, 1):
        part = empty(max_rank=4)
        part.update(matrix_jacobian(normal(3, WIDTH, seed=seed)))
        part.consolidate()
        parts.append(part)
    with pytest.raises(ValueError, match="max_rank"):
        parts[0].merged(parts[1])
    with pytest.raises(ValueError, match="same parameters"):
        parts[0].merged(empty(width=3))


def test_reset():
    constraint = empty()
    constraint.update(matrix_jacobian(normal(3, WIDTH)))
    constraint.consolidate()
    constraint.reset()
    assert constraint.protected_rank == 0 and constraint.nbytes() == 0 and constraint.dropped == 0.0
    with pytest.raises(ValueError, match="update"):
        constraint.project(normal(WIDTH))
    with pytest.raises(ValueError, match="max_rank"):
        empty(max_rank=0)
