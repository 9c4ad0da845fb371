"""A relevance array with the samples that it is about, checked against each other."""

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from hydra_pipe.errors import StoreError
from hydra_pipe.store import names
from hydra_pipe.store.data.combined import Combined, open_combined
from hydra_pipe.store.data.keys import Keys
from hydra_pipe.store.data.probes import tested_by
from hydra_pipe.store.data.recording import open_gradients, open_recording
from hydra_pipe.store.data.relevance import (
    RELEVANCE_UNREADABLE,
    ResultColumns,
    columns_of,
    open_relevance,
)
from hydra_pipe.store.data.samples import RecordedSamples, ResultSamples
from hydra_pipe.store.data.top_samples import TopSamples
from hydra_pipe.store.run.listing import listed
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import ResultName
from hydra_pipe.store.run.stages import COMBINE, TOPS, reduces_to
from hydra_pipe.store.zarr.arrays import Array


@dataclass(frozen=True, kw_only=True)
class SamplesOfColumns:
    """The samples of a recording, or of several, and those that the columns of a result mean.

    Args:
        up_to_step: number of the first steps that the result is of. None: all steps.
        samples: training samples and test samples.
        columns: meaning of the result's columns.
    """

    up_to_step: int | None
    samples: ResultSamples
    columns: ResultColumns

    def labels_of_columns(self) -> NDArray[Any] | None:
        """Return the labels of the columns, shape (column,). None where they are unknown.

        Raises:
            StoreError: damaged.
        """
        return self.columns.labels(self.samples.test_labels())

    @property
    def combined(self) -> Combined | None:
        """The combination of runs that the result is of. None: it is of one run."""
        return self.samples if isinstance(self.samples, Combined) else None

    def keys_of_tests(self) -> Keys | None:
        """Return the keys of all test samples. None if they have none, or columns are means.

        Raises:
            StoreError: damaged.
        """
        return None if self.columns.by is not None else self.samples.test_keys()


@dataclass(frozen=True, kw_only=True)
class ReducedRun(SamplesOfColumns):
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
        up_to_step, samples, n_known = _samples_of(directory, name)
        relevance = open_relevance(directory.path / names.RELEVANCE, name)
        columns = columns_of(relevance)
        n_tests = columns.tests[-1][1] if columns.tests else 0
        fault = relevance.shortfall()
        if relevance.shape[0] != samples.n_samples or n_tests > n_known or 0 in relevance.shape:
            fault = (
                f"has {relevance.shape[0]} samples x {n_tests} tests, {samples.n_samples} x "
                f"{n_known} were recorded"
            )
        elif isinstance(samples, Combined) and samples.n_columns != relevance.shape[1]:
            fault = f"has {relevance.shape[1]} columns, {samples.n_columns} were combined"
        if fault is not None:
            raise StoreError(f"{relevance.path} {fault}: {RELEVANCE_UNREADABLE}")
        return cls(up_to_step=up_to_step, samples=samples, columns=columns, relevance=relevance)


@dataclass(frozen=True, kw_only=True)
class ReducedTops(SamplesOfColumns):
    """The result of a complete reduction to the top samples of each column.

    Args:
        tops: the top samples. All their files exist.
    """

    tops: TopSamples

    @classmethod
    def open(cls, directory: RunDirectory, name: str) -> "ReducedTops":
        """Open the result `name`, whose stage is complete.

        Raises:
            StoreError: the result is damaged, or of another recording.
        """
        up_to_step, samples, n_known = _samples_of(directory, name)
        stage = TOPS.of(name)
        tops = TopSamples(directory.path / stage.area, directory.run_id, listed(directory, stage))
        tops.check()
        n_tests = tops.columns.tests[-1][1]
        if n_tests > n_known or tops.count > samples.n_samples:
            raise StoreError(
                f"{tops.path} has {tops.count} samples of {n_tests} tests, {samples.n_samples} x "
                f"{n_known} were recorded: {RELEVANCE_UNREADABLE}"
            )
        return cls(up_to_step=up_to_step, samples=samples, columns=tops.columns, tops=tops)


def keys_of(directory: RunDirectory, result: str) -> Keys | None:
    """Return the keys of the training samples of a result. None: they have none.

    Args:
        directory: the run.
        result: name of a result, or "dynamics".

    Raises:
        StoreError: damaged.
    """
    if COMBINE.of(result) in directory.stages:
        return open_combined(directory, result).keys()
    return open_gradients(directory).keys(names.TRAIN_KEYS)


def _samples_of(directory: RunDirectory, name: str) -> tuple[int | None, ResultSamples, int]:
    """Return the number of steps that a result is of, its samples, and the number of its tests.

    Raises:
        RunError, StoreError: the recording or the combination is missing or damaged.
    """
    if COMBINE.of(name) in directory.stages:
        combined = open_combined(directory, name)
        return None, combined, combined.n_tests
    reduction = directory.stages[reduces_to(name)]
    up_to_step = reduction.count(names.UPTO, least=1) if names.UPTO in reduction.settings else None
    gradients, counts = open_recording(directory, up_to_step)
    tested, n_known = tested_by(
        directory, gradients, counts.checkpoint, counts.n_tests, ResultName.parse(name).probe
    )
    return up_to_step, RecordedSamples(gradients, counts, tested), n_known
