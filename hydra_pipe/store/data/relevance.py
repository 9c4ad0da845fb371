"""`relevance.zarr`: one array (sample, test) for each method."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import StoreError, UsageError, shown
from hydra_pipe.plan.id_ranges import parse_selection, size_of, write_selection
from hydra_pipe.store import names
from hydra_pipe.store.files import is_remote, remove, remove_partials_of, sync, sync_tree
from hydra_pipe.store.json_parsing import is_count, is_plain
from hydra_pipe.store.run.locks import brief_lock
from hydra_pipe.store.run.results import BY_LABEL, GROUPINGS, ITSELF, MEAN, refuse_top
from hydra_pipe.store.zarr.arrays import METADATA, Array, Group, damage_named
from hydra_pipe.types import Span

RELEVANCE_UNREADABLE = (
    "the relevance is not readable: compute it again with hydra-pipe reduce --overwrite"
)
CHUNK_SAMPLES, CHUNK_TESTS = 4096, 64


_IN_WORDS = (names.METHOD, names.SIGN, names.UNIT)


@dataclass(frozen=True)
class ResultColumns:
    """Meaning of the columns of a relevance array.

    Args:
        tests: spans of test samples, in ascending order.
        by: grouping of the test samples. None: one column for each. "label" or "mean": their
            mean by label, or over all of them. "self": one column without test samples.
        names: names of the groups, if there are any: labels, or the one name "mean" or "self".
    """

    tests: tuple[Span, ...]
    by: str | None = None
    names: tuple[int | str, ...] = ()

    @property
    def n_tests(self) -> int:
        return size_of(self.tests)

    @property
    def n_columns(self) -> int:
        return self.n_tests if self.by is None else len(self.names)

    @property
    def ids(self) -> NDArray[np.int64]:
        """Ids of the test samples, or numbers of the groups. Shape (column,)."""
        if self.by is not None:
            return np.arange(self.n_columns)
        return self.test_ids

    @property
    def test_ids(self) -> NDArray[np.int64]:
        """Ids of the test samples. Shape (test,)."""
        return np.concatenate([np.arange(*span) for span in self.tests])

    def labels(self, test_labels: NDArray[Any] | None) -> NDArray[Any] | None:
        """Return the labels of the columns, shape (column,). None where there are none.

        Args:
            test_labels: labels of all test samples. None: unknown.

        Raises:
            StoreError: there are fewer labels than test samples.
        """
        if self.by in (MEAN, ITSELF):
            return None
        if self.by == BY_LABEL:
            named = any(isinstance(name, str) for name in self.names)
            return np.array(self.names, object if named else np.int64)
        if test_labels is not None and self.tests[-1][1] > len(test_labels):
            raise StoreError(
                f"there are columns of test samples up to {self.tests[-1][1] - 1}, and "
                f"{len(test_labels)} labels"
            )
        return None if test_labels is None else test_labels[self.test_ids]

    def to_attributes(self) -> dict[str, Any]:
        """Return the attributes of the array that hold these columns."""
        grouping = (
            {} if self.by is None else {names.BY: self.by, names.LABEL_NAMES: list(self.names)}
        )
        return (
            grouping if self.by == ITSELF else {names.TESTS: write_selection(self.tests)} | grouping
        )


def spans_of(ids: NDArray[np.int64]) -> tuple[Span, ...]:
    """Return the spans of ids that are in ascending order, each once."""
    starts = np.flatnonzero(np.diff(ids, prepend=-2) != 1)
    ends = [*starts[1:].tolist(), len(ids)]
    return tuple(
        (int(ids[first]), int(ids[last - 1]) + 1)
        for first, last in zip(starts.tolist(), ends, strict=True)
    )


def write_group(path: Path, run_id: str) -> None:
    """Write the group of all results, if it is missing or not as it should be."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)
    with brief_lock(path):
        remove_partials_of(path / METADATA)
        if not group_is_whole(path, run_id):
            Group.create(
                path,
                _identity(run_id) | {names.COORDINATES: f"{names.SAMPLE_LABEL} {names.TEST_LABEL}"},
            )


def group_is_whole(path: Path, run_id: str) -> bool:
    """Tell whether the group is as `write_group` makes it."""
    try:
        found = Group.open(path, "").attributes
        return all(found.get(name) == value for name, value in _identity(run_id).items())
    except StoreError:
        return False


def _identity(run_id: str) -> dict[str, Any]:
    return {names.KIND: "relevance", names.RUN_ID: run_id}


def create_relevance(
    path: Path,
    name: str,
    attributes: dict[str, str],
    n_samples: int,
    columns: ResultColumns,
    width: int,
    run_id: str,
    *,
    whole: bool = True,
) -> Array:
    """Create a float32 array, dimensions (sample, test) or (sample, its own columns).

    The array has no data. It is safe on the disk when this returns.

    Args:
        path: path of the store.
        name: name of the array.
        attributes: method, sign and unit, in words.
        n_samples: number of training samples.
        columns: meaning of the array's columns.
        width: number of columns that are written together. No chunk is written in two pieces.
        run_id: id of the run.
        whole: True if the columns are all test samples of the run. All such results share a
            dimension.
    """
    write_group(path, run_id)
    remove(path / name)
    chunks = (chunk_samples(n_samples), min(CHUNK_TESTS, width))
    is_shared = whole and columns.by is None
    dimensions = (names.SAMPLE_DIM, names.TEST_DIM if is_shared else names.columns_dimension(name))
    shape = (n_samples, columns.n_columns)
    array = Array.create(
        path / name,
        shape,
        "float32",
        dimensions,
        chunks,
        attributes=attributes | columns.to_attributes(),
    )
    sync_tree(array.path)
    for part in (path / METADATA, path, path.parent):
        sync(part)
    return array


def chunk_samples(n_samples: int) -> int:
    """Return the number of samples in a chunk."""
    return min(CHUNK_SAMPLES, n_samples)


def columns_of(array: Array) -> ResultColumns:
    """Return the meaning of the columns of `array`.

    Raises:
        StoreError: the array's attributes are damaged.
    """
    return parse_columns(array.path, array.attributes, array.shape[1])


def parse_columns(path: Path, found: Mapping[str, Any], n_columns: int) -> ResultColumns:
    """Return the meaning of columns from the attributes that `to_attributes` made.

    Args:
        path: path of the array or group that has the attributes.
        found: the attributes.
        n_columns: number of columns.

    Raises:
        StoreError: the attributes are damaged.
    """
    try:
        by = found.get(names.BY)
        # The number of test samples is unknown here, so no id is refused as too large.
        tests = () if by == ITSELF else parse_selection(found[names.TESTS], sys.maxsize)
        if by not in (None, *GROUPINGS, ITSELF) or not all(
            isinstance(found[name], str) for name in _IN_WORDS
        ):
            raise ValueError(
                f"means by {shown(by)} of method {shown(found[names.METHOD])} in "
                f"{shown(found[names.UNIT])}"
            )
        columns = ResultColumns(tests, by, _group_names(found[names.LABEL_NAMES]) if by else ())
        if columns.n_columns != n_columns:
            raise ValueError(f"attributes for {columns.n_columns} columns")
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
        raise StoreError(f"{path} is damaged ({shown(error)}): {RELEVANCE_UNREADABLE}") from error
    return columns


def _group_names(found: Any) -> tuple[int | str, ...]:
    """Return names of one type: all strings, or all integers that a label can be.

    Raises:
        ValueError: `found` is anything else.
    """
    if isinstance(found, list) and (
        all(isinstance(n, str) for n in found) or all(is_count(abs(n)) for n in found)
    ):
        return tuple(found)
    raise ValueError(f"groups called {shown(found)}")


def open_relevance(path: Path, name: str) -> Array:
    """Open the array `name`.

    Raises:
        UsageError: the result has the top samples alone.
        StoreError: missing or damaged.
    """
    refuse_top(name)
    if not is_plain(name):
        raise StoreError(
            f"{path} has no array called {shown(name)}: names are of letters, digits, - and _"
        )
    Group.open(path, RELEVANCE_UNREADABLE)
    return open_array(path / name)


def open_array(path: Path) -> Array:
    """Open the array at `path`, whatever the state of its group.

    Raises:
        StoreError: missing or damaged.
    """
    array = Array.open(path)
    # A reader decodes whole chunks. The chunks of hydra-pipe are small, so larger ones are refused.
    if (
        len(array.shape) != 2
        or array.dtype != np.float32
        or array.chunks[0] > CHUNK_SAMPLES
        or array.chunks[1] > CHUNK_TESTS
    ):
        raise StoreError(f"{array.path} is not as hydra-pipe writes it: {RELEVANCE_UNREADABLE}")
    return array


def write_relevance(array: Array, first_sample: int, first_test: int, values: NDArray[Any]) -> None:
    """Write a block of pairs, safe on the disk.

    The block begins chunks. It ends chunks too, except at the array's edges.
    """
    rows, columns = array.chunks
    for low in range(0, values.shape[0], rows):
        for left in range(0, values.shape[1], columns):
            at = ((first_sample + low) // rows, (first_test + left) // columns)
            array.write_file(at, values[low : low + rows, left : left + columns], safely=True)


def read_relevance(array: Array, tests: slice) -> NDArray[np.float32]:
    """Return the columns of some test samples, shape (sample, test).

    Raises:
        StoreError: damaged.
    """
    with damage_named(array.path, RELEVANCE_UNREADABLE):
        return array.read(slice(None), tests)


def read_columns(array: Array, samples: slice, tests: slice) -> NDArray[np.float32]:
    """Return a block, transposed: shape (test, sample), contiguous.

    Raises:
        StoreError: damaged.
    """
    with damage_named(array.path, RELEVANCE_UNREADABLE):
        return array.read(samples, tests, transposed=True).T
