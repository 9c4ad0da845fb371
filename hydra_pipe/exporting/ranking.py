"""Which training samples rank where for which test sample. Arrays in, arrays out."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
# helpful, harmful
SIDES = (1, -1)


def top_samples(relevance: Floats, count: int) -> Ints:
    """The `count` samples with the largest positive values, largest first; ties go to the smaller sample id.

    Args:
        relevance: of every sample, shape (sample,).
        count: how many at most; fewer where fewer are positive.
    """
    least = _enough(relevance, count)
    candidates = np.flatnonzero(relevance >= least if least > 0 else relevance > 0)
    if len(candidates) > count:
        # all that tie with the last one stay in, so that the sample ids decide between them
        threshold = np.partition(relevance[candidates], -count)[-count]
        candidates = candidates[relevance[candidates] >= threshold]
    order = np.argsort(-relevance[candidates], kind="stable")
    return candidates[order[:count]]


def _enough(relevance: Floats, count: int) -> np.float32 | float:
    """A value that at least `count` are as large as, without a look at all of them twice; 0 where there is none so simple.

    So many groups have a largest value that is no smaller, and each of these is another sample's.
    """
    a_group = len(relevance) // (4 * count)
    if a_group < 2:
        return 0.0
    n_groups = len(relevance) // a_group
    largest = relevance[: n_groups * a_group].reshape(a_group, n_groups).max(axis=0)
    found: np.float32 = np.partition(largest, -count)[-count]
    return found


@dataclass(frozen=True)
class Ranked:
    """Rankings of several test samples, one entry for each ranked pair.

    Args:
        ends: one past the last entry of each test sample, shape (test,).
        test: number of the column, shape (entry,).
        helpful: which side, bool (entry,).
        rank: from 1, int32 (entry,).
        train: training sample, int64 (entry,).
        relevance: float32 (entry,).
    """

    ends: Ints
    test: Ints
    helpful: NDArray[np.bool_]
    rank: NDArray[np.int32]
    train: Ints
    relevance: Floats


class Ranking:
    """Both sides' rankings of some test samples, from slabs of training samples that come in order.

    Args:
        first_test: number of the first column.
        n_tests: columns.
        count: entries a side at most.
    """

    def __init__(self, first_test: int, n_tests: int, count: int) -> None:
        self._first_test = first_test
        self._count = count
        nothing = (np.empty(0, np.int64), np.empty(0, np.float32))
        # of each test sample and side: samples and their relevance, in order of rank
        self._kept: list[tuple[Ints, Floats]] = [nothing] * (n_tests * len(SIDES))

    def add(self, relevance: Floats, first_sample: int) -> None:
        """Count a slab, shape (test, sample), that begins at training sample `first_sample`."""
        for j, column in enumerate(relevance):
            for side, sign in enumerate(SIDES):
                top = top_samples(column if sign > 0 else -column, self._count)
                place = j * len(SIDES) + side
                self._kept[place] = self._merged(*self._kept[place], top + first_sample, column[top])

    def _merged(self, samples: Ints, values: Floats, more: Ints, more_values: Floats) -> tuple[Ints, Floats]:
        if not len(samples):
            return more, more_values
        samples, values = np.concatenate([samples, more]), np.concatenate([values, more_values])
        # earlier slabs have the smaller ids, and come first where values tie
        order = np.argsort(-np.abs(values), kind="stable")[: self._count]
        return samples[order], values[order]

    def ranked(self) -> Ranked:
        """In order of test sample, helpful before harmful, then rank."""
        sizes = np.array([len(samples) for samples, _ in self._kept])
        tests = self._first_test + np.arange(len(sizes)) // len(SIDES)
        sides = np.arange(len(sizes)) % len(SIDES) == 0
        return Ranked(
            ends=np.cumsum(sizes)[1::2],
            test=np.repeat(tests, sizes),
            helpful=np.repeat(sides, sizes),
            rank=np.concatenate([np.arange(1, n + 1, dtype=np.int32) for n in sizes]),
            train=np.concatenate([samples for samples, _ in self._kept]),
            relevance=np.concatenate([values for _, values in self._kept]),
        )


def rank_harmful(relevance_sum: NDArray[np.float64]) -> NDArray[np.int32]:
    """Rank of each sample over all test samples, 1 = most harmful (lowest sum); ties go to the smaller sample id."""
    ranks = np.empty(len(relevance_sum), np.int32)
    ranks[np.argsort(relevance_sum, kind="stable")] = np.arange(1, len(relevance_sum) + 1, dtype=np.int32)
    return ranks


class ClassMeans:
    """Mean relevance of each pair of (training label, test label), added up block by block.

    What is added in which order does not depend on the blocks' width.
    """

    def __init__(self, train_labels: NDArray[Any], test_labels: NDArray[Any]) -> None:
        self.train_names, self._train = np.unique(train_labels, return_inverse=True)
        self.test_names, self._test = np.unique(test_labels, return_inverse=True)
        self._sums = np.zeros((len(self.test_names), len(self.train_names)))

    def add(self, relevance: Floats, first_test: int, first_sample: int) -> None:
        """Count a block, shape (test, sample), that begins at column `first_test` and training sample `first_sample`."""
        classes = self._train[first_sample : first_sample + relevance.shape[1]]
        for j, column in enumerate(relevance):
            self._sums[self._test[first_test + j]] += np.bincount(classes, column, len(self.train_names))

    @property
    def n_cells(self) -> int:
        """Pairs of labels."""
        return self._sums.size

    def pairs(self) -> NDArray[np.int64]:
        """Number of pairs behind each mean, shape (train class, test class)."""
        return np.outer(np.bincount(self._train), np.bincount(self._test)).astype(np.int64)

    def means(self) -> NDArray[np.float64]:
        """Shape (train class, test class)."""
        means: NDArray[np.float64] = self._sums.T / self.pairs()
        return means
