"""Ranks and means over whole columns of relevance. Arrays in, arrays out."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.types import F32


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
