"""Rank correlations against SciPy, and against what is known to be confounded."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from nsrl.analysis import rank_agreement
from nsrl.errors import NsrlError

RANDOM = np.random.default_rng(0)


def test_over_all_runs_it_is_scipys():
    x, y = RANDOM.standard_normal(30).round(1), RANDOM.standard_normal(30).round(1)  # with ties
    found = rank_agreement(x, y, ["a"] * 30, [f"{i}" for i in range(30)])
    assert found.spearman == pytest.approx(spearmanr(x, y).statistic)
    assert found.partial == pytest.approx(found.spearman)  # one group is all


def test_the_partial_correlation_is_that_within_groups_of_one_size():
    """For groups of equal size and without ties, pooling means averaging."""
    x, y = RANDOM.standard_normal(24), RANDOM.standard_normal(24)
    groups = [f"{i % 3}" for i in range(24)]
    found = rank_agreement(x, y, groups, groups)
    assert found.partial == pytest.approx(np.mean([spearmanr(x[k::3], y[k::3]).statistic for k in range(3)]))


def test_what_the_settings_explain_is_not_in_the_partial_correlation():
    settings = np.repeat([0.0, 10.0, 20.0], 40)
    x, y = settings + RANDOM.standard_normal(120), settings + RANDOM.standard_normal(120)
    found = rank_agreement(x, y, [f"{s}" for s in settings], [f"{i % 20}" for i in range(120)])
    assert found.spearman > 0.85 > 0.25 > abs(found.partial)
    low, high = found.partial_interval
    assert low < 0.0 < high and low < found.partial < high
    alone = rank_agreement(settings, y, [f"{s}" for s in settings], [f"{i % 20}" for i in range(120)])
    assert alone.spearman > 0.85 and alone.partial is None and alone.partial_interval is None


def test_the_interval_covers_and_narrows():
    """Correlated normals, every run its own cluster; against the large-sample width 2 x 1.96 (1 - r^2) / n^(1/2)."""
    widths = []
    for count in (30, 300):
        x = RANDOM.standard_normal(count)
        y = x + RANDOM.standard_normal(count)
        found = rank_agreement(x, y, ["a"] * count, [f"{i}" for i in range(count)])
        low, high = found.spearman_interval
        assert low < found.spearman < high
        widths.append(high - low)
    assert widths[0] > 2 * widths[1] and widths[1] == pytest.approx(3.92 * 0.53 / 300**0.5, rel=0.3)


def test_runs_of_one_task_are_no_independent_witnesses():
    """Each of six tasks repeated twenty times: the interval is as wide as six runs make it."""
    x, y = np.repeat(np.arange(6.0), 20), np.repeat([1.0, 0.0, 2.0, 4.0, 3.0, 5.0], 20)
    x, y = x + 1e-3 * RANDOM.standard_normal(120), y + 1e-3 * RANDOM.standard_normal(120)
    tasks = [f"{i // 20}" for i in range(120)]
    clustered = rank_agreement(x, y, ["a"] * 120, tasks).spearman_interval
    naive = rank_agreement(x, y, ["a"] * 120, [f"{i}" for i in range(120)]).spearman_interval
    assert clustered[1] - clustered[0] > 3 * (naive[1] - naive[0])


def test_too_few_clusters_have_no_interval_and_bad_input_is_told():
    found = rank_agreement([1.0, 2.0, 3.0], [1.0, 2.0, 4.0], ["a"] * 3, ["x", "x", "y"])
    assert found.spearman == pytest.approx(1.0) and found.spearman_interval is None
    assert rank_agreement([1.0, 1.0], [1.0, 2.0], ["a"] * 2, ["x"] * 2).spearman is None
    with pytest.raises(NsrlError, match="equal lengths"):
        rank_agreement([1.0], [1.0, 2.0], ["a"] * 2, ["x"] * 2)
    with pytest.raises(NsrlError, match="finite"):
        rank_agreement([1.0, float("nan")], [1.0, 2.0], ["a"] * 2, ["x"] * 2)
