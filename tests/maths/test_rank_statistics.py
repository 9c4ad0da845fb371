"""Ranks and what is computed from them, against SciPy and scikit-learn."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from hydra_pipe.maths.rank_statistics import (
    average_ranks,
    bootstrap_interval,
    median_interval,
    roc_auc,
    spearmans,
)


@pytest.mark.parametrize("n_values", [3, 10**6])
def test_ranks_spearman_and_auc_are_those_of_scipy_ties_included(n_values: int) -> None:
    rng = np.random.default_rng(n_values)
    a, b = rng.integers(0, n_values, (2, 40, 5)).astype(float)
    np.testing.assert_array_equal(average_ranks(a[:, 0]), stats.rankdata(a[:, 0]))
    expected = [stats.spearmanr(a[:, j], b[:, j]).statistic for j in range(5)]
    np.testing.assert_allclose(spearmans(a, b), expected, atol=1e-12)
    positive = b[:, 0] > np.median(b[:, 0]) - 0.5
    assert roc_auc(a[:, 1], positive) == pytest.approx(roc_auc_score(positive, a[:, 1]))


def test_a_constant_column_orders_nothing() -> None:
    assert spearmans(np.ones((5, 1)), np.arange(5.0)[:, None]).tolist() == [0.0]


def test_the_interval_holds_the_mean_and_narrows_with_more_tests() -> None:
    values = np.random.default_rng(0).normal(size=1000)
    widths = []
    for n in (10, 1000):
        low, high = bootstrap_interval(values[:n])
        assert low < values[:n].mean() < high
        widths.append(high - low)
    assert widths[1] == pytest.approx(2 * 1.96 / 1000**0.5, rel=0.1)
    assert widths[0] > 5 * widths[1]


def test_the_interval_of_a_median_is_that_of_scipy_and_may_have_no_upper_bound() -> None:
    values = np.random.default_rng(0).normal(size=200)
    expected = stats.bootstrap((values,), np.median, method="percentile", rng=0).confidence_interval
    assert median_interval(values) == pytest.approx(tuple(expected), abs=0.05)
    low, high = median_interval(np.array([1.0, 2.0, 3.0, np.inf, np.inf]))
    assert low < 3.0
    assert high == np.inf
