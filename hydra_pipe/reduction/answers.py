"""Answers of a task: relevance that is written as it comes, or the top samples of each column.

A task answers some columns for a share of the samples. Rankings of all shares meet in one task,
which writes them. So a task that runs again writes the same bytes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hydra_pipe.maths.ranking import Ranking
from hydra_pipe.plan.records import RANKED_SAMPLES, Found
from hydra_pipe.reduction.job import ReductionJob
from hydra_pipe.store.data.relevance import write_relevance
from hydra_pipe.store.data.top_samples import write_top_samples
from hydra_pipe.store.zarr.arrays import Array
from hydra_pipe.types import F32


class Answers:
    """Answers of some columns, for a share of the samples.

    Args:
        job: description of the reduction.
        first_column: first column of the result that is answered.
        n_columns: number of columns.
    """

    def __init__(self, job: ReductionJob[Any], first_column: int, n_columns: int) -> None:
        self._first_column = first_column
        self._array = self.ranking = None
        if job.top is None:
            self._array = Array.open(job.relevance)
        else:
            self.ranking = Ranking(first_column, n_columns, job.top)

    def add(self, first_sample: int, values: F32) -> None:
        """Answer some samples, which come in order.

        Args:
            first_sample: the first of the samples. It begins chunks of a relevance array.
            values: relevance, shape (sample, column), float32.
        """
        if self._array is not None:
            write_relevance(self._array, first_sample, self._first_column, values)
        if self.ranking is not None:
            for low in range(0, len(values), RANKED_SAMPLES):
                slab = np.ascontiguousarray(values[low : low + RANKED_SAMPLES].T)
                self.ranking.add(slab, first_sample + low)


def finish(job: ReductionJob[Any], first_column: int, rankings: Sequence[Ranking | None]) -> Found:
    """Write the top samples of some columns. Written relevance needs no more.

    Args:
        job: description of the reduction.
        first_column: the first of the columns.
        rankings: rankings of all shares of the samples, in order. None: relevance was written.

    Returns:
        The findings of the pass, which are none.
    """
    shares = [ranking for ranking in rankings if ranking is not None]
    if shares:
        whole, *later = shares
        for share in later:
            whole.join(share)
        write_top_samples(job.relevance, first_column, whole.tops())
    return {}
