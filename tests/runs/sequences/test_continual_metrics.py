"""Continual World's metrics against numbers worked out by hand, and their properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import trapezoid

from nsrl.errors import NsrlError
from nsrl.runs.sequences.results import area_under_curve, average_performance, forgetting, forward_transfer, performance

#: After each of three tasks: 0.9 of task 1 falls to 0.5 and 0.2, 0.8 of task 2 rises to 1.0, task 3 ends at 0.6.
MATRIX = [[0.9, 0.0, 0.1], [0.5, 0.8, 0.1], [0.2, 1.0, 0.6]]


def test_three_tasks_by_hand() -> None:
    assert average_performance(MATRIX) == pytest.approx((0.2 + 1.0 + 0.6) / 3)
    np.testing.assert_allclose(forgetting(MATRIX), [0.9 - 0.2, 0.8 - 1.0, 0.0])
    assert float(forgetting(MATRIX).mean()) == pytest.approx(0.5 / 3)


def test_the_area_by_hand() -> None:
    # 0 -> 1 within 10 steps, then 1 for 30: (5 + 30) / 40
    assert area_under_curve([0, 10, 40], [0.0, 1.0, 1.0]) == pytest.approx(0.875)
    # time counted from elsewhere is the same stretch
    assert area_under_curve([100, 110, 140], [0.0, 1.0, 1.0]) == pytest.approx(0.875)


def test_forward_transfer_by_hand() -> None:
    assert forward_transfer(0.875, 0.5) == pytest.approx(0.75)
    assert forward_transfer(0.25, 0.5) == pytest.approx(-0.5)
    assert forward_transfer(0.5, 0.5) == 0.0 and forward_transfer(1.0, 0.3) == 1.0
    assert forward_transfer(1.0, 1.0) is None


def test_returns_become_performances() -> None:
    np.testing.assert_allclose(performance([9.0, 9.5, 254.75, 500.0, 600.0], 9.5, 500.0), [0.0, 0.0, 0.5, 1.0, 1.0])
    np.testing.assert_allclose(performance([-1600.0, -150.0], -1600.0, -150.0), [0.0, 1.0])


@given(
    gaps=st.lists(st.integers(1, 1000), min_size=1, max_size=20),
    start=st.integers(0, 10**6),
    data=st.data(),
)
def test_the_area_is_that_of_scipy_and_lies_between_the_extremes(gaps: list[int], start: int, data: st.DataObject):
    times = [start, *(start + np.cumsum(gaps)).tolist()]
    values = data.draw(st.lists(st.floats(0, 1), min_size=len(times), max_size=len(times)))
    area = area_under_curve(times, values)
    assert area == pytest.approx(trapezoid(values, times) / (times[-1] - times[0]), abs=1e-9)
    assert min(values) - 1e-9 <= area <= max(values) + 1e-9


@pytest.mark.parametrize(
    ("steps", "values"), [([0], [1.0]), ([0, 0], [1.0, 1.0]), ([0, 10, 5], [0.0, 1.0, 1.0]), ([0, 10], [1.0])]
)
def test_a_curve_without_a_stretch_is_refused(steps: list[int], values: list[float]) -> None:
    with pytest.raises(NsrlError, match="at increasing times"):
        area_under_curve(steps, values)


def test_a_matrix_that_is_not_square_is_refused() -> None:
    for matrix in ([[1.0, 0.0]], [1.0, 0.0], [[]]):
        with pytest.raises(NsrlError, match="one row and one column a task"):
            forgetting(matrix)
