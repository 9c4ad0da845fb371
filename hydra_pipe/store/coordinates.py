"""Coordinates of `relevance.zarr`: arrays that tell a reader such as xarray which sample, test sample or mean a row or column is.

hydra-pipe itself reads none of them: what they say is in the recording and in the attributes of each result.
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
from hydra_pipe.store.arrays import Array
from hydra_pipe.store.files import sync, sync_tree
from hydra_pipe.store.gradients import Gradients, read_labels
from hydra_pipe.store.locks import brief_lock
from hydra_pipe.store.prefix import committed, open_gradients
from hydra_pipe.store.relevance import Columns, columns_of, open_relevance
from hydra_pipe.store.run import RunDirectory
from hydra_pipe.store.stages import RECORD, REDUCE
from hydra_pipe.store.writing import put_labels


@dataclass(frozen=True)
class Coordinate:
    """What an array of coordinates says.

    Args:
        dimension: of it.
        n: values.
        values: makes them, shape (n,): a stranger's manifest may say any number, and what is there is looked at before.
    """

    dimension: str
    n: int
    values: Callable[[], NDArray[Any]]


# by the name of the array
Coordinates = Mapping[str, Coordinate]


def shared_coordinates(gradients: Gradients, n_samples: int, n_tests: int) -> Coordinates:
    """Those of all results of a recording: ids, and labels where they are known."""
    found: dict[str, Coordinate] = {}
    for dimension, n in ((names.SAMPLE_DIM, n_samples), (names.TEST_DIM, n_tests)):
        found[dimension] = Coordinate(dimension, n, partial(np.arange, n))
    for dimension, label, which in (
        (names.SAMPLE_DIM, names.SAMPLE_LABEL, names.TRAIN_LABELS),
        (names.TEST_DIM, names.TEST_LABEL, names.TEST_LABELS),
    ):
        labels = gradients.labels(which)
        if labels is not None and len(labels) == found[dimension].n:
            found[label] = Coordinate(dimension, len(labels), partial(np.asarray, labels))
    return found


def own_coordinates(result: str, columns: Columns) -> Coordinates:
    """Those of the columns of one result that are not all test samples of the run: ids of tests, or labels of means."""
    dimension = names.columns_dimension(result)
    if columns.by is not None:
        return {dimension: Coordinate(dimension, len(columns.names), partial(np.array, columns.names))}
    return {dimension: Coordinate(dimension, columns.n_columns, lambda: columns.ids)}


def write_coordinates(path: Path, wanted: Coordinates) -> None:
    """Write into the store at `path` what of `wanted` is not there as it should be, safe on the disk."""
    with brief_lock(path):
        for name, coordinate in wanted.items():
            if not _is_whole(path / name, coordinate):
                put_labels(path / name, coordinate.values(), coordinate.dimension)
                sync_tree(path / name)
        sync(path)


def wrong_coordinates(path: Path, wanted: Coordinates) -> Iterator[str]:
    """Those that are there and do not say what they should. They may be absent."""
    for name, coordinate in wanted.items():
        if (path / name).exists() and not _is_whole(path / name, coordinate):
            yield name


def coordinates_of(run: RunDirectory) -> Coordinates:
    """Those of all complete results of a run. Where the recording, or a result, is damaged, its own are left out."""
    path = run.path / names.RELEVANCE
    found: dict[str, Coordinate] = {}
    with suppress(StoreError):
        recording = run.stages.get(RECORD)
        there = None if recording is None else committed(recording)
        if recording is not None and there is not None:
            found |= shared_coordinates(open_gradients(run), recording.count("n_samples"), there.n_tests)
    for result in run.complete(REDUCE):
        with suppress(StoreError):
            array = open_relevance(path, result)
            if array.metadata.get("dimension_names", [])[1:] == [names.columns_dimension(result)]:
                found |= own_coordinates(result, columns_of(array))
    return found


def _is_whole(path: Path, wanted: Coordinate) -> bool:
    with suppress(StoreError):
        array = Array.open(path)
        if array.shape == (wanted.n,) and array.metadata.get("dimension_names") == [wanted.dimension]:
            return bool(read_labels(array).tolist() == wanted.values().tolist())
    return False
