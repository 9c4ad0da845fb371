"""Search for the size at which leaving out samples flips a prediction, for many predictions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.evaluation.queries import Query
from hydra_pipe.retraining.retrainer import HIT, LOSS
from hydra_pipe.types import I64

# Number of rounds, each of which halves the sizes that are possible.
MOST_ROUNDS = 5


def sizes_up_to(limit: int) -> I64:
    """Return the numbers of samples to try, ascending from 1 to `limit`, nearly geometric.

    There are 2^k - 1 of them, so that k rounds of bisection find each answer.

    Args:
        limit: largest number, 1 or more.
    """
    n = 2 ** min(MOST_ROUNDS, (limit + 1).bit_length() - 1) - 1
    if n == 1:
        return np.array([limit])
    found = np.rint(np.geomspace(1, limit, n)).astype(np.int64)
    # Small numbers are rounded to the same one: they go up by one instead, and never beyond the
    # limit, because a geometric row is below the straight line between its ends.
    places = np.arange(n)
    ascending: I64 = np.maximum.accumulate(found - places) + places
    return ascending


class Bisection:
    """Search for the first place of a row at which something is so, for many rows at a time.

    Args:
        n_places: number of places, 2^k - 1.
        shape: shape of the searches.
    """

    def __init__(self, n_places: int, shape: tuple[int, ...]) -> None:
        self._low = np.full(shape, -1)
        # First place that is known, or `n_places` if there is none.
        self.high = np.full(shape, n_places)
        self.diverged = 0

    @property
    def middle(self) -> I64:
        """Place to look at next, in the shape of the searches."""
        middle: I64 = (self._low + self.high) // 2
        return middle

    def halve(self, found: NDArray[np.bool_], diverged: int) -> None:
        """Go on with one half of the places.

        Args:
            found: True where it is so at `middle`, in the shape of the searches.
            diverged: number of retrainings that diverged in this look.
        """
        middle = self.middle
        self.high = np.where(found, middle, self.high)
        self._low = np.where(found, self._low, middle)
        self.diverged += diverged


@dataclass(frozen=True)
class Order:
    """Samples in the order in which they are left out, for each query.

    Args:
        first: ids of the first samples, shape (row, rank).
        row: row of each query. Random orders have one row for all queries.
    """

    first: I64
    row: I64


@dataclass(frozen=True)
class Trainings:
    """Retrainings of a round, each made once, whichever queries ask for it.

    Args:
        left_out: ids that each retraining leaves out.
        at: number of the retraining of each order and query, shape (order, query).
    """

    left_out: list[I64]
    at: I64

    @classmethod
    def of(cls, orders: Sequence[Order], sizes: I64, places: I64) -> "Trainings":
        """Return the retrainings that leave out as many samples as `places` says.

        Args:
            orders: orders of the samples.
            sizes: numbers of samples to leave out.
            places: place in `sizes` of each order and query, shape (order, query).
        """
        known: dict[tuple[int, int, int], int] = {}
        at = np.empty(places.shape, np.int64)
        for index, order in enumerate(orders):
            for query, row in enumerate(order.row.tolist()):
                key = (index, row, int(sizes[places[index, query]]))
                at[index, query] = known.setdefault(key, len(known))
        return cls([orders[index].first[row, :size] for index, row, size in known], at)

    def flipped(self, outcome: NDArray[np.float64], queries: Sequence[Query]) -> NDArray[np.bool_]:
        """Return whether the prediction of each query is wrong, shape (order, query).

        A retraining that diverged flips nothing.

        Args:
            outcome: loss and hit of each test sample, shape (retraining, 2, test).
            queries: queries of one test sample each.
        """
        tests = np.concatenate([query.tests for query in queries])
        wrong = (outcome[:, HIT] == 0.0) & np.isfinite(outcome[:, LOSS])
        return np.asarray(wrong[self.at, tests])

    def diverged(self, outcome: NDArray[np.float64]) -> int:
        """Return how many retrainings diverged."""
        return int((~np.isfinite(outcome[:, LOSS]).all(axis=1)).sum())
