"""Ranks, what is computed from them, and how sure a mean over test samples is."""

import numpy as np
from numpy.typing import NDArray

_DRAWS = 2000


def average_ranks(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Ranks from 1, of equal values their mean. Shape (n,)."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    counts = np.diff(np.r_[starts, len(values)])
    ranks = np.empty(len(values))
    ranks[order] = np.repeat(starts + (counts + 1) / 2, counts)
    return ranks


def spearmans(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float64]:
    """Spearman's rank correlation of each column of `a` with that of `b`; 0 where one of them is constant, and so orders nothing.

    Args:
        a, b: shape (n, column).

    Returns:
        Shape (column,).
    """
    of_a, of_b = (np.stack([average_ranks(column) for column in m.T], axis=1) for m in (a, b))
    of_a -= of_a.mean(axis=0)
    of_b -= of_b.mean(axis=0)
    norms = np.linalg.norm(of_a, axis=0) * np.linalg.norm(of_b, axis=0)
    return np.asarray((of_a * of_b).sum(axis=0) / np.where(norms > 0, norms, 1.0))


def roc_auc(scores: NDArray[np.floating], positive: NDArray[np.bool_]) -> float:
    """Chance that a positive one scores above a negative one, ties counting half: the area under the ROC curve.

    Args:
        scores: shape (n,).
        positive: shape (n,); there must be some of either kind.
    """
    n = int(positive.sum())
    above = average_ranks(scores)[positive].sum() - n * (n + 1) / 2
    return float(above / (n * (len(positive) - n)))


def bootstrap_interval(per_test: NDArray[np.floating]) -> tuple[float, float]:
    """Bounds that hold 95 % of the means of as many test samples, drawn anew with replacement; always the same draws."""
    draws = np.random.default_rng(0).integers(0, len(per_test), (_DRAWS, len(per_test)))
    low, high = np.quantile(per_test[draws].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def crossed_interval(values: NDArray[np.floating]) -> tuple[float, float]:
    """Bounds that hold 95 % of the means over as many seeds and as many test samples, each drawn anew with replacement; always the
    same draws.

    Args:
        values: shape (seed, test).
    """
    n_seeds, n_tests = values.shape
    rng = np.random.default_rng(0)
    means = [
        values[rng.integers(0, n_seeds, n_seeds)].mean(axis=0)[rng.integers(0, n_tests, n_tests)].mean() for _ in range(_DRAWS)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
