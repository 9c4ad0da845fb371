"""Which training samples rank where for which test sample. Arrays in, arrays out."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def top_samples(relevance: Floats, count: int) -> Ints:
    """The `count` samples with the largest positive values, largest first; ties go to the smaller sample id.

    Args:
        relevance: of every sample, shape (sample,).
        count: how many at most; fewer where fewer are positive.
    """
    candidates = np.flatnonzero(relevance > 0)
    if len(candidates) > count:
        # all that tie with the last one stay in, so that the sample ids decide between them
        threshold = np.partition(relevance[candidates], -count)[-count]
        candidates = candidates[relevance[candidates] >= threshold]
    order = np.argsort(-relevance[candidates], kind="stable")
    return candidates[order[:count]]


@dataclass(frozen=True)
class Ranked:
    """Rankings of several test samples, one entry for each ranked pair.

    Args:
        test: test sample, shape (entry,).
        helpful: which side, bool (entry,).
        rank: from 1, int32 (entry,).
        train: training sample, int64 (entry,).
        relevance: float32 (entry,).
    """

    test: Ints
    helpful: NDArray[np.bool_]
    rank: NDArray[np.int32]
    train: Ints
    relevance: Floats


def rank_tests(relevance: Floats, first_test: int, count: int) -> Ranked:
    """Both sides' rankings of each test sample: in order of test sample, helpful before harmful, then rank.

    Args:
        relevance: shape (sample, test).
        first_test: id of the first column.
        count: entries a side at most.
    """
    parts: list[tuple[int, bool, Ints]] = []
    columns = np.ascontiguousarray(relevance.T)
    for j, column in enumerate(columns):
        parts.append((j, True, top_samples(column, count)))
        parts.append((j, False, top_samples(-column, count)))
    sizes = [len(samples) for _, _, samples in parts]
    test = np.repeat([j for j, _, _ in parts], sizes)
    train = np.concatenate([samples for _, _, samples in parts])
    return Ranked(
        test=test + first_test,
        helpful=np.repeat([helpful for _, helpful, _ in parts], sizes),
        rank=np.concatenate([np.arange(1, n + 1, dtype=np.int32) for n in sizes]),
        train=train,
        relevance=columns[test, train],
    )


def rank_harmful(relevance_sum: NDArray[np.float64]) -> NDArray[np.int32]:
    """Rank of each sample over all test samples, 1 = most harmful (lowest sum); ties go to the smaller sample id."""
    ranks = np.empty(len(relevance_sum), np.int32)
    ranks[np.argsort(relevance_sum, kind="stable")] = np.arange(1, len(relevance_sum) + 1, dtype=np.int32)
    return ranks


class ClassMeans:
    """Mean relevance of each pair of (training label, test label), added up block by block."""

    def __init__(self, train_labels: NDArray[Any], test_labels: NDArray[Any]) -> None:
        self.train_names, self._train = np.unique(train_labels, return_inverse=True)
        self.test_names, self._test = np.unique(test_labels, return_inverse=True)
        self._sums = np.zeros((len(self.train_names), len(self.test_names)))

    def add(self, relevance: Floats, first_test: int) -> None:
        """Count the columns of `relevance`, shape (sample, test), that begin at test sample `first_test`."""
        by_class = np.zeros((len(self.train_names), relevance.shape[1]))
        order = np.argsort(self._train, kind="stable")
        starts = np.searchsorted(self._train[order], np.arange(len(self.train_names)))
        by_class += np.add.reduceat(relevance[order].astype(np.float64), starts, axis=0)
        tests = self._test[first_test : first_test + relevance.shape[1]]
        np.add.at(self._sums.T, tests, by_class.T)

    def pairs(self) -> NDArray[np.int64]:
        """Number of pairs behind each mean, shape (train class, test class)."""
        return np.outer(np.bincount(self._train), np.bincount(self._test)).astype(np.int64)

    def means(self) -> NDArray[np.float64]:
        """Shape (train class, test class)."""
        means: NDArray[np.float64] = self._sums / self.pairs()
        return means
