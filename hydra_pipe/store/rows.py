"""Stored rows, for reading: those of one process, or of several one after the other."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.plan.parts import ends_of, pieces, split
from hydra_pipe.store import names
from hydra_pipe.store.arrays import Array, Group, damage_named

ROWS_UNREADABLE = "the recording is not readable: record the run again with --overwrite"


class Rows:
    """Stored rows of one kind: training rows, or the test gradients of one checkpoint. Reads nothing before it is asked.

    Args:
        groups: that hold them; the rows of the first come first.

    Raises:
        StoreError: an array is missing or damaged.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self._gradients = [group.array(names.GRADIENT) for group in groups]
        self._scales = [group.array(names.SCALE) for group in groups]
        self._first = self._gradients[0]
        self.part_rows = tuple(array.shape[0] for array in self._gradients)

    @property
    def n_rows(self) -> int:
        return sum(self.part_rows)

    @property
    def widths(self) -> set[int]:
        """Features of a row, in every part; one number unless the store is damaged."""
        return {array.shape[1] if len(array.shape) == 2 else 0 for array in self._gradients}

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

    def pieces(self, run: tuple[int, int], at_once: int) -> Iterator[slice]:
        """The rows of `run` in order, at most `at_once` in each piece and none of two parts: what is read fastest."""
        return (slice(*piece) for piece in pieces(run, ends_of(self.part_rows), at_once))

    def features(self, rows: slice, columns: slice) -> NDArray[Any]:
        """Stored values of some rows and columns, in the stored dtype. Raises: StoreError: damaged."""
        return joined(lambda part, own: read_array(self._gradients[part], own, columns), rows, self.part_rows)

    def scales(self, rows: slice) -> NDArray[np.float32]:
        """Scales of some rows, shape (row, block). Raises: StoreError: damaged."""
        return joined(lambda part, own: read_array(self._scales[part], own), rows, self.part_rows)


def joined(read: Callable[[int, slice], NDArray[Any]], rows: slice, part_rows: Sequence[int]) -> NDArray[Any]:
    """Some rows of all parts in order; `read(part, rows within it)` gives those of one."""
    first, last, _ = rows.indices(sum(part_rows))
    found = [read(part, slice(*own)) for part, *own in split((first, last), ends_of(part_rows))]
    if len(found) == 1:
        return found[0]
    return np.concatenate(found) if found else read(0, slice(0, 0))


def read_array(array: Array, *window: slice) -> NDArray[Any]:
    """Values of a window of one array. Raises: StoreError: damaged."""
    with damage_named(array.path, ROWS_UNREADABLE):
        return array.read(*window)
