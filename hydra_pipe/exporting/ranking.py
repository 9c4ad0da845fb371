"""Rankings of training samples for each test sample. Arrays in, arrays out."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.types import F32, I64

# Helpful, harmful.
SIDES = (1, -1)


def top_samples(relevance: F32, count: int) -> I64:
    """Return the `count` samples with the largest positive values, largest first.

    The smaller sample id wins a tie.

    Args:
        relevance: relevance of every sample, shape (sample,).
        count: largest number of samples. There are fewer if fewer values are positive.
    """
    least = _enough(relevance, count)
    candidates = np.flatnonzero(relevance >= least if least > 0 else relevance > 0)
    if len(candidates) > count:
        # Keep every sample that ties with the last one, so that the sample ids decide.
        threshold = np.partition(relevance[candidates], -count)[-count]
        candidates = candidates[relevance[candidates] >= threshold]
    order = np.argsort(-relevance[candidates], kind="stable")
    return candidates[order[:count]]


def _enough(relevance: F32, count: int) -> np.float32 | float:
    """Return a lower bound on the `count`-th largest value, from group maxima.

    At least `count` groups have a maximum no smaller than the bound, and each maximum is another
    sample. So a value below the bound cannot be in the top `count`. 0 if the column is too short
    for groups.
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
        helpful: True for the helpful side, bool (entry,).
        rank: rank from 1, int32 (entry,).
        train: training sample, int64 (entry,).
        relevance: relevance of the pair, float32 (entry,).
    """

    ends: I64
    test: I64
    helpful: NDArray[np.bool_]
    rank: NDArray[np.int32]
    train: I64
    relevance: F32


class Ranking:
    """Rankings of both sides for some test samples, from slabs of training samples.

    The slabs come in order.
    """

    def __init__(self, first_test: int, n_tests: int, count: int) -> None:
        self._first_test = first_test
        self._count = count
        nothing = (np.empty(0, np.int64), np.empty(0, np.float32))
        # For each test sample and side: samples and their relevance, in order of rank.
        self._kept: list[tuple[I64, F32]] = [nothing] * (n_tests * len(SIDES))

    def add(self, relevance: F32, first_sample: int) -> None:
        """Count a slab, shape (test, sample), that begins at training sample `first_sample`."""
        for j, column in enumerate(relevance):
            for side, sign in enumerate(SIDES):
                top = top_samples(column if sign > 0 else -column, self._count)
                place = j * len(SIDES) + side
                self._kept[place] = self._merged(
                    *self._kept[place], top + first_sample, column[top]
                )

    def _merged(self, samples: I64, values: F32, more: I64, more_values: F32) -> tuple[I64, F32]:
        if not len(samples):
            return more, more_values
        samples, values = np.concatenate([samples, more]), np.concatenate([values, more_values])
        # Earlier slabs have the smaller ids, and come first if values tie.
        order = np.argsort(-np.abs(values), kind="stable")[: self._count]
        return samples[order], values[order]

    def ranked(self) -> Ranked:
        """Return the entries in order of test sample, helpful before harmful, then rank."""
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
    """Return the rank of each sample over all test samples, 1 = most harmful (lowest sum).

    The smaller sample id wins a tie.
    """
    ranks = np.empty(len(relevance_sum), np.int32)
    ranks[np.argsort(relevance_sum, kind="stable")] = np.arange(
        1, len(relevance_sum) + 1, dtype=np.int32
    )
    return ranks


class ClassMeans:
    """Mean relevance of each pair of (training label, test label), added up block by block.

    The order of the additions does not depend on the width of blocks.
    """

    def __init__(self, train_labels: NDArray[Any], test_labels: NDArray[Any]) -> None:
        self.train_names, self._train = np.unique(train_labels, return_inverse=True)
        self.test_names, self._test = np.unique(test_labels, return_inverse=True)
        self._sums = np.zeros((len(self.test_names), len(self.train_names)))

    def add(self, relevance: F32, first_test: int, first_sample: int) -> None:
        """Count a block, shape (test, sample).

        Args:
            relevance: block of the relevance, shape (test, sample).
            first_test: first column of the block.
            first_sample: first training sample of the block.
        """
        classes = self._train[first_sample : first_sample + relevance.shape[1]]
        for j, column in enumerate(relevance):
            self._sums[self._test[first_test + j]] += np.bincount(
                classes, column, len(self.train_names)
            )

    @property
    def n_cells(self) -> int:
        """Number of pairs of labels."""
        return self._sums.size

    def pairs(self) -> NDArray[np.int64]:
        """Return the number of pairs behind each mean, shape (train class, test class)."""
        return np.outer(np.bincount(self._train), np.bincount(self._test)).astype(np.int64)

    def means(self) -> NDArray[np.float64]:
        """Return the means, shape (train class, test class)."""
        means: NDArray[np.float64] = self._sums.T / self.pairs()
        return means
