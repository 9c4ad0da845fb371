"""Stored rows, for reading: those of one process, or of several one after the other."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from hydra_pipe.plan.parts import ends_of, pieces, split
from hydra_pipe.store import names
from hydra_pipe.store.arrays import damage_named, get_array, read_checked

ROWS_UNREADABLE = "the recording is not readable: record the run again with --overwrite"


@dataclass(frozen=True)
class _StoredRows:
    """Arrays of the rows that one process wrote: `gradient` (row, feature), twice, see `read_checked`; `scale` (row, block)."""

    gradient: zarr.Array[Any]
    gradient_fast: zarr.Array[Any]
    scale: zarr.Array[Any]


class Rows:
    """Stored rows of one kind: training rows, or the test gradients of one checkpoint. Reads nothing before it is asked.

    Args:
        groups: that hold them; the rows of the first come first.

    Raises:
        StoreError: an array is missing or damaged.
    """

    def __init__(self, groups: Sequence[zarr.Group]) -> None:
        self._parts = [
            _StoredRows(
                get_array(group, names.GRADIENT), get_array(group, names.GRADIENT, fast=True), get_array(group, names.SCALE)
            )
            for group in groups
        ]
        self._first = self._parts[0].gradient
        self.part_rows = tuple(int(part.gradient.shape[0]) for part in self._parts)

    @property
    def n_rows(self) -> int:
        return sum(self.part_rows)

    @property
    def widths(self) -> set[int]:
        """Features of a row, in every part; one number unless the store is damaged."""
        return {part.gradient.shape[-1] if part.gradient.ndim == 2 else 0 for part in self._parts}

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self._first.dtype)

    @property
    def shard_rows(self) -> int:
        return int((self._first.shards or self._first.chunks)[0])

    @property
    def chunk_rows(self) -> int:
        return int(self._first.chunks[0])

    @property
    def chunk_features(self) -> int:
        return int(self._first.chunks[1])

    def pieces(self, run: tuple[int, int], at_once: int) -> Iterator[slice]:
        """The rows of `run` in order, at most `at_once` in each piece and none of two parts: what is read fastest."""
        return (slice(*piece) for piece in pieces(run, ends_of(self.part_rows), at_once))

    def features(self, rows: slice, columns: slice) -> NDArray[Any]:
        """Stored values of some rows and columns, in the stored dtype. Raises: StoreError: damaged."""

        def read(part: int, own: slice) -> NDArray[Any]:
            stored = self._parts[part]
            with damage_named(stored.gradient.store_path, ROWS_UNREADABLE):
                return read_checked(stored.gradient_fast, stored.gradient, own, columns)

        return joined(read, rows, self.part_rows)

    def scales(self, rows: slice) -> NDArray[np.float32]:
        """Scales of some rows, shape (row, block). Raises: StoreError: damaged."""
        return joined(lambda part, own: read_array(self._parts[part].scale, own), rows, self.part_rows)


def joined(read: Callable[[int, slice], NDArray[Any]], rows: slice, part_rows: Sequence[int]) -> NDArray[Any]:
    """Some rows of all parts in order; `read(part, rows within it)` gives those of one."""
    first, last, _ = rows.indices(sum(part_rows))
    found = [read(part, slice(*own)) for part, *own in split((first, last), ends_of(part_rows))]
    if len(found) == 1:
        return found[0]
    return np.concatenate(found) if found else read(0, slice(0, 0))


def read_array(array: zarr.Array[Any], rows: slice) -> NDArray[Any]:
    """Some rows of one array. Raises: StoreError: damaged."""
    with damage_named(array.store_path, ROWS_UNREADABLE):
        return np.asarray(array[rows])
