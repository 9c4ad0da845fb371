"""Findings of one pass over relevance: rankings, sums by sample, means by class, distribution."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.exporting.ranking import ClassMeans
from hydra_pipe.maths.ranking import top_samples
from hydra_pipe.progress import Task
from hydra_pipe.store.data.relevance import read_relevance
from hydra_pipe.store.zarr.arrays import Array

# Most labels on each side of the table of classes: more cannot be read.
MOST_CLASSES = 24
# Most columns that a training sample is said to harm.
MOST_HARMED = 3
_EXPONENTS, _BIAS, _MANTISSA_BITS = 256, 127, 23


@dataclass(frozen=True)
class Side:
    """The training samples that help, or harm, one test sample most.

    Args:
        ids: ids of the samples, the strongest first, shape (rank,).
        relevance: relevance of each, shape (rank,).
    """

    ids: NDArray[np.int64]
    relevance: NDArray[np.float32]


@dataclass(frozen=True)
class Classes:
    """Mean relevance by label of the training and the test sample.

    Args:
        train, test: labels, in order: the ones with the most samples.
        means: mean relevance, shape (train label, test label). Not a number if there is no pair.
        n_train, n_test: numbers of all labels.
    """

    train: list[Any]
    test: list[Any]
    means: NDArray[np.float64]
    n_train: int
    n_test: int


@dataclass
class Distribution:
    """Numbers of pairs by size of relevance, in powers of two.

    Args:
        counts: number of pairs by sign (0: positive) and exponent of the float32 value, shape
            (2, 256).
    """

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, _EXPONENTS), np.int64))

    def add(self, relevance: NDArray[np.float32]) -> None:
        """Count the values of a contiguous array."""
        bits = relevance.reshape(-1).view(np.uint32) >> _MANTISSA_BITS
        self.counts += np.bincount(bits, minlength=2 * _EXPONENTS).reshape(2, _EXPONENTS)

    @property
    def zeros(self) -> int:
        """Number of pairs of relevance 0, or too small for float32."""
        return int(self.counts[:, 0].sum())

    @property
    def strange(self) -> int:
        """Number of pairs whose relevance is infinite or not a number."""
        return int(self.counts[:, -1].sum())

    @property
    def helpful(self) -> int:
        return int(self.counts[0, 1:-1].sum())

    @property
    def harmful(self) -> int:
        return int(self.counts[1, 1:-1].sum())

    def bins(self) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
        """Return the bins that are in use.

        Returns:
            Lower edge of each bin, in size of relevance, and the numbers of helpful and of
            harmful pairs in it. A bin ends at twice its lower edge.
        """
        used = np.flatnonzero(self.counts[:, 1:-1].sum(axis=0)) + 1
        span = np.arange(used[0], used[-1] + 1) if len(used) else np.zeros(0, np.int64)
        return np.exp2(span - _BIAS).astype(np.float64), self.counts[0, span], self.counts[1, span]


@dataclass(frozen=True)
class Wanted:
    """Wishes of a pass over the relevance, beside sums.

    Args:
        columns: columns to rank training samples for.
        top: number of training samples on each side of a column.
        samples: training samples to find the columns of that they harm most.
    """

    columns: Sequence[int]
    top: int
    samples: Sequence[int] = ()


@dataclass(frozen=True)
class Findings:
    """Findings of a pass over the relevance.

    Args:
        sides: (helpful, harmful) of each wanted column, in their order.
        harmed: columns that each wanted sample harms most, at most `MOST_HARMED`, the most harmed
            first.
        sums: sums over all columns, shape (sample,).
        classes: mean relevance by label, or None if labels are unknown.
        distribution: distribution of all pairs.
    """

    sides: list[tuple[Side, Side]]
    harmed: list[list[int]]
    sums: NDArray[np.float64]
    classes: Classes | None
    distribution: Distribution


def findings(
    relevance: Array,
    wanted: Wanted,
    train_labels: NDArray[Any] | None,
    test_labels: NDArray[Any] | None,
    width: int,
    task: Task,
) -> Findings:
    """Read the relevance once, `width` columns at a time.

    Args:
        relevance: relevance on disk, shape (sample, column).
        wanted: columns to rank, and samples to look for.
        train_labels: labels of the training samples, shape (sample,).
        test_labels: labels of the columns, shape (column,).
        width: number of columns in memory at once.
        task: counter of columns.

    Raises:
        StoreError: the relevance is damaged.
    """
    n_samples, n_columns = relevance.shape
    ranked, samples = set(wanted.columns), list(wanted.samples)
    harmed = _Harmed(len(samples))
    sides: dict[int, tuple[Side, Side]] = {}
    sums, distribution = np.zeros(n_samples), Distribution()
    by_class = None
    n_labels = (0, 0)
    if train_labels is not None and test_labels is not None:
        n_labels = len(np.unique(train_labels)), len(np.unique(test_labels))
        (train, train_codes), (test, test_codes) = (
            _most_frequent(train_labels),
            _most_frequent(test_labels),
        )
        by_class = ClassMeans(train_codes, test_codes)
    for first in range(0, n_columns, width):
        block = read_relevance(relevance, slice(first, min(first + width, n_columns)))
        sums += block.sum(axis=1, dtype=np.float64)
        harmed.add(block[samples], first)
        by_test = np.ascontiguousarray(block.T)
        if by_class is not None:
            by_class.add(by_test, first, 0)
        for number, column in enumerate(by_test, start=first):
            distribution.add(column)
            if number in ranked:
                sides[number] = (_side(column, wanted.top, 1), _side(column, wanted.top, -1))
        task.advance(block.shape[1])
    classes = None
    if by_class is not None:
        # The last row and column may stand for all the other labels.
        classes = Classes(train, test, by_class.means()[: len(train), : len(test)], *n_labels)
    return Findings(
        [sides[column] for column in wanted.columns], harmed.columns(), sums, classes, distribution
    )


class _Harmed:
    """The columns that some training samples harm most, from blocks of columns.

    Args:
        n: number of the training samples.
    """

    def __init__(self, n: int) -> None:
        self._values, self._columns = np.zeros((n, 0), np.float32), np.zeros((n, 0), np.int64)

    def add(self, block: NDArray[np.float32], first: int) -> None:
        """Count a block of the samples' relevance, shape (sample, column), from column `first`."""
        more = np.broadcast_to(np.arange(first, first + block.shape[1]), block.shape)
        values = np.concatenate([self._values, block], axis=1)
        columns = np.concatenate([self._columns, more], axis=1)
        order = np.argsort(values, axis=1, kind="stable")[:, :MOST_HARMED]
        self._values = np.take_along_axis(values, order, axis=1)
        self._columns = np.take_along_axis(columns, order, axis=1)

    def columns(self) -> list[list[int]]:
        """Return the columns of each sample, the most harmed first."""
        return [
            columns[values < 0].tolist()
            for columns, values in zip(self._columns, self._values, strict=True)
        ]


def _side(column: NDArray[np.float32], top: int, sign: int) -> Side:
    ids = top_samples(column * np.float32(sign), top)
    return Side(ids, column[ids])


def _most_frequent(labels: NDArray[Any]) -> tuple[list[Any], NDArray[np.int64]]:
    """Return the labels that most samples have, and the place of each sample's label among them.

    The labels are in order. A sample with none of them gets the number after the last place.
    """
    names, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    kept = np.sort(np.argsort(-counts, kind="stable")[:MOST_CLASSES])
    places = np.full(len(names), len(kept), np.int64)
    places[kept] = np.arange(len(kept))
    return names[kept].tolist(), places[codes]
