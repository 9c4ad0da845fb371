"""Distance of a value from the bulk of its group, and the end of the bulk."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Standard deviation of a normal distribution over its median absolute deviation, and over its
# mean absolute deviation.
_OF_MEDIAN, _OF_MEAN = 1.4826, 1.2533
# Size of the windows in which the start of a tail is looked for: share of all values, and least
# number of values.
_WINDOW_SHARE, _LEAST_WINDOW = 0.01, 10
# Largest share of values of such a window that may belong to the bulk.
MOST_FALSE = 0.5
# A group of fewer values has a median that says little. Then the median of all values is taken.
FEWEST = 20


def robust_scores(
    values: NDArray[np.float64], groups: NDArray[Any] | None = None
) -> NDArray[np.float64]:
    """Return each value's distance from the median of its group, in robust standard deviations.

    A robust standard deviation is 1.4826 median absolute deviations. If more than half of a group
    are equal, its mean absolute deviation is taken. If all are equal, up to rounding, all scores
    are 0.

    Args:
        values: values to score, shape (n,), finite.
        groups: group of each value, shape (n,). A group of fewer than `FEWEST` values is compared
            with all values. None: one group.

    Returns:
        Shape (n,). A score below the median is negative.
    """
    scores = _scores(values, values)
    if groups is not None:
        names, members = np.unique(groups, return_inverse=True)
        for group in range(len(names)):
            own = np.flatnonzero(members == group)
            if len(own) >= FEWEST:
                scores[own] = _scores(values[own], values[own])
    return scores


def _scores(values: NDArray[np.float64], bulk: NDArray[np.float64]) -> NDArray[np.float64]:
    median = np.median(bulk)
    apart = np.abs(bulk - median)
    scale = _OF_MEDIAN * np.median(apart) or _OF_MEAN * apart.mean()
    if scale <= np.finfo(np.float64).eps * np.abs(bulk).max():
        return np.zeros(len(values))
    found: NDArray[np.float64] = (values - median) / scale
    return found


def tail_threshold(scores: NDArray[np.float64]) -> float:
    """Return the end of the part of the lower tail that the upper tail does not account for.

    The threshold is a local false discovery rate (Efron, "Large-Scale Inference", 2010). The upper
    half is mirrored at 0. It stands for the lower half without anything odd.

    Windows of 1 % of the values are taken from the lowest on, as long as the mirrored values in a
    window are at most `MOST_FALSE` of its values. The first window also counts the mirrored values
    below it.

    Args:
        scores: scores, shape (n,), finite, with their median at 0.

    Returns:
        Values below it belong to the tail. Minus infinity if there is no tail.
    """
    ordered, mirrored = np.sort(scores), np.sort(-scores)
    width = max(_LEAST_WINDOW, round(_WINDOW_SHARE * len(scores)))
    taken = below = 0
    for end in range(width, len(scores), width):
        bulk = int(np.searchsorted(mirrored, ordered[end]))
        if ordered[end] >= 0 or bulk - below > MOST_FALSE * width:
            break
        taken, below = end, bulk
    return float(ordered[taken]) if taken else -np.inf
