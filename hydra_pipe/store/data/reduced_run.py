"""A relevance array with the recording that it was computed from, checked against each other."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import StoreError
from hydra_pipe.progress import Progress
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.keys import Keys
from hydra_pipe.store.data.probes import WhichTests, tested_by
from hydra_pipe.store.data.recording import open_recording
from hydra_pipe.store.data.recording_counts import Counts
from hydra_pipe.store.data.relevance import (
    RELEVANCE_UNREADABLE,
    ResultColumns,
    columns_of,
    open_relevance,
)
from hydra_pipe.store.data.rows import check_within
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import ResultName
from hydra_pipe.store.run.stages import REDUCE
from hydra_pipe.store.zarr.arrays import Array

_VISIT_ROWS = 2**20


@dataclass(frozen=True, kw_only=True)
class RecordingOfColumns:
    """A recording, and the samples that the columns of a result stand for.

    Args:
        up_to_step: number of the first steps that the result is of. None: all steps.
        gradients, counts: the recording, or its first steps.
        columns: meaning of the result's columns.
        tested: test samples of the columns.
    """

    up_to_step: int | None
    gradients: Gradients
    counts: Counts
    columns: ResultColumns
    tested: WhichTests

    def labels_of_columns(self) -> NDArray[Any] | None:
        """Return the labels of the columns, shape (column,). None where they are unknown.

        Raises:
            StoreError: damaged.
        """
        return self.columns.labels(self.tested.labels(self.gradients))

    def keys_of_tests(self) -> Keys | None:
        """Return the keys of all test samples. None if they have none, or columns are means.

        Raises:
            StoreError: damaged.
        """
        return None if self.columns.by is not None else self.tested.keys(self.gradients)

    def visits(self, progress: Progress) -> NDArray[np.int64]:
        """Return the number of steps that used each sample, shape (sample,).

        Raises:
            StoreError: damaged.
        """
        visits = np.zeros(self.counts.n_samples, np.int64)
        n_rows = self.gradients.rows.n_rows
        with progress.task("visits", n_rows, "rows") as task:
            for first in range(0, n_rows, _VISIT_ROWS):
                samples = self.gradients.samples(slice(first, first + _VISIT_ROWS))
                check_within(samples, len(visits), f"samples of {self.gradients.path}")
                visits += np.bincount(samples, minlength=len(visits))
                task.advance(len(samples))
        return visits


@dataclass(frozen=True, kw_only=True)
class ReducedRun(RecordingOfColumns):
    """The result of a complete reduction.

    Args:
        relevance: the array. All its files exist.
    """

    relevance: Array

    @classmethod
    def open(cls, directory: RunDirectory, name: str) -> "ReducedRun":
        """Open the result `name`, whose stage is complete.

        Raises:
            StoreError: the result is damaged, or of another recording.
        """
        reduction = directory.stages[REDUCE.of(name)]
        up_to_step = (
            reduction.count(names.UPTO, least=1) if names.UPTO in reduction.settings else None
        )
        gradients, counts = open_recording(directory, up_to_step)
        tested, n_known = tested_by(
            directory, gradients, counts.checkpoint, counts.n_tests, ResultName.parse(name).probe
        )
        relevance = open_relevance(directory.path / names.RELEVANCE, name)
        columns = columns_of(relevance)
        n_tests = columns.tests[-1][1] if columns.tests else 0
        fault = relevance.shortfall()
        if relevance.shape[0] != counts.n_samples or n_tests > n_known or 0 in relevance.shape:
            fault = (
                f"has {relevance.shape[0]} samples x {n_tests} tests, {counts.n_samples} x "
                f"{n_known} were recorded"
            )
        if fault is not None:
            raise StoreError(f"{relevance.path} {fault}: {RELEVANCE_UNREADABLE}")
        return cls(
            up_to_step=up_to_step,
            gradients=gradients,
            counts=counts,
            columns=columns,
            tested=tested,
            relevance=relevance,
        )
