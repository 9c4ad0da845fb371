"""Three opinions on the label of each sample, as chances of the classes.

- P, predictions: what the network itself predicted at the visits.
- R, ridge: what a linear fit on the last layer's inputs predicts from all other samples. Inputs of
  several epochs stand side by side.
- V, votes: the labels of the nearest samples in the last layer's inputs.

R and V do not see the sample's own label. Without inputs of the last layer, they take the logits.
"""

from collections.abc import Sequence

import numpy as np

from hydra_pipe.labels.dynamics import Dynamics, Samples, TopLogits, blocks_of, visited
from hydra_pipe.types import F32, F64, I64

NEIGHBOURS = 30
PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10000.0)
# Samples that vote: so many for each class, within bounds. Drawn ones do as well as all: 2,000 of
# 3,000 to 8,000 samples cost 0.001 of the area under the ROC curve. Of 60,000 made-up samples of
# ten classes 10,000 do as well as all; of a thousand classes 10,000 cost 0.06 and 30,000 cost 0.02.
# An index of neighbours would be one more dependency.
_VOTERS_OF_CLASS, FEWEST_VOTERS, MOST_VOTERS = 100, 10_000, 30_000
# Least chance of a class.
_FLOOR = 1e-4
_ALL = slice(None)
# Similarities that are held at once.
_BLOCK = 1 << 22


def normalised(chances: F64) -> F64:
    """Return chances of at least 1e-4 that sum to 1 in each row."""
    clipped = np.maximum(chances, _FLOOR)
    found: F64 = clipped / clipped.sum(axis=1, keepdims=True)
    return found


def predictions(dynamics: Dynamics, weights: F64, samples: Samples = _ALL) -> F64:
    """Return the network's own predictions, averaged over weighted epochs.

    Args:
        dynamics: visits.
        weights: weight of each epoch, shape (epoch,).
        samples: the samples. Default: all.

    Returns:
        Shape (sample, class). Rows of samples that were never visited are even.
    """
    total = np.zeros((len(dynamics.labels[samples]), dynamics.n_classes))
    plain, weight = np.zeros_like(total), np.zeros(len(total))
    for epoch, w in enumerate(weights):
        p = np.exp(dynamics.centred(epoch, samples))
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


class Ridge:
    """Leave-one-out predictions of a ridge regression of the labels on some inputs.

    Inputs are standardised, and a constant is added that is not penalised less than they are. With
    H the matrix that maps labels to predictions, leaving sample i out predicts

        (yhat_i - H_ii y_i) / (1 - H_ii)

    The penalty is the one of `PENALTIES` with the least squared leave-one-out error.

    Args:
        inputs: shape (sample, feature), finite.
        labels: shape (sample,).
        n_classes: number of classes.
    """

    def __init__(self, inputs: F32, labels: I64, n_classes: int) -> None:
        x = _standardised(inputs)
        self._labels, self._n_classes = labels, n_classes
        values, vectors = np.linalg.eigh(x.T @ x)
        self._turned = x @ vectors
        self._products = np.zeros((len(values), n_classes))
        for samples in blocks_of(len(labels), n_classes):
            self._products += self._turned[samples].T @ self._one_hot(samples)
        errors = np.zeros(len(PENALTIES))
        inverses = [1 / (np.maximum(values, 0) + penalty) for penalty in PENALTIES]
        for samples in blocks_of(len(labels), n_classes):
            y = self._one_hot(samples)
            for number, inverse in enumerate(inverses):
                errors[number] += ((self._left_out(samples, inverse) - y) ** 2).sum()
        self._inverse = inverses[int(errors.argmin())]

    def _one_hot(self, samples: Samples) -> F64:
        labels = self._labels[samples]
        found = np.zeros((len(labels), self._n_classes))
        found[np.arange(len(labels)), labels] = 1
        return found

    def _left_out(self, samples: Samples, inverse: F64) -> F64:
        turned = self._turned[samples]
        own = np.minimum((turned**2) @ inverse, 1 - 1e-6)
        found: F64 = turned @ (inverse[:, None] * self._products)
        rows = np.arange(len(turned))
        found[rows, self._labels[samples]] -= own
        found /= (1 - own)[:, None]
        return found

    def left_out(self, samples: Samples = _ALL) -> F64:
        """Return the predictions for some samples, shape (sample, class), unclipped."""
        return self._left_out(samples, self._inverse)


def _standardised(inputs: F32) -> F64:
    x = inputs.astype(np.float64)
    deviation = x.std(axis=0)
    x = (x - x.mean(axis=0)) / np.where(deviation > 1e-6 * np.abs(x).max(), deviation, np.inf)
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)


class Voters:
    """Samples that vote on the label of others, by the cosine of inputs.

    Args:
        inputs: inputs of all samples, shape (sample, feature), finite.
        labels: labels of all samples, shape (sample,).
        n_classes: number of classes.
        voters: samples that vote, sorted, shape (voter,).
    """

    def __init__(self, inputs: F32, labels: I64, n_classes: int, voters: I64) -> None:
        self._unit, self._ballots, self._n_classes = (
            _unit(inputs[voters]),
            labels[voters],
            n_classes,
        )
        self._voters = voters

    def votes(self, inputs: F32, samples: I64) -> F64:
        """Return the labels of the nearest voters, weighted by the cosine.

        A sample does not vote on itself.

        Args:
            inputs: inputs of some samples, shape (sample, feature).
            samples: numbers of these samples among all, shape (sample,).

        Returns:
            Shape (sample, class), rows sum to 1.
        """
        unit, n_classes = _unit(inputs), self._n_classes
        found = np.zeros((len(unit), n_classes))
        k = min(NEIGHBOURS, len(self._voters) - 1)
        if k < 1:
            return _rows(found)
        place = np.searchsorted(self._voters, samples)
        place[place == len(self._voters)] = 0
        votes_itself = self._voters[place] == samples
        height = max(1, _BLOCK // len(self._voters))
        for start in range(0, len(unit), height):
            rows = slice(start, start + height)
            similar = unit[rows] @ self._unit.T
            own = np.flatnonzero(votes_itself[rows])
            similar[own, place[rows][own]] = -np.inf
            nearest = np.argpartition(similar, -k, axis=1)[:, -k:]
            weight = np.maximum(np.take_along_axis(similar, nearest, axis=1), 0)
            flat = (np.arange(len(similar))[:, None] * n_classes + self._ballots[nearest]).ravel()
            counts = np.bincount(flat, weight.astype(np.float64).ravel(), len(similar) * n_classes)
            found[rows] = counts.reshape(len(similar), n_classes)
        return _rows(found)


def _unit(inputs: F32) -> F32:
    norms = np.linalg.norm(inputs, axis=1, keepdims=True)
    found: F32 = (inputs / np.where(norms > 0, norms, 1)).astype(np.float32, copy=False)
    return found


def chosen_voters(n: int, n_classes: int) -> I64:
    """Return the samples that vote among `n`, sorted. The draw is always the same."""
    most = min(max(_VOTERS_OF_CLASS * n_classes, FEWEST_VOTERS), MOST_VOTERS)
    if n <= most:
        return np.arange(n)
    return np.sort(np.random.default_rng(0).choice(n, most, replace=False))


def heaviest(weights: F64, most: int) -> F64:
    """Return the weights of the heaviest epochs, at most `most`, and 0 for the others."""
    kept = np.argsort(-weights, kind="stable")[:most]
    found = np.zeros(len(weights))
    found[kept] = weights[kept]
    return found


class RidgeSideBySide:
    """R: leave-one-out predictions from the inputs of several epochs side by side.

    An epoch that did not visit a sample says the mean of its inputs about it.

    Args:
        dynamics: visits, with inputs or with all logits.
        weights: weight of each epoch, shape (epoch,). Epochs with a weight are taken.
    """

    def __init__(self, dynamics: Dynamics, weights: F64) -> None:
        stacked = [_inputs(dynamics, epoch) for epoch in np.flatnonzero(weights).tolist()]
        known = np.any([np.isfinite(inputs[:, 0]) for inputs in stacked], axis=0)
        self._n_classes = dynamics.n_classes
        # place of each sample among those with inputs, if it has some
        self._known, self._places = known, np.cumsum(known) - 1
        self._ridge: Ridge | None = None
        if known.sum() > 1:
            joined = np.concatenate([_filled(inputs)[known] for inputs in stacked], axis=1)
            self._ridge = Ridge(joined, dynamics.labels[known], dynamics.n_classes)

    def chances(self, samples: Samples = _ALL) -> F64:
        """Return chances of some samples, shape (sample, class).

        Rows of samples without inputs are even.
        """
        known = self._known[samples]
        found = np.full((len(known), self._n_classes), 1 / self._n_classes)
        if self._ridge is not None:
            found[known] = self._ridge.left_out(self._places[samples][known])
        return normalised(found)


def _filled(inputs: F32) -> F32:
    """Inputs with the mean in place of those of samples that were not visited."""
    there = np.isfinite(inputs).all(axis=1, keepdims=True)
    count = max(int(there.sum()), 1)
    mean = np.where(there, inputs, 0).sum(axis=0, dtype=np.float64) / count
    return np.where(there, inputs, mean.astype(np.float32))


class VotesOver:
    """V: votes averaged over epochs, for each way to weigh the epochs.

    Args:
        dynamics: visits, with inputs or with all logits.
        weightings: weights of the epochs, each of shape (epoch,). Neighbours are looked for once
            in each epoch that one of them gives a weight.
    """

    def __init__(self, dynamics: Dynamics, weightings: Sequence[F64]) -> None:
        self._dynamics, self._weightings = dynamics, weightings
        self._voters: dict[int, Voters] = {}
        labels, n_classes = dynamics.labels, dynamics.n_classes
        for epoch in np.flatnonzero(np.any(weightings, axis=0)).tolist():
            inputs = _inputs(dynamics, epoch)
            there = np.flatnonzero(np.isfinite(inputs).all(axis=1))
            voters = there[chosen_voters(len(there), n_classes)]
            self._voters[epoch] = Voters(inputs, labels, n_classes, voters)

    def chances(self, samples: Samples = _ALL) -> list[F64]:
        """Return chances of some samples for each way, shape (sample, class).

        Rows of samples without inputs are even.
        """
        numbers = np.arange(len(self._dynamics.labels))[samples]
        totals = [np.zeros((len(numbers), self._dynamics.n_classes)) for _ in self._weightings]
        for epoch, voters in self._voters.items():
            inputs = _inputs(self._dynamics, epoch, samples)
            there = np.isfinite(inputs).all(axis=1)
            own = voters.votes(inputs[there], numbers[there])
            for total, weights in zip(totals, self._weightings, strict=True):
                total[there] += weights[epoch] * own
        return [normalised(_rows(total)) for total in totals]


def _inputs(dynamics: Dynamics, epoch: int, samples: Samples = _ALL) -> F32:
    """Inputs of one epoch, or else centred logits, shape (sample, feature)."""
    found: F32
    if dynamics.inputs is not None:
        found = dynamics.inputs[epoch, samples].astype(np.float32)
        return found
    assert not isinstance(dynamics.logits, TopLogits)
    found = dynamics.logits[epoch, samples].astype(np.float32)
    found[~np.isfinite(found).all(axis=1)] = np.nan
    found -= found.mean(axis=1, keepdims=True)
    return found
