"""Three opinions on the label of each sample, as chances of the classes.

- P, predictions: what the network itself predicted at the visits.
- R, ridge: what a linear fit on the last layer's inputs predicts from all other samples. Inputs of
  several epochs stand side by side.
- V, votes: the labels of the nearest samples in the last layer's inputs.

R and V do not see the sample's own label. Without inputs of the last layer, they take the logits.
"""

from collections.abc import Sequence

import numpy as np

from hydra_pipe.labels.dynamics import Dynamics, TopLogits, visited
from hydra_pipe.types import F32, F64, I64

NEIGHBOURS = 30
PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10000.0)
# Samples that vote, at most. Drawn ones do as well as all: 2,000 of 3,000 to 8,000 samples cost
# 0.001 of the area under the ROC curve. An index of neighbours would be one more dependency.
MOST_VOTERS = 10_000
# Least chance of a class.
_FLOOR = 1e-4
# Similarities that are held at once.
_BLOCK = 1 << 22


def normalised(chances: F64) -> F64:
    """Return chances of at least 1e-4 that sum to 1 in each row."""
    clipped = np.maximum(chances, _FLOOR)
    found: F64 = clipped / clipped.sum(axis=1, keepdims=True)
    return found


def predictions(dynamics: Dynamics, weights: F64) -> F64:
    """Return the network's own predictions, averaged over weighted epochs.

    Args:
        dynamics: visits.
        weights: weight of each epoch, shape (epoch,).

    Returns:
        Shape (sample, class). Rows of samples that were never visited are even.
    """
    total = np.zeros((len(dynamics.labels), dynamics.n_classes))
    plain, weight = np.zeros_like(total), np.zeros(len(total))
    for epoch, w in enumerate(weights):
        p = np.exp(dynamics.centred(epoch))
        p[~visited(p)] = 0.0
        weight += w * p.any(axis=1)
        total += w * p
        plain += p
    return normalised(np.where(weight[:, None] > 0, _rows(total), _rows(plain)))


def _rows(values: F64) -> F64:
    """Rows divided by their sums; even rows if there is nothing."""
    sums = values.sum(axis=1, keepdims=True)
    even = np.full(values.shape, 1 / values.shape[1])
    found: F64 = np.divide(values, sums, out=even, where=sums > 0)
    return found


def ridge(inputs: F32, labels: I64, n_classes: int) -> F64:
    """Return leave-one-out predictions of a ridge regression of the labels on the inputs.

    Inputs are standardised, and a constant is added that is not penalised less than they are. With
    H the matrix that maps labels to predictions, leaving sample i out predicts

        (yhat_i - H_ii y_i) / (1 - H_ii)

    The penalty is the one of `PENALTIES` with the least squared leave-one-out error.

    Args:
        inputs: shape (sample, feature), finite.
        labels: shape (sample,).
        n_classes: number of classes.

    Returns:
        Shape (sample, class), unclipped.
    """
    x = _standardised(inputs)
    y = np.eye(n_classes)[labels]
    values, vectors = np.linalg.eigh(x.T @ x)
    turned = x @ vectors
    products = turned.T @ y
    best, least = np.empty(0), np.inf
    for penalty in PENALTIES:
        inverse = 1 / (np.maximum(values, 0) + penalty)
        own = np.minimum((turned**2) @ inverse, 1 - 1e-6)
        fitted = turned @ (inverse[:, None] * products)
        left_out = (fitted - own[:, None] * y) / (1 - own[:, None])
        error = float(((left_out - y) ** 2).sum())
        if error < least:
            best, least = left_out, error
    return best


def _standardised(inputs: F32) -> F64:
    x = inputs.astype(np.float64)
    deviation = x.std(axis=0)
    x = (x - x.mean(axis=0)) / np.where(deviation > 1e-6 * np.abs(x).max(), deviation, np.inf)
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)


def votes(inputs: F32, labels: I64, n_classes: int, voters: I64) -> F64:
    """Return the labels of the nearest voters by cosine, weighted by the cosine.

    A sample does not vote on itself.

    Args:
        inputs: shape (sample, feature), finite.
        labels: shape (sample,).
        n_classes: number of classes.
        voters: samples that vote, sorted, shape (voter,).

    Returns:
        Shape (sample, class), rows sum to 1.
    """
    norms = np.linalg.norm(inputs, axis=1, keepdims=True)
    unit = inputs / np.where(norms > 0, norms, 1)
    n, k = len(unit), min(NEIGHBOURS, len(voters) - 1)
    ballots = labels[voters]
    place = np.full(n, -1)
    place[voters] = np.arange(len(voters))
    found = np.zeros((n, n_classes))
    if k < 1:
        return _rows(found)
    height = max(1, _BLOCK // len(voters))
    for start in range(0, n, height):
        rows = np.arange(start, min(start + height, n))
        similar = unit[rows] @ unit[voters].T
        own = place[rows]
        similar[np.flatnonzero(own >= 0), own[own >= 0]] = -np.inf
        nearest = np.argpartition(similar, -k, axis=1)[:, -k:]
        weight = np.maximum(np.take_along_axis(similar, nearest, axis=1), 0).astype(np.float64)
        flat = (np.arange(len(rows))[:, None] * n_classes + ballots[nearest]).ravel()
        counts = np.bincount(flat, weight.ravel(), len(rows) * n_classes)
        found[rows] = counts.reshape(len(rows), n_classes)
    return _rows(found)


def chosen_voters(n: int) -> I64:
    """Return the samples that vote among `n`, sorted. The draw is always the same."""
    if n <= MOST_VOTERS:
        return np.arange(n)
    return np.sort(np.random.default_rng(0).choice(n, MOST_VOTERS, replace=False))


def heaviest(weights: F64, most: int) -> F64:
    """Return the weights of the heaviest epochs, at most `most`, and 0 for the others."""
    kept = np.argsort(-weights, kind="stable")[:most]
    found = np.zeros(len(weights))
    found[kept] = weights[kept]
    return found


def ridge_side_by_side(dynamics: Dynamics, weights: F64) -> F64:
    """Return R: leave-one-out predictions from the inputs of several epochs side by side.

    An epoch that did not visit a sample says the mean of its inputs about it.

    Args:
        dynamics: visits, with inputs or with all logits.
        weights: weight of each epoch, shape (epoch,). Epochs with a weight are taken.

    Returns:
        Shape (sample, class). Rows of samples without inputs are even.
    """
    stacked = [_inputs(dynamics, epoch) for epoch in np.flatnonzero(weights).tolist()]
    filled = [_filled(inputs) for inputs in stacked]
    known = np.any([np.isfinite(inputs[:, 0]) for inputs in stacked], axis=0)
    found = np.full((len(dynamics.labels), dynamics.n_classes), 1 / dynamics.n_classes)
    if known.sum() > 1:
        joined = np.concatenate(filled, axis=1)[known]
        found[known] = ridge(joined, dynamics.labels[known], dynamics.n_classes)
    return normalised(found)


def _filled(inputs: F32) -> F32:
    """Inputs with the mean in place of those of samples that were not visited."""
    there = np.isfinite(inputs).all(axis=1, keepdims=True)
    count = max(int(there.sum()), 1)
    mean = np.where(there, inputs, 0).sum(axis=0, dtype=np.float64) / count
    return np.where(there, inputs, mean.astype(np.float32))


def votes_over(dynamics: Dynamics, weightings: Sequence[F64]) -> list[F64]:
    """Return V: votes averaged over epochs, for each way to weigh the epochs.

    Args:
        dynamics: visits, with inputs or with all logits.
        weightings: weights of the epochs, each of shape (epoch,). Neighbours are looked for once
            in each epoch that one of them gives a weight.

    Returns:
        For each way, shape (sample, class). Rows of samples without inputs are even.
    """
    n, k = len(dynamics.labels), dynamics.n_classes
    totals = [np.zeros((n, k)) for _ in weightings]
    for epoch in np.flatnonzero(np.any(weightings, axis=0)).tolist():
        inputs = _inputs(dynamics, epoch)
        there = np.flatnonzero(np.isfinite(inputs).all(axis=1))
        own = votes(inputs[there], dynamics.labels[there], k, chosen_voters(len(there)))
        for total, weights in zip(totals, weightings, strict=True):
            total[there] += weights[epoch] * own
    return [normalised(_rows(total)) for total in totals]


def _inputs(dynamics: Dynamics, epoch: int) -> F32:
    """Inputs of one epoch, or else centred logits, shape (sample, feature)."""
    found: F32
    if dynamics.inputs is not None:
        found = dynamics.inputs[epoch].astype(np.float32)
        return found
    assert not isinstance(dynamics.logits, TopLogits)
    found = dynamics.logits[epoch].astype(np.float32)
    found[~np.isfinite(found).all(axis=1)] = np.nan
    found -= found.mean(axis=1, keepdims=True)
    return found
