"""Mean and spread of the relevance of several runs (docs/combining.md).

Of one column, run r has the values v_r(i) of the samples i, and their root mean square s_r. Runs
count alike: u_r = v_r / s_r. With M, the median of the s_r, and n(i) runs that have sample i,

    mean            m(i) = M / n(i) * sum_r u_r(i)
    standard error  e(i) = M * sqrt(sum_r (u_r(i) - m(i) / M)^2 / (n(i) - 1) / n(i))
    agreeing        number of runs with u_r(i) of the sign of m(i)
    cosine          c = (mean over pairs of runs and samples of u_r u_s) / (mean of u_r^2)
    effective runs  N / (1 + (N - 1) max(c, 0)), N the mean of n(i)
"""

from dataclasses import dataclass

import numpy as np

from hydra_pipe.types import F64, I64, U8


@dataclass(frozen=True)
class ColumnSpread:
    """Mean and spread of a column.

    Attributes:
        mean, standard_error: float64 (sample,). The mean of a sample that no run has is 0. The
            standard error of a sample that fewer than two runs have is not a number.
        agreeing: number of runs with the sign of the mean, uint8 (sample,).
        cosine: mean cosine between two runs. Not a number where no sample is in two runs.
        effective_runs: number of independent runs that the mean is worth.
    """

    mean: F64
    standard_error: F64
    agreeing: U8
    cosine: float
    effective_runs: float


class ColumnMoments:
    """Sums over at most 254 runs of one column, in the order in which the runs come.

    Args:
        n_samples: number of samples.
    """

    def __init__(self, n_samples: int) -> None:
        self._mean, self._squares = np.zeros(n_samples), np.zeros(n_samples)
        self._count, self._positive, self._negative = np.zeros((3, n_samples), np.uint8)
        self._scales: list[float] = []

    def add(self, samples: I64 | slice, values: F64) -> float:
        """Count the column of another run, and return its root mean square.

        Args:
            samples: the samples that the run has, each once.
            values: their finite values, shape (sample,).
        """
        scale = float(np.sqrt(np.mean(values**2))) if len(values) else 0.0
        self._scales.append(scale)
        if scale:
            values = values / scale
        self._count[samples] += 1
        away = values - self._mean[samples]
        self._mean[samples] += away / self._count[samples]
        self._squares[samples] += away * (values - self._mean[samples])
        self._positive[samples] += values > 0
        self._negative[samples] += values < 0
        return scale

    def spread(self) -> ColumnSpread:
        """Return the mean and the spread over the runs so far."""
        n, mean = self._count.astype(np.int64), self._mean
        median = float(np.median(self._scales)) if self._scales else 0.0
        several = n > 1
        error = np.full(len(n), np.nan)
        error[several] = np.sqrt(self._squares[several] / (n[several] - 1) / n[several])
        zero = (n - self._positive - self._negative).astype(np.uint8)
        agreeing = np.where(mean > 0, self._positive, np.where(mean < 0, self._negative, zero))
        cosine = self._cosine()
        n_runs = float(n[n > 0].mean()) if (n > 0).any() else 0.0
        shared = 0.0 if np.isnan(cosine) else max(cosine, 0.0)
        effective = n_runs / (1 + (n_runs - 1) * shared) if n_runs else 0.0
        return ColumnSpread(median * mean, median * error, agreeing, cosine, effective)

    def _cosine(self) -> float:
        n = self._count.astype(np.int64)
        sums = n * self._mean
        squares = float(self._squares.sum() + (sums * self._mean).sum())
        n_pairs = int((n * (n - 1)).sum())
        if not n_pairs or squares <= 0:
            return float("nan")
        products = float((sums**2).sum()) - squares
        return products / n_pairs / (squares / int(n.sum()))
