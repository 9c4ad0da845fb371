"""Statistics of each sample's visits, added up from rows in any order."""

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.labels.epochs import Statistics, Visits
from hydra_pipe.types import F64, I64

_NEVER = np.iinfo(np.int64).max


class VisitTotals:
    """`Statistics` in the making. A dozen numbers for each sample are held, and no rows.

    Args:
        n_samples: number of training samples.
    """

    def __init__(self, n_samples: int) -> None:
        self._count = np.zeros(n_samples, np.int32)
        self._sums = {name: np.zeros(n_samples) for name in ("loss", "margin", "error", "p", "p2")}
        self._wrong = np.zeros(n_samples, np.int32)
        self._last_step = np.full(n_samples, -1, np.int64)
        self._last_loss = np.full(n_samples, np.nan, np.float32)
        self._first_hit = np.full(n_samples, _NEVER, np.int64)
        self._before = np.zeros(n_samples, np.int32)

    def add(self, samples: I64, steps: I64, visits: Visits) -> None:
        """Count rows.

        Args:
            samples: sample of each row, shape (row,).
            steps: step of each row, shape (row,).
            visits: numbers of each row, shape (1, row). Rows without a finite loss do not count.
        """
        known = np.isfinite(visits.loss[0])
        samples, steps, loss = samples[known], steps[known], visits.loss[0][known]
        hit = visits.hit[0][known]
        p = np.exp(-np.where(np.isfinite(hit), loss, np.inf))  # a loss without classes may be < 0
        np.add.at(self._count, samples, 1)
        own = (loss, visits.margin[0][known], visits.error[0][known], p, p**2)
        for total, values in zip(self._sums.values(), own, strict=True):
            np.add.at(total, samples, values)
        np.add.at(self._wrong, samples[hit == 0], 1)
        np.maximum.at(self._last_step, samples, steps)
        is_last = self._last_step[samples] == steps
        self._last_loss[samples[is_last]] = loss[is_last]
        np.minimum.at(self._first_hit, samples[hit == 1], steps[hit == 1])

    def add_order(self, samples: I64, steps: I64) -> None:
        """Count the visits before a sample was learnt. All rows must be added before, by `add`.

        Args:
            samples, steps: sample and step of each row, shape (row,).
        """
        np.add.at(self._before, samples[steps < self._first_hit[samples]], 1)

    def statistics(self, samples: slice) -> Statistics:
        """Return the statistics of some samples, as `statistics_of` does for visits in memory."""
        count, first = self._count[samples], self._first_hit[samples]
        means = {name: _over(total[samples], count) for name, total in self._sums.items()}
        variance = np.maximum(means["p2"] - means["p"] ** 2, 0)
        is_known = np.isfinite(means["margin"])
        return Statistics(
            mean_loss=means["loss"],
            last_loss=self._last_loss[samples].astype(np.float64),
            mean_margin=means["margin"],
            mean_error=means["error"],
            variability=np.where(is_known, np.sqrt(variance), np.nan),
            wrong_epochs=np.where(is_known, self._wrong[samples], np.nan),
            first_learnt=np.where(first < _NEVER, self._before[samples], -1).astype(np.int64),
        )


def _over(total: F64, count: NDArray[np.int32]) -> F64:
    found: F64 = np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
    return found
