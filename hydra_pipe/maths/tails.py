"""How far a value lies from the bulk of those that it belongs with, and where the bulk ends."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# of a normal distribution: its standard deviation over its median absolute deviation, and over its mean absolute deviation
_OF_MEDIAN, _OF_MEAN = 1.4826, 1.2533
# of values that are looked at together where a tail begins: their share of all, and how many at least
_WINDOW_SHARE, _LEAST_WINDOW = 0.01, 10
# of the values of such a window, how many may be of the bulk
MOST_FALSE = 0.5
# values of a group, below which its own median says little, and the median of all is taken
FEWEST = 20


def robust_scores(values: NDArray[np.float64], groups: NDArray[Any] | None = None) -> NDArray[np.float64]:
    """Each value's distance from the median of its group, in robust standard deviations: 1.4826 median absolute deviations.

    Where more than half of a group are equal, its mean absolute deviation is taken; where all are, or all but rounding, all are 0.

    Args:
        values: shape (n,), finite.
        groups: what each belongs to, shape (n,); groups of fewer than `FEWEST` are held against all values; None: one group.

    Returns:
        Shape (n,); negative below the median.
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
    """Where the lower tail ends that the upper one does not account for: a local false discovery rate (Efron, "Large-Scale
    Inference", 2010), with the upper half mirrored at 0 as what the lower half would be if it held nothing odd.

    Windows of 1 % of the values are looked at from the lowest on, and taken as long as the mirrored values in them are not more
    than `MOST_FALSE` of theirs. In the first window those count too that are lower still.

    Args:
        scores: shape (n,), finite, with their median at 0.

    Returns:
        Values below it are of the tail; minus infinity where there is none.
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
