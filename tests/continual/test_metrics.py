"""Metrics of an accuracy matrix, against the papers' formulas worked by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nsrl.continual.metrics import forgetting, sequence_metrics
from nsrl.errors import NsrlError

MATRIX = [[0.9, 0.3, 0.2], [0.7, 0.8, 0.4], [0.8, 0.6, 1.0]]


def test_by_hand():
    found = sequence_metrics(MATRIX, untrained=[0.1, 0.1, 0.2])
    assert found.acc == pytest.approx(0.8)
    assert found.bwt == pytest.approx(((0.8 - 0.9) + (0.6 - 0.8)) / 2)
    assert found.fwt == pytest.approx(((0.3 - 0.1) + (0.4 - 0.2)) / 2)
    assert found.forgetting == pytest.approx(((0.9 - 0.8) + (0.8 - 0.6)) / 2)
    assert found.learning == pytest.approx(0.9)


def test_forgetting_counts_from_the_best_since_learnt():
    matrix = [[0.5, 0.99, 0.0], [0.9, 0.6, 0.0], [0.7, 0.6, 1.0]]
    assert forgetting(matrix) == pytest.approx((0.2 + 0.0) / 2)


def test_one_task_leaves_transfer_undefined():
    found = sequence_metrics([[0.7]])
    assert (found.acc, found.learning) == (0.7, 0.7)
    assert math.isnan(found.bwt) and math.isnan(found.fwt) and math.isnan(found.forgetting)


def test_upper_triangle_is_needed_by_forward_transfer_only():
    matrix = np.where(np.tri(3, dtype=bool), MATRIX, np.nan)
    assert sequence_metrics(matrix).acc == pytest.approx(0.8)
    with pytest.raises(NsrlError, match="before it is learnt"):
        sequence_metrics(matrix, [0.0, 0.0, 0.0])


@given(arrays(np.float64, (4, 4), elements=st.floats(0.0, 1.0)))
def test_forgetting_is_at_least_minus_backward_transfer(matrix):
    found = sequence_metrics(matrix)
    assert found.forgetting >= -found.bwt - 1e-12
    assert found.acc == pytest.approx(found.learning + found.bwt * 3 / 4)


@pytest.mark.parametrize("matrix", [[[1.0, 0.0]], [], [[1.0, 0.0], [math.nan, 1.0]]])
def test_refuses_what_is_no_accuracy_matrix(matrix):
    with pytest.raises(NsrlError, match="accuracy matrix"):
        sequence_metrics(matrix)
