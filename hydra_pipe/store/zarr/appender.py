"""Appending of whole shards to a Zarr array, file by file."""

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from hydra_pipe.store.files import remove, sync
from hydra_pipe.store.zarr.arrays import CHUNKS, METADATA, Array, write_metadata


class Appender:
    """Writer that appends rows to an array whose first dimension grows.

    The array's other dimension, if any, lies within one shard.

    Args:
        array: the array. The appender must be its only writer.
    """

    def __init__(self, array: Array) -> None:
        self._array = array
        self._n_rows = array.shape[0]
        # The first rows, which a caller relies on after a power cut. See `sync`.
        self._counted = 0

    def write(self, first: int, rows: NDArray[Any]) -> None:
        """Write `rows` from row `first` on, where a shard begins, and end the array after them.

        A file appears whole or not at all. It appears before the shape that counts it. The last
        shard may be written again, longer.

        Raises:
            OSError: the disk is full or gone.
        """
        for start in range(0, len(rows), self.file_rows):
            row = first + start
            self._array.write_file(
                self._place(row), rows[start : start + self.file_rows], safely=row < self._counted
            )
        self._set_length(first + len(rows))

    @property
    def file_rows(self) -> int:
        """Number of rows in a file."""
        return self._array.file_rows

    def sync(self) -> None:
        """Return when every row is safe on the disk.

        A later file that replaces one of these rows is made safe before it takes its place.
        """
        for first in range(
            self._counted // self.file_rows * self.file_rows, self._n_rows, self.file_rows
        ):
            file = self._array.file_path(self._place(first))
            sync(file)
            sync(file.parent)
        path = self._array.path
        # A rank may have no rows, and then has no directory of chunks.
        for part in (path / METADATA, *([path / CHUNKS] if self._n_rows else []), path):
            sync(part)
        self._counted = self._n_rows

    def truncate(self, n_rows: int) -> None:
        """End the array after `n_rows`, which a caller relies on.

        Later rows may stay in the file that holds the last row.
        """
        self._counted = n_rows
        self._set_length(n_rows)
        for entry in self._chunks.iterdir() if self._chunks.is_dir() else ():
            if not entry.name.isdecimal() or int(entry.name) * self.file_rows >= n_rows:
                remove(entry)

    @property
    def _chunks(self) -> Path:
        return self._array.path / CHUNKS

    def _place(self, row: int) -> tuple[int, ...]:
        return (row // self.file_rows, *(0 for _ in self._array.shape[1:]))

    def _set_length(self, n_rows: int) -> None:
        self._n_rows = self._array.metadata["shape"][0] = n_rows
        write_metadata(self._array.path, self._array.metadata, safely=self._counted > 0)
