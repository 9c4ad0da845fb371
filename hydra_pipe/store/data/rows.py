"""Stored rows, for reading: the rows of one process, or of several, one after the other."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import StoreError
from hydra_pipe.plan.rank_rows import ends_of, split
from hydra_pipe.store import names
from hydra_pipe.store.zarr.arrays import Array, Group, damage_named
from hydra_pipe.store.zarr.codec import StoredFile
from hydra_pipe.streams import Stream
from hydra_pipe.types import U8

ROWS_UNREADABLE = "the recording is not readable: record the run again with --overwrite"
ROW_DTYPES = ("float16", "int8", "float32")


@dataclass(frozen=True)
class Piece:
    """Some rows that are read together.

    Args:
        rows: the rows, as a slice of all rows.
        read: function of (first column, last column) that returns the stored values. They are
            in a buffer that the next read overwrites.
    """

    rows: slice
    read: Callable[[int, int], NDArray[Any]]


class _Window:
    """Decoder of windows into one buffer. A window that is in the buffer is not decoded again."""

    def __init__(self, dtype: np.dtype[Any], consequence: str) -> None:
        self._buffer, self._consequence = np.empty(0, dtype), consequence
        self._scratch: list[NDArray[Any]] = []
        self._held: tuple[StoredFile, slice, int, int] | None = None

    def read(
        self, array: Array, file: StoredFile, rows: slice, left: int, right: int
    ) -> NDArray[Any]:
        n, width = rows.stop - rows.start, right - left
        if self._buffer.size < n * width:
            self._buffer = np.empty(n * width, self._buffer.dtype)
        out = self._buffer[: n * width].reshape(n, width)
        if self._held != (file, rows, left, right):
            self._held = None
            with damage_named(array.path, self._consequence):
                file.read((rows, slice(left, right)), out, self._scratch)
            self._held = (file, rows, left, right)
        return out


class Rows:
    """Stored rows of one kind: training rows, or the test gradients of one checkpoint.

    Values are read only on request.

    Args:
        groups: groups that hold the rows. The rows of the first group come first.
        n_features, n_blocks: numbers of features and of blocks of a row.
        part_rows: number of rows of each group to use, from the first. None: all.
        consequence: meaning of damage, for messages.

    Raises:
        StoreError: an array is missing or damaged, has fewer rows, or is not of this kind.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        n_features: int,
        n_blocks: int,
        part_rows: tuple[int, ...] | None = None,
        consequence: str = ROWS_UNREADABLE,
    ) -> None:
        self._consequence = consequence
        self._gradients = [group.array(names.GRADIENT) for group in groups]
        self._scales = [group.array(names.SCALE) for group in groups]
        self._first = self._gradients[0]
        for gradient, scale in zip(self._gradients, self._scales, strict=True):
            check_kind(gradient, ROW_DTYPES, n_features, consequence)
            check_kind(scale, ("float32",), n_blocks, consequence)
            if not gradient.files_hold_rows or not gradient.stored_like(self._first):
                raise StoreError(
                    f"{gradient.path} has files in which rows are cut, or differ from rows of "
                    f"other files: {consequence}"
                )
        there = tuple(array.shape[0] for array in self._gradients)
        self.part_rows = there if part_rows is None else part_rows
        if len(self.part_rows) != len(there) or any(
            n > has for n, has in zip(self.part_rows, there, strict=True)
        ):
            raise StoreError(
                f"{self._first.path} and what is beside it have {there} rows, not "
                f"{self.part_rows}: {consequence}"
            )

    @property
    def n_rows(self) -> int:
        return sum(self.part_rows)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._first.dtype

    @property
    def shard_rows(self) -> int:
        return self._first.file_rows

    @property
    def chunk_rows(self) -> int:
        return self._first.chunks[0]

    @property
    def chunk_features(self) -> int:
        return self._first.chunks[1]

    def end_of_file(self, row: int) -> int:
        """Return one past the last row of the file that holds `row`."""
        ends = [0, *ends_of(self.part_rows)]
        part = next(i for i, end in enumerate(ends[1:]) if row < end)
        return min(
            ends[part] + ((row - ends[part]) // self.shard_rows + 1) * self.shard_rows,
            ends[part + 1],
        )

    def stream(
        self, run: tuple[int, int], at_once: int, only: NDArray[np.int64] | None = None
    ) -> Stream[Piece]:
        """Read the rows of `run` in order, in pieces of at most `at_once` rows.

        No piece has rows of two files. A piece must be used before the next one is asked for. A
        thread fetches the next file while the caller works on the present one, so two files are in
        memory. The caller closes the stream.

        Args:
            run: first and one past the last row.
            at_once: the most rows of a piece.
            only: ascending rows. A file with none of them is left out. None: no file is.

        Raises:
            StoreError: damaged.
        """
        pool = ThreadPoolExecutor(1, "hydra-pipe reader")
        return Stream(
            self._pieces(run, at_once, only, pool), partial(pool.shutdown, cancel_futures=True)
        )

    def _pieces(
        self,
        run: tuple[int, int],
        at_once: int,
        only: NDArray[np.int64] | None,
        pool: ThreadPoolExecutor,
    ) -> Iterator[Piece]:
        files = [
            (part, start, max(first - start, 0), min(last - start, self.shard_rows))
            for part, first, last in split(run, ends_of(self.part_rows))
            for start in range(first // self.shard_rows * self.shard_rows, last, self.shard_rows)
        ]
        ends = [0, *ends_of(self.part_rows)]
        if only is not None:
            files = [
                file
                for file in files
                if has_any(
                    only, ends[file[0]] + file[1] + file[2], ends[file[0]] + file[1] + file[3]
                )
            ]
        window = _Window(self.dtype, self._consequence)

        def fetch(number: int) -> Future[U8] | None:
            if number >= len(files):
                return None
            part, start, _, _ = files[number]
            return pool.submit(self._gradients[part].fetch, (start // self.shard_rows, 0))

        coming = fetch(0)
        for number, (part, start, low, high) in enumerate(files):
            array = self._gradients[part]
            assert coming is not None
            with damage_named(array.path, self._consequence):
                file = StoredFile(coming.result(), array.codec)
            coming = fetch(number + 1)
            for first in range(low, high, at_once):
                last = min(first + at_once, high)
                base = ends[part] + start
                yield Piece(
                    slice(base + first, base + last),
                    partial(window.read, array, file, slice(first, last)),
                )

    def features(self, rows: slice, columns: slice) -> NDArray[Any]:
        """Return stored values of some rows and columns, in the stored dtype.

        Raises:
            StoreError: damaged.
        """
        return joined(
            lambda part, own: self._read(self._gradients[part], own, columns), rows, self.part_rows
        )

    def scales(self, rows: slice) -> NDArray[np.float32]:
        """Return scales of some rows, shape (row, block). Raises: StoreError: damaged."""
        return joined(lambda part, own: self._read(self._scales[part], own), rows, self.part_rows)

    def _read(self, array: Array, *window: slice) -> NDArray[Any]:
        return read_array(array, *window, consequence=self._consequence)


def has_any(rows: NDArray[np.int64], first: int, last: int) -> bool:
    """Tell whether any of the ascending `rows` is in [first, last)."""
    return bool(np.searchsorted(rows, first) < np.searchsorted(rows, last))


def joined(
    read: Callable[[int, slice], NDArray[Any]], rows: slice, part_rows: Sequence[int]
) -> NDArray[Any]:
    """Return some rows of all parts, in order.

    Args:
        read: function of (part, rows within the part) that returns those rows.
        rows: rows to return, counted through all parts.
        part_rows: number of rows of each part.
    """
    first, last, _ = rows.indices(sum(part_rows))
    found = [read(part, slice(*own)) for part, *own in split((first, last), ends_of(part_rows))]
    if len(found) == 1:
        return found[0]
    return np.concatenate(found) if found else read(0, slice(0, 0))


def check_kind(
    array: Array, dtypes: Sequence[str], width: int | None, consequence: str = ROWS_UNREADABLE
) -> None:
    """Refuse an array of another dtype or width than it is read as.

    Args:
        array: the array.
        dtypes: names of the dtypes that are accepted.
        width: number of values a row. None: one value a row, in one dimension.
        consequence: meaning of a fault, for the message.

    Raises:
        StoreError: the dtype or the width is another.
    """
    if array.dtype.name not in dtypes or array.shape[1:] != (() if width is None else (width,)):
        raise StoreError(
            f"{array.path} has {array.dtype.name} values of shape {array.shape}, not "
            f"{' or '.join(dtypes)} "
            f"{'one' if width is None else width} a row: {consequence}"
        )


def check_within(values: NDArray[np.int64], n: int, what: str) -> None:
    """Refuse ids outside 0 to `n` - 1. Raises: StoreError."""
    if values.size and not 0 <= values.min() <= values.max() < n:
        raise StoreError(
            f"{what} are {values.min()} to {values.max()}, not within 0 to {n - 1}: "
            f"{ROWS_UNREADABLE}"
        )


def read_array(array: Array, *window: slice, consequence: str = ROWS_UNREADABLE) -> NDArray[Any]:
    """Return the values of a window of one array.

    Raises:
        StoreError: damaged. The message adds `consequence`.
    """
    with damage_named(array.path, consequence):
        return array.read(*window)
