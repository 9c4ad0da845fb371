"""Whole shards appended to a Zarr array, file by file."""

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from hydra_pipe.store.arrays import CHUNKS, METADATA, Array, write_metadata
from hydra_pipe.store.files import remove, sync


class Appender:
    """Appends to an array whose first dimension grows. Its other dimension, if any, is within one shard.

    Args:
        array: of which this is the only writer.
    """

    def __init__(self, array: Array) -> None:
        self._array = array
        self._n_rows = array.shape[0]
        # rows that somebody counts on to be there after a power cut, see `sync`
        self._counted = 0

    def write(self, first: int, rows: NDArray[Any]) -> None:
        """Write `rows` from row `first` on, which begins a shard, and let the array end after them.

        A file appears whole or not at all, and before the shape that counts it. The last shard may be written again, longer.

        Raises:
            OSError: the disk is full or gone.
        """
        for start in range(0, len(rows), self.file_rows):
            row = first + start
            self._array.write_file(self._place(row), rows[start : start + self.file_rows], safely=row < self._counted)
        self._set_length(first + len(rows))

    @property
    def file_rows(self) -> int:
        """Rows of a file."""
        return self._array.file_rows

    def sync(self) -> None:
        """Return when every row is safe on the disk; from now on whatever replaces them is so too before it does."""
        for first in range(self._counted // self.file_rows * self.file_rows, self._n_rows, self.file_rows):
            file = self._array.file_path(self._place(first))
            sync(file)
            sync(file.parent)
        path = self._array.path
        # a rank may have no rows
        for part in (path / METADATA, *([path / CHUNKS] if self._n_rows else []), path):
            sync(part)
        self._counted = self._n_rows

    def truncate(self, n_rows: int) -> None:
        """Let the array end after `n_rows`, which somebody counts on. Rows past them may stay in the file of the last one."""
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
