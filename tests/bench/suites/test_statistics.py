import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from nsrl.bench.suites.statistics import bootstrap, interquartile_mean, mean, paired_difference, summarise
from nsrl.errors import NsrlError

finite = st.floats(-1e6, 1e6)


@given(arrays(np.float64, st.integers(1, 40), elements=finite))
def test_the_interquartile_mean_is_scipys_trimmed_mean(scores):
    assert interquartile_mean(scores) == pytest.approx(stats.trim_mean(scores, 0.25), rel=1e-9, abs=1e-6)


@given(arrays(np.float64, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=finite), st.sampled_from([0, 1]))
def test_along_an_axis_it_is_that_of_each_row(scores, axis):
    np.testing.assert_allclose(
        interquartile_mean(scores, axis=axis), stats.trim_mean(scores, 0.25, axis=axis), rtol=1e-9, atol=1e-6
    )


@pytest.mark.parametrize("statistic", [mean, interquartile_mean])
def test_the_interval_is_scipys_percentile_bootstrap(statistic):
    scores = np.random.default_rng(0).normal(10.0, 3.0, size=15)
    ours = bootstrap(scores, statistic, resamples=20_000)
    theirs = stats.bootstrap(
        (scores,), statistic, method="percentile", n_resamples=20_000, vectorized=True, rng=np.random.default_rng(1)
    ).confidence_interval
    # two independent bootstraps of 20 000 samples differ by about 0.5 % of the interval's width
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.03 * width)
    assert ours.estimate == statistic(scores)


def test_runs_are_drawn_within_each_task():
    # tasks of very different scales: drawing across tasks would give a wide interval, within them there is none
    scores = np.tile([0.0, 100.0, 1000.0], (7, 1))
    found = bootstrap(scores)
    assert found.low == found.high == found.estimate == pytest.approx(scores.mean())


def test_the_interval_covers_the_truth_as_often_as_it_says():
    draws = np.random.default_rng(3).normal(size=(300, 30))
    found = [bootstrap(row, resamples=500) for row in draws]
    covered = np.mean([interval.low <= 0.0 <= interval.high for interval in found])
    assert 0.90 <= covered <= 0.98


def test_large_scores_are_resampled_in_pieces_to_the_same_kind_of_answer(monkeypatch):
    scores = np.random.default_rng(0).normal(size=20)
    whole = bootstrap(scores, resamples=4000)
    monkeypatch.setattr("nsrl.bench.suites.statistics.CHUNK", 100)
    pieces = bootstrap(scores, resamples=4000)
    assert pieces.low == pytest.approx(whole.low, abs=0.03)
    assert pieces.high == pytest.approx(whole.high, abs=0.03)


def test_pairing_sees_a_difference_that_the_spread_between_runs_hides():
    runs = np.random.default_rng(0).normal(0.0, 50.0, size=10)
    gain = paired_difference(runs + 1.0, runs)
    assert gain.low == pytest.approx(1.0) and gain.high == pytest.approx(1.0)
    assert bootstrap(runs).high - bootstrap(runs).low > 20.0


def test_a_summary_is_plain_json():
    summary = summarise([1.0, 2.0, 3.0, 100.0], resamples=500)
    assert summary["mean"] == 26.5 and summary["iqm"] == 2.5
    assert summary["min"] == 1.0 and summary["max"] == 100.0 and summary["runs"] == 4
    assert {type(value) for value in summary.values()} == {int, float}


@pytest.mark.parametrize("scores", [[], [1.0, float("nan")], [[[1.0]]]])
def test_what_cannot_be_resampled_is_refused(scores):
    with pytest.raises(NsrlError, match="cannot be resampled"):
        bootstrap(scores)


def test_unpaired_scores_are_refused():
    with pytest.raises(NsrlError, match=r"\(2,\) and \(3,\)"):
        paired_difference([1, 2], [1, 2, 3])
