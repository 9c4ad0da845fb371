"""`combined/RESULT.zarr`: what combining runs has found beside the mean, and whose samples it is.

The mean itself is the array RESULT of `relevance.zarr`, as of any reduction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import StoreError
from hydra_pipe.maths.ensembles import ColumnSpread
from hydra_pipe.progress import Progress
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients import read_labels
from hydra_pipe.store.data.gradients_writer import put_labels
from hydra_pipe.store.data.keys import Keys, put_keys
from hydra_pipe.store.data.relevance import (
    CHUNK_SAMPLES,
    CHUNK_TESTS,
    chunk_samples,
    write_relevance,
)
from hydra_pipe.store.data.rows import check_kind, read_array
from hydra_pipe.store.files import sync_tree
from hydra_pipe.store.run.listing import listed
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import COMBINE
from hydra_pipe.store.zarr.arrays import Array, Group
from hydra_pipe.types import F32, F64, I64, U8

COMBINED_UNREADABLE = "combine the runs again with hydra-pipe combine --overwrite"
# A sample or a column that a run does not have.
ABSENT = -1
# Numbers in a file of the arrays that have a row for each run.
_FILE_NUMBERS = 2**20
_KIND = "combined"


@dataclass(frozen=True)
class PairSpread:
    """Spread of the runs about their mean, for some pairs.

    Attributes:
        standard_error: standard error of the mean, float32 (pair,). Not a number where fewer than
            two runs have the pair.
        agreeing: number of runs whose value has the sign of the mean, uint8 (pair,).
        runs: number of runs that have the pair, int64 (pair,).
    """

    standard_error: F32
    agreeing: U8
    runs: I64


@dataclass(frozen=True)
class Contents:
    """Facts of a combination that are known before any relevance is read.

    Args:
        rows: row of each sample in the result of each run, int64 (run, sample). -1: none.
        columns: column of each column in the result of each run, int64 (run, column). -1: none.
        visits: number of steps that used each sample, over all runs, int64 (sample,).
        test_losses: mean loss of each test sample over the runs, float32 (test,). Not a number
            where unknown.
        in_first: 1 for each test sample that the first run has, else 0, uint8 (test,).
        labels, test_labels: labels of samples and of test samples. None: unknown.
        keys, test_keys: keys of samples and of test samples. None: they have none.
    """

    rows: I64
    columns: I64
    visits: I64
    test_losses: F32
    in_first: U8
    labels: NDArray[Any] | None
    test_labels: NDArray[Any] | None
    keys: Sequence[str] | None
    test_keys: Sequence[str] | None


class Combined:
    """A combination of runs, opened for reading. Its samples are a `ResultSamples`.

    Args:
        path: path of the store.
        run_id: id of the run.
        listed: function that tells by its name whether an array belongs to the store. None: every
            one that exists belongs.

    Raises:
        StoreError: the store is missing or damaged, or belongs to another run.
    """

    gradients = None

    def __init__(self, path: Path, run_id: str, listed: Any = None) -> None:
        self.path = path
        self._root = Group.open(path, COMBINED_UNREADABLE, listed)
        found = self._root.attributes
        if (found.get(names.KIND), found.get(names.RUN_ID)) != (_KIND, run_id):
            raise StoreError(f"{path} is no combination of this run: {COMBINED_UNREADABLE}")
        self._rows = self._array(names.ROWS, "int64", 2)
        self._columns = self._array(names.COLUMNS, "int64", 2)
        self._losses = self._array(names.TEST_LOSS, "float32", 1)

    @property
    def n_runs(self) -> int:
        """Number of runs."""
        return self._rows.shape[0]

    @property
    def n_samples(self) -> int:
        return self._rows.shape[1]

    @property
    def n_columns(self) -> int:
        """Number of columns."""
        return self._columns.shape[1]

    @property
    def n_tests(self) -> int:
        return self._losses.shape[0]

    def labels(self) -> NDArray[Any] | None:
        return self._labels(names.TRAIN_LABELS)

    def test_labels(self) -> NDArray[Any] | None:
        return self._labels(names.TEST_LABELS)

    def keys(self) -> Keys | None:
        return self._keys(names.TRAIN_KEYS)

    def test_keys(self) -> Keys | None:
        return self._keys(names.TEST_KEYS)

    def test_losses(self) -> F32:
        found: F32 = read_array(self._losses, consequence=COMBINED_UNREADABLE)
        return found

    def visits(self, progress: Progress) -> I64:
        found: I64 = self._read(names.VISITS, "int64")
        return found

    def spread_of(self, samples: I64, columns: I64) -> PairSpread:
        """Return the spread of some pairs. Their chunks are read one after the other.

        Args:
            samples, columns: sample and column of each pair, shape (pair,). The columns should be
                near each other.

        Raises:
            StoreError: damaged.
        """
        found = PairSpread(
            np.empty(len(samples), np.float32),
            np.empty(len(samples), np.uint8),
            np.empty(len(samples), np.int64),
        )
        order = np.argsort(samples // CHUNK_SAMPLES, kind="stable")
        cuts = np.flatnonzero(np.diff(samples[order] // CHUNK_SAMPLES)) + 1
        for pairs in np.split(order, cuts) if len(order) else []:
            rows, places = (
                slice(int(values[pairs].min()), int(values[pairs].max()) + 1)
                for values in (samples, columns)
            )
            at = samples[pairs] - rows.start, columns[pairs] - places.start
            found.standard_error[pairs] = self._window(self.standard_error, rows, places)[at]
            found.agreeing[pairs] = self._window(self.agreeing, rows, places)[at]
            of_samples = self._window(self._rows, slice(None), rows) >= 0
            of_columns = self._window(self._columns, slice(None), places) >= 0
            found.runs[pairs] = (of_samples[:, at[0]] & of_columns[:, at[1]]).sum(axis=0)
        return found

    @property
    def has_others_than_first(self) -> bool:
        """True if the first run lacks samples or tests of the others."""
        first = read_array(self._rows, slice(0, 1), consequence=COMBINED_UNREADABLE)
        tests = self._read(names.IN_FIRST, "uint8")
        return bool((first < 0).any() or (tests == 0).any())

    def column_facts(self) -> dict[str, F64]:
        """Return facts of the columns by name, each of shape (column,)."""
        return {name: self._read(name, "float64") for name in COLUMN_FACTS}

    def scales(self) -> F64:
        """Return the root mean square of each column in each run, shape (run, column)."""
        array = self._array(names.ROOT_MEAN_SQUARE, "float64", 2)
        found: F64 = read_array(array, consequence=COMBINED_UNREADABLE)
        return found

    @property
    def standard_error(self) -> Array:
        """The array of standard errors, float32 (sample, column)."""
        return self._array(names.STANDARD_ERROR, "float32", 2)

    @property
    def agreeing(self) -> Array:
        """The array of numbers of agreeing runs, uint8 (sample, column)."""
        return self._array(names.AGREEING, "uint8", 2)

    def arrays(self) -> list[tuple[str, Array]]:
        """Return every array with its name."""
        return [(name, self._root.array(name)) for name in self._root.array_names()]

    def check(self) -> None:
        """Compare shapes with each other, and with the files. Reads no values.

        Raises:
            StoreError: a shape is wrong, or files are missing.
        """
        pairs = (self.n_samples, self.n_columns)
        wanted: dict[str, tuple[int, ...]] = {
            names.STANDARD_ERROR: pairs,
            names.AGREEING: pairs,
            names.ROWS: (self.n_runs, self.n_samples),
            names.COLUMNS: (self.n_runs, self.n_columns),
            names.ROOT_MEAN_SQUARE: (self.n_runs, self.n_columns),
            names.VISITS: (self.n_samples,),
            names.TEST_LOSS: (self.n_tests,),
            names.IN_FIRST: (self.n_tests,),
            **dict.fromkeys(COLUMN_FACTS, (self.n_columns,)),
        }
        lengths = {names.TRAIN_LABELS: self.n_samples, names.TEST_LABELS: self.n_tests}
        lengths |= {names.TRAIN_KEYS: self.n_samples, names.TEST_KEYS: self.n_tests}
        for name, array in self.arrays():
            shape = wanted.pop(name, array.shape)
            n = lengths.get(name.removeprefix(f"{names.LABELS}/"), array.shape[0])
            fault = (
                f"has shape {array.shape}, not {shape}"
                if array.shape != shape or array.shape[0] != n
                else array.shortfall()
            )
            if fault is not None:
                raise StoreError(f"{array.path} {fault}: {COMBINED_UNREADABLE}")
        if wanted:
            raise StoreError(f"{self.path / min(wanted)} is missing: {COMBINED_UNREADABLE}")

    def _labels(self, which: str) -> NDArray[Any] | None:
        group = self._root.group(names.LABELS)
        return None if group is None or not group.has(which) else read_labels(group.array(which))

    def _keys(self, which: str) -> Keys | None:
        group = self._root.group(names.LABELS)
        return None if group is None or not group.has(which) else Keys(group.array(which))

    def _window(self, array: Array, *window: slice) -> NDArray[Any]:
        return read_array(array, *window, consequence=COMBINED_UNREADABLE)

    def _read(self, name: str, dtype: str) -> Any:
        return read_array(self._array(name, dtype, 1), consequence=COMBINED_UNREADABLE)

    def _array(self, name: str, dtype: str, dimensions: int) -> Array:
        array = self._root.array(name)
        width = array.shape[1] if dimensions == 2 and len(array.shape) == 2 else None
        check_kind(array, (dtype,), width, COMBINED_UNREADABLE)
        # A reader decodes whole chunks. The chunks of pairs are small, so larger ones are refused.
        is_small = array.chunks[0] <= CHUNK_SAMPLES and array.chunks[-1] <= CHUNK_TESTS
        if name in (names.STANDARD_ERROR, names.AGREEING) and not is_small:
            raise StoreError(f"{array.path} has large chunks: {COMBINED_UNREADABLE}")
        return array


# Facts of a column: mean cosine of the columns of two runs, and as many independent runs as the
# mean is worth.
COLUMN_FACTS = (names.COSINE, names.EFFECTIVE_RUNS)


def open_combined(run: RunDirectory, result: str) -> Combined:
    """Open the combination of the result `result`, with an absolute path.

    Raises:
        StoreError: the combination is damaged.
    """
    stage = COMBINE.of(result)
    found = Combined(run.path.absolute() / stage.area, run.run_id, listed(run, stage))
    found.check()
    return found


def create_combined(
    path: Path, attributes: Mapping[str, Any], contents: Contents, width: int
) -> None:
    """Create the store at `path`, with all that is known of it beforehand.

    Args:
        path: path of the store. A store that was there must have been removed.
        attributes: attributes of the store.
        contents: all that is known.
        width: number of columns that are written together. No chunk is written in two pieces.
    """
    n_samples, n_columns = contents.rows.shape[1], contents.columns.shape[1]
    root = Group.create(path, {names.KIND: _KIND, **attributes})
    chunks = chunk_samples(n_samples), min(CHUNK_TESTS, width)
    for name, dtype in ((names.STANDARD_ERROR, "float32"), (names.AGREEING, "uint8")):
        dimensions = names.SAMPLE_DIM, names.COLUMN_DIM
        Array.create(path / name, (n_samples, n_columns), dtype, dimensions, chunks)
    by_run = names.RUN_DIM, names.COLUMN_DIM
    shape = contents.columns.shape
    Array.create(path / names.ROOT_MEAN_SQUARE, shape, "float64", by_run, (1, chunks[1]))
    for name in COLUMN_FACTS:
        Array.create(path / name, (n_columns,), "float64", (names.COLUMN_DIM,), chunks[1:])
    for name, values, dimension in (
        (names.ROWS, contents.rows, names.SAMPLE_DIM),
        (names.COLUMNS, contents.columns, names.COLUMN_DIM),
    ):
        _put_by_run(path / name, values, dimension)
    _put(path / names.VISITS, contents.visits, names.SAMPLE_DIM)
    _put(path / names.TEST_LOSS, contents.test_losses, names.TEST_LABEL_DIM)
    _put(path / names.IN_FIRST, contents.in_first, names.TEST_LABEL_DIM)
    labels = root.require_group(names.LABELS).path
    for which, of_samples, dimension in (
        (names.TRAIN_LABELS, contents.labels, names.SAMPLE_DIM),
        (names.TEST_LABELS, contents.test_labels, names.TEST_LABEL_DIM),
    ):
        if of_samples is not None:
            put_labels(labels / which, of_samples, dimension)
    for which, keys, dimension in (
        (names.TRAIN_KEYS, contents.keys, names.SAMPLE_DIM),
        (names.TEST_KEYS, contents.test_keys, names.TEST_LABEL_DIM),
    ):
        if keys is not None:
            put_keys(labels / which, keys, dimension)
    sync_tree(path)


def write_block(path: Path, first: int, spreads: Sequence[ColumnSpread], scales: F64) -> None:
    """Write what was found of a block of columns, safe on the disk.

    Args:
        path: path of the store.
        first: number of the first column. The block begins chunks. It ends chunks too, except at
            the array's edge.
        spreads: the columns.
        scales: root mean square of each column in each run, shape (run, column).
    """
    errors = np.stack([one.standard_error for one in spreads], axis=1).astype(np.float32)
    write_relevance(Array.open(path / names.STANDARD_ERROR), 0, first, errors)
    agreeing = np.stack([one.agreeing for one in spreads], axis=1)
    write_relevance(Array.open(path / names.AGREEING), 0, first, agreeing)
    write_relevance(Array.open(path / names.ROOT_MEAN_SQUARE), 0, first, scales)
    for name in COLUMN_FACTS:
        array = Array.open(path / name)
        values = np.array([getattr(one, name) for one in spreads])
        for low in range(0, len(values), width := array.chunks[0]):
            place = ((first + low) // width,)
            array.write_file(place, values[low : low + width], safely=True)


def _put_by_run(path: Path, values: NDArray[Any], dimension: str) -> None:
    n_runs, n = values.shape
    width = max(1, min(n, _FILE_NUMBERS))
    array = Array.create(path, values.shape, values.dtype, (names.RUN_DIM, dimension), (1, width))
    for run in range(n_runs):
        for number, first in enumerate(range(0, n, width)):
            array.write_file((run, number), values[run : run + 1, first : first + width])


def _put(path: Path, values: NDArray[Any], dimension: str) -> None:
    n = max(1, min(len(values), _FILE_NUMBERS))
    array = Array.create(path, values.shape, values.dtype, (dimension,), (n,))
    for number, first in enumerate(range(0, len(values), n)):
        array.write_file((number,), values[first : first + n])
