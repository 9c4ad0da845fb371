"""Whole shards appended to a Zarr array, file by file.

The one place that writes array data without zarr: a training run waits for nothing as often as for its rows, and through zarr (with
either codec pipeline) a shard costs three to eight times the processor time of compressing and writing it (benchmarks/RESULTS.md).
The array's metadata are zarr's own; any Zarr v3 reader reads the result.
"""

import json
import os
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs import Blosc
from numpy.typing import NDArray
from zarr.storage import LocalStore

from hydra_pipe.store.arrays import BLOSC
from hydra_pipe.store.run import remove, sync

_ABSENT = np.uint64(2**64 - 1)


class Appender:
    """Appends to an array whose first dimension grows. Its other dimension, if any, is within one shard.

    Args:
        array: made by `create_array`, in a local store.
    """

    def __init__(self, array: zarr.Array[Any]) -> None:
        assert isinstance(array.store, LocalStore)
        self._path = Path(array.store.root) / array.path
        self._metadata = json.loads((self._path / "zarr.json").read_bytes())
        self._chunks, self._shards = array.chunks, array.shards
        self._dtype, self._fill = array.dtype.newbyteorder("<"), array.fill_value
        self._codec = Blosc(**BLOSC, shuffle=self._shuffle())
        # rows that somebody counts on to be there after a power cut, see `sync`
        self._counted = 0

    def _shuffle(self) -> int:
        codecs = self._metadata["codecs"]
        if self._shards is not None:
            codecs = codecs[0]["configuration"]["codecs"]
        name = next(c["configuration"]["shuffle"] for c in codecs if c["name"] == "blosc")
        return int(Blosc.NOSHUFFLE if name == "noshuffle" else Blosc.SHUFFLE)

    def write(self, first: int, rows: NDArray[Any]) -> None:
        """Write `rows` from row `first` on, which begins a shard, and let the array end after them.

        A file appears whole or not at all, and before the shape that counts it. The last shard may be written again, longer.

        Raises:
            OSError: the disk is full or gone.
        """
        for start in range(0, len(rows), self.file_rows):
            content = self._file(rows[start : start + self.file_rows])
            self._replace(self._file_at(first + start), content, safely=first + start < self._counted)
        self._set_length(first + len(rows))

    @property
    def file_rows(self) -> int:
        """Rows of a file."""
        return int((self._shards or self._chunks)[0])

    def sync(self) -> None:
        """Return when every row is safe on the disk; from now on whatever replaces them is so too before it does."""
        n_rows = self._metadata["shape"][0]
        for first in range(self._counted // self.file_rows * self.file_rows, n_rows, self.file_rows):
            file = self._file_at(first)
            sync(file)
            sync(file.parent)
        for path in (self._path / "zarr.json", self._path / "c", self._path):
            sync(path)
        self._counted = n_rows

    def truncate(self, n_rows: int) -> None:
        """Let the array end after `n_rows`, which somebody counts on. Rows past them may stay in the file of the last one."""
        self._counted = n_rows
        self._set_length(n_rows)
        for entry in (self._path / "c").iterdir():
            if not entry.name.isdecimal() or int(entry.name) * self.file_rows >= n_rows:
                remove(entry)

    def _file_at(self, row: int) -> Path:
        return self._path.joinpath("c", str(row // self.file_rows), *("0" for _ in self._chunks[1:]))

    def _set_length(self, n_rows: int) -> None:
        self._metadata["shape"][0] = n_rows
        self._replace(self._path / "zarr.json", json.dumps(self._metadata, indent=2).encode(), safely=self._counted > 0)

    def _file(self, rows: NDArray[Any]) -> list[bytes] | bytes:
        if self._shards is None:
            return b"".join(self._chunk(rows))
        grid = [shard // chunk for shard, chunk in zip(self._shards, self._chunks, strict=True)]
        index = np.full((*grid, 2), _ABSENT, "<u8")
        pieces: list[bytes] = []
        end = 0
        for at in np.ndindex(*grid):
            window = rows[tuple(slice(i * n, (i + 1) * n) for i, n in zip(at, self._chunks, strict=True))]
            if window.size:
                chunk = self._chunk(window)
                size = sum(map(len, chunk))
                index[at] = end, size
                end += size
                pieces += chunk
        table = index.tobytes()
        return [*pieces, table, _checksum(table)]

    def _chunk(self, window: NDArray[Any]) -> list[bytes]:
        """A chunk, filled up at the array's edges, and its checksum."""
        if window.shape != self._chunks:
            whole = np.full(self._chunks, self._fill, self._dtype)
            whole[tuple(map(slice, window.shape))] = window
            window = whole
        encoded = self._codec.encode(np.ascontiguousarray(window, self._dtype))
        return [encoded, _checksum(encoded)]

    @staticmethod
    def _replace(path: Path, content: list[bytes] | bytes, *, safely: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with open(partial, "wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            if safely:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)


def _checksum(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")
