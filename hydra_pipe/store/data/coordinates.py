"""Coordinates of `relevance.zarr`, for readers such as xarray.

A coordinate is an array that says which sample, test sample or mean a row or column is.
hydra-pipe reads none of them: the recording and the attributes of each result say the same.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import StoreError
from hydra_pipe.store import names
from hydra_pipe.store.data.combined import Combined, open_combined
from hydra_pipe.store.data.gradients import read_labels
from hydra_pipe.store.data.gradients_writer import put_labels
from hydra_pipe.store.data.recording import committed, open_gradients
from hydra_pipe.store.data.relevance import ResultColumns, columns_of, open_relevance
from hydra_pipe.store.files import sync, sync_tree
from hydra_pipe.store.run.locks import brief_lock
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import COMBINE, RECORD, REDUCE
from hydra_pipe.store.zarr.arrays import Array


@dataclass(frozen=True)
class Coordinate:
    """The expected content of an array of coordinates.

    Args:
        dimension: dimension of the array.
        n: number of values.
        values: function that makes the values, shape (n,). A stranger's manifest may claim any
            number, so the existing array is looked at before the values are made.
    """

    dimension: str
    n: int
    values: Callable[[], NDArray[Any]]


# Coordinates by the name of their array.
Coordinates = Mapping[str, Coordinate]


def shared_coordinates(
    labels: NDArray[Any] | None, test_labels: NDArray[Any] | None, n_samples: int, n_tests: int
) -> Coordinates:
    """Return the coordinates of all results of a run: ids, and labels where known.

    Args:
        labels, test_labels: labels of samples and of test samples. None: unknown.
        n_samples, n_tests: numbers of samples and of test samples.
    """
    found: dict[str, Coordinate] = {}
    for dimension, n in ((names.SAMPLE_DIM, n_samples), (names.TEST_DIM, n_tests)):
        found[dimension] = Coordinate(dimension, n, partial(np.arange, n))
    for dimension, label, own in (
        (names.SAMPLE_DIM, names.SAMPLE_LABEL, labels),
        (names.TEST_DIM, names.TEST_LABEL, test_labels),
    ):
        if own is not None and len(own) == found[dimension].n:
            found[label] = Coordinate(dimension, len(own), partial(np.asarray, own))
    return found


def coordinates_of_combined(combined: Combined) -> Coordinates:
    """Return the coordinates of all results that combine the same runs.

    Raises:
        StoreError: damaged.
    """
    return shared_coordinates(
        combined.labels(), combined.test_labels(), combined.n_samples, combined.n_tests
    )


def own_coordinates(result: str, columns: ResultColumns) -> Coordinates:
    """Return the coordinates of a result whose columns are not all test samples of the run.

    They are ids of test samples, or labels of means.
    """
    dimension = names.columns_dimension(result)
    if columns.by is not None:
        return {
            dimension: Coordinate(dimension, len(columns.names), partial(np.array, columns.names))
        }
    return {dimension: Coordinate(dimension, columns.n_columns, lambda: columns.ids)}


def write_coordinates(path: Path, wanted: Coordinates) -> None:
    """Write the missing and the wrong coordinates into the store at `path`, safe on the disk."""
    with brief_lock(path):
        for name, coordinate in wanted.items():
            if not _is_whole(path / name, coordinate):
                put_labels(path / name, coordinate.values(), coordinate.dimension)
                sync_tree(path / name)
        sync(path)


def wrong_coordinates(path: Path, wanted: Coordinates) -> Iterator[str]:
    """Return the names of existing coordinates with wrong content. Absent ones are no fault."""
    for name, coordinate in wanted.items():
        if (path / name).exists() and not _is_whole(path / name, coordinate):
            yield name


def coordinates_of(run: RunDirectory) -> Coordinates:
    """Return the coordinates of all complete results of a run.

    Where the recording or a result is damaged, its own coordinates are left out.
    """
    path = run.path / names.RELEVANCE
    found: dict[str, Coordinate] = {}
    with suppress(StoreError):
        recording = run.stages.get(RECORD)
        there = None if recording is None else committed(recording)
        if recording is not None and there is not None:
            gradients = open_gradients(run)
            found |= shared_coordinates(
                gradients.labels(names.TRAIN_LABELS),
                gradients.labels(names.TEST_LABELS),
                recording.count("n_samples"),
                there.n_tests,
            )
    for result in run.complete(COMBINE)[:1]:  # all results of a run combine the same samples
        with suppress(StoreError):
            found |= coordinates_of_combined(open_combined(run, result))
    for result in run.complete(REDUCE):
        with suppress(StoreError):
            array = open_relevance(path, result)
            if array.metadata.get("dimension_names", [])[1:] == [names.columns_dimension(result)]:
                found |= own_coordinates(result, columns_of(array))
    return found


def _is_whole(path: Path, wanted: Coordinate) -> bool:
    with suppress(StoreError):
        array = Array.open(path)
        if array.shape == (wanted.n,) and array.metadata.get("dimension_names") == [
            wanted.dimension
        ]:
            return bool(read_labels(array).tolist() == wanted.values().tolist())
    return False
