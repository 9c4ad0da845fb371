"""Ranks, statistics of ranks, and confidence intervals of a mean over test samples."""

import numpy as np
from numpy.typing import NDArray

_DRAWS = 2000


def average_ranks(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return ranks from 1, shape (n,). Equal values have their mean rank."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    counts = np.diff(np.r_[starts, len(values)])
    ranks = np.empty(len(values))
    ranks[order] = np.repeat(starts + (counts + 1) / 2, counts)
    return ranks


def spearmans(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return Spearman's rank correlation of each column of `a` with the same column of `b`.

    It is 0 if one of the two is constant, because a constant column orders nothing.

    Args:
        a, b: values, shape (n, column).

    Returns:
        Shape (column,).
    """
    of_a, of_b = (np.stack([average_ranks(column) for column in m.T], axis=1) for m in (a, b))
    of_a -= of_a.mean(axis=0)
    of_b -= of_b.mean(axis=0)
    norms = np.linalg.norm(of_a, axis=0) * np.linalg.norm(of_b, axis=0)
    return np.asarray((of_a * of_b).sum(axis=0) / np.where(norms > 0, norms, 1.0))


def roc_auc(scores: NDArray[np.floating], positive: NDArray[np.bool_]) -> float:
    """Return the area under the ROC curve.

    It is the chance that a positive sample scores above a negative one. Ties count half.

    Args:
        scores: score of each sample, shape (n,).
        positive: flag of each sample, shape (n,). There must be some of either kind.
    """
    n = int(positive.sum())
    above = average_ranks(scores)[positive].sum() - n * (n + 1) / 2
    return float(above / (n * (len(positive) - n)))


def bootstrap_interval(per_test: NDArray[np.floating]) -> tuple[float, float]:
    """Return bounds that hold 95 % of the means of resampled test samples.

    As many test samples are drawn with replacement. The draws are always the same.
    """
    draws = np.random.default_rng(0).integers(0, len(per_test), (_DRAWS, len(per_test)))
    low, high = np.quantile(per_test[draws].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def crossed_interval(values: NDArray[np.floating]) -> tuple[float, float]:
    """Return bounds that hold 95 % of the means over resampled seeds and resampled test samples.

    As many seeds and as many test samples are each drawn with replacement. The draws are always the
    same.

    Args:
        values: one value for each seed and test sample, shape (seed, test).
    """
    n_seeds, n_tests = values.shape
    rng = np.random.default_rng(0)
    means = [
        values[rng.integers(0, n_seeds, n_seeds)]
        .mean(axis=0)[rng.integers(0, n_tests, n_tests)]
        .mean()
        for _ in range(_DRAWS)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
