"""Ranks, statistics of ranks, and confidence intervals of a mean over test samples."""

import numpy as np
from numpy.typing import NDArray

_DRAWS = 2000
# Most draws of test samples that are held at once.
_DRAWN_AT_ONCE = 2**20


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


def median_interval(per_test: NDArray[np.floating]) -> tuple[float, float]:
    """Return bounds that hold 95 % of the medians of resampled test samples.

    The draws are those of `bootstrap_interval`.

    Args:
        per_test: values, shape (test,). Values without a bound are infinite.
    """
    draws = np.random.default_rng(0).integers(0, len(per_test), (_DRAWS, len(per_test)))
    medians = np.sort(np.median(per_test[draws], axis=1))
    # Bounds are medians of draws: between two of them, one infinite, there is no number.
    return float(medians[round(0.025 * _DRAWS)]), float(medians[round(0.975 * _DRAWS) - 1])


def crossed_intervals(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return bounds that hold 95 % of the means over resampled seeds and resampled test samples.

    As many seeds and as many test samples are each drawn with replacement. The draws are always the
    same, and the same for each series.

    Args:
        values: one value for each series, seed and test sample, shape (series, seed, test).

    Returns:
        Lower and upper bounds, shape (series, 2).
    """
    n_series, n_seeds, n_tests = values.shape
    rng = np.random.default_rng(0)
    flat = values.reshape(n_series * n_seeds, n_tests).T.astype(np.float64)
    height = max(1, _DRAWN_AT_ONCE // n_tests)
    means = []
    for first in range(0, _DRAWS, height):
        n = min(height, _DRAWS - first)
        seeds, tests = (_counts(rng, n, size) for size in (n_seeds, n_tests))
        by_seed = (tests @ flat).reshape(n, n_series, n_seeds)
        means.append(np.einsum("dls,ds->dl", by_seed, seeds) / (n_seeds * n_tests))
    bounds: NDArray[np.float64] = np.quantile(np.concatenate(means), (0.025, 0.975), axis=0).T
    return bounds


def _counts(rng: np.random.Generator, n: int, size: int) -> NDArray[np.float64]:
    """Return how often each of `size` things is drawn, in `n` draws of as many. Shape (n, size)."""
    drawn = rng.integers(0, size, (n, size)) + size * np.arange(n)[:, None]
    return np.bincount(drawn.ravel(), minlength=n * size).reshape(n, size).astype(np.float64)
