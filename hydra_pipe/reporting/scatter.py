"""A map of the training samples: the two directions in which their features differ most."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.labels.dynamics import Dynamics, TopLogits
from hydra_pipe.types import F64, I64

# Most points of a map, and most of them that look wrong.
MOST_POINTS, MOST_DOUBTED = 2000, 1000
# Last visits whose features are averaged.
_LAST_VISITS = 3
# Share of the points at each end of an axis that are moved to its border.
_OUTLYING = 0.01


@dataclass(frozen=True)
class Scatter:
    """Points of a map.

    Args:
        rows: samples, as places among the judged ones, shape (point,).
        places: places of the points, each from 0 to 1, shape (point, 2).
        explained: share of the variance of the features that the map shows.
        space: the features, in words.
    """

    rows: I64
    places: F64
    explained: float
    space: str


def scatter(dynamics: Dynamics, doubted: NDArray[np.bool_]) -> Scatter | None:
    """Return a map of the samples, or None if no features of them are known.

    Features are the inputs of the last layer, or else the logits, averaged over the last visits
    of a sample. The map is their first two principal components.

    Args:
        dynamics: visits of all samples.
        doubted: mask of the samples whose label looks wrong, shape (sample,). All of them are
            on the map, or `MOST_DOUBTED` of them. Others are drawn at random, always the same.
    """
    features = dynamics.inputs
    space = "inputs of the last layer"
    if features is None:
        if isinstance(dynamics.logits, TopLogits):
            return None
        features, space = dynamics.logits, "logits"
    means = _last_means(features)
    known = np.flatnonzero(np.isfinite(means).all(axis=1))
    if len(known) < 3:
        return None
    places, explained = principal_components(means[known])
    generator = np.random.default_rng(0)
    rows = np.concatenate(
        [
            _drawn(generator, np.flatnonzero(doubted[known]), MOST_DOUBTED),
            _drawn(generator, np.flatnonzero(~doubted[known]), MOST_POINTS),
        ]
    )[:MOST_POINTS]
    low, high = np.quantile(places, [_OUTLYING, 1 - _OUTLYING], axis=0)
    span = np.where(high > low, high - low, 1.0)
    return Scatter(known[rows], np.clip((places[rows] - low) / span, 0, 1), explained, space)


def principal_components(points: F64) -> tuple[F64, float]:
    """Return the first two principal components, and the share of the variance that they have.

    Args:
        points: shape (point, feature).

    Returns:
        Shape (point, 2). The second is 0 if there is one feature.
    """
    centred = points - points.mean(axis=0)
    _, variances, directions = np.linalg.svd(centred.T @ centred)
    first = directions[:2]
    # The sign of a direction is arbitrary: its largest part is positive.
    largest = np.take_along_axis(first, np.abs(first).argmax(axis=1)[:, None], axis=1)
    found = np.zeros((len(points), 2))
    found[:, : len(first)] = centred @ (first * np.where(largest < 0, -1, 1)).T
    total = float(variances.sum())
    return found, float(variances[:2].sum()) / total if total > 0 else 1.0


def _last_means(features: NDArray[np.floating]) -> F64:
    """Return the mean over each sample's last visits. Not a number without one.

    Args:
        features: shape (visit, sample, feature).
    """
    total, count = np.zeros(features.shape[1:]), np.zeros(features.shape[1])
    for visit in features[::-1]:
        there = np.isfinite(visit).all(axis=1) & (count < _LAST_VISITS)
        total[there] += visit[there].astype(np.float64)
        count += there
    found: F64 = np.divide(
        total, count[:, None], out=np.full(total.shape, np.nan), where=count[:, None] > 0
    )
    return found


def _drawn(generator: np.random.Generator, rows: I64, most: int) -> I64:
    if len(rows) <= most:
        return generator.permutation(rows)
    return generator.choice(rows, most, replace=False)
