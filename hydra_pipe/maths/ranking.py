"""Rankings of training samples for each test sample. Arrays in, arrays out."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.types import F32, I64

# Helpful, harmful.
SIDES = (1, -1)


def top_samples(relevance: F32, count: int, above: np.float32 | float = 0.0) -> I64:
    """Return the `count` samples with the largest positive values, largest first.

    The smaller sample id wins a tie.

    Args:
        relevance: relevance of every sample, shape (sample,).
        count: largest number of samples. There are fewer if fewer values are positive.
        above: number from 0 on. Values up to the number do not count.
    """
    least = _enough(relevance, count) if above == 0 else 0.0
    candidates = np.flatnonzero(relevance >= least if least > 0 else relevance > above)
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


@dataclass(frozen=True)
class Tops:
    """Rankings of several columns as arrays, for both sides: helpful, harmful.

    Args:
        samples: training samples in order of rank, int64 (column, side, rank). -1 after the last.
        relevance: relevance of the pairs, float32 (column, side, rank). NaN after the last.
    """

    samples: I64
    relevance: F32

    def ranked(self, first_test: int, count: int) -> Ranked:
        """Return the first `count` entries of each side, as `Ranking.ranked` returns them.

        Args:
            first_test: number of the first column.
            count: largest number of entries of a side.
        """
        samples, relevance = self.samples[..., :count], self.relevance[..., :count]
        known = samples >= 0
        return _ranked(first_test, known.sum(axis=2).ravel(), samples[known], relevance[known])


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
                place = j * len(SIDES) + side
                samples, values = self._kept[place]
                # A later sample loses a tie, so it counts only above the last of a full ranking.
                above = abs(values[-1]) if len(samples) == self._count else 0.0
                top = top_samples(column if sign > 0 else -column, self._count, above)
                self._kept[place] = self._merged(samples, values, top + first_sample, column[top])

    def join(self, later: "Ranking") -> None:
        """Count the slabs of another ranking of the same columns. They come after these slabs."""
        pairs = zip(self._kept, later._kept, strict=True)
        self._kept = [self._merged(*mine, *its) for mine, its in pairs]

    def _merged(self, samples: I64, values: F32, more: I64, more_values: F32) -> tuple[I64, F32]:
        if not len(samples):
            return more, more_values
        if not len(more):
            return samples, values
        samples, values = np.concatenate([samples, more]), np.concatenate([values, more_values])
        # Earlier slabs have the smaller ids, and come first if values tie.
        order = np.argsort(-np.abs(values), kind="stable")[: self._count]
        return samples[order], values[order]

    def ranked(self) -> Ranked:
        """Return the entries in order of test sample, helpful before harmful, then rank."""
        samples, values = zip(*self._kept, strict=True)
        sizes = np.array([len(own) for own in samples])
        return _ranked(self._first_test, sizes, np.concatenate(samples), np.concatenate(values))

    def tops(self) -> Tops:
        """Return the rankings as arrays with a place for each possible entry."""
        shape = (len(self._kept) // len(SIDES), len(SIDES), self._count)
        samples, relevance = np.full(shape, -1, np.int64), np.full(shape, np.nan, np.float32)
        for place, (own, values) in enumerate(self._kept):
            at = (*divmod(place, len(SIDES)), slice(len(own)))
            samples[at], relevance[at] = own, values
        return Tops(samples, relevance)


def _ranked(first_test: int, sizes: I64, samples: I64, relevance: F32) -> Ranked:
    """Return the entries of rankings that follow each other.

    Args:
        first_test: number of the first column.
        sizes: number of entries of each side of each column, shape (column * side,).
        samples, relevance: entries in order, shape (entry,).
    """
    places = np.arange(len(sizes))
    return Ranked(
        ends=np.cumsum(sizes)[1::2],
        test=np.repeat(first_test + places // len(SIDES), sizes),
        helpful=np.repeat(places % len(SIDES) == 0, sizes),
        rank=np.concatenate([np.arange(1, n + 1, dtype=np.int32) for n in sizes]),
        train=samples,
        relevance=relevance,
    )
