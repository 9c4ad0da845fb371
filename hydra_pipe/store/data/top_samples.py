"""Results `RESULT-top` of `relevance.zarr`: the top samples of each column, and not every pair.

A result is a group. Each side, helpful and harmful, has an array of the relevance (column, rank)
and an array of the samples.
"""

from pathlib import Path
from typing import Final

import numpy as np

from hydra_pipe.errors import StoreError
from hydra_pipe.maths.ranking import Tops
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients_writer import put_labels
from hydra_pipe.store.data.relevance import (
    CHUNK_TESTS,
    RELEVANCE_UNREADABLE,
    ResultColumns,
    parse_columns,
    write_group,
    write_relevance,
)
from hydra_pipe.store.files import remove, sync, sync_tree
from hydra_pipe.store.run.listing import Listed
from hydra_pipe.store.zarr.arrays import METADATA, Array, Group, damage_named
from hydra_pipe.types import Span

# Arrays of each side: the relevance, and the samples.
_SIDES: Final = (
    (names.HELPFUL, names.HELPFUL_SAMPLE),
    (names.HARMFUL, names.HARMFUL_SAMPLE),
)
_CHUNK_RANKS: Final = 4096
_KIND: Final = "top samples"


def create_top_samples(
    path: Path,
    attributes: dict[str, str],
    columns: ResultColumns,
    count: int,
    width: int,
    run_id: str,
) -> None:
    """Create the group of a result without data, safe on the disk.

    Args:
        path: path of the group, in `relevance.zarr`.
        attributes: method, sign and unit, in words.
        columns: meaning of the columns.
        count: number of ranks of each side.
        width: number of columns that are written together.
        run_id: id of the run.
    """
    write_group(path.parent, run_id)
    remove(path)
    path.mkdir()
    known = {names.KIND: _KIND, names.RUN_ID: run_id}
    Group.create(path, known | attributes | columns.to_attributes())
    shape = (columns.n_columns, count)
    chunks = (min(CHUNK_TESTS, width), min(_CHUNK_RANKS, count))
    for relevance, samples in _SIDES:
        for name, dtype in ((relevance, "float32"), (samples, "int64")):
            Array.create(path / name, shape, dtype, (names.TEST_DIM, names.RANK_DIM), chunks)
    which = columns.ids if columns.by is None else np.array(columns.names)
    put_labels(path / names.TEST_DIM, which, names.TEST_DIM)
    sync_tree(path)
    for part in (path.parent / METADATA, path.parent, path.parent.parent):
        sync(part)


def write_top_samples(path: Path, first_column: int, tops: Tops) -> None:
    """Write the top samples of some columns, safe on the disk.

    The columns begin a chunk. They end a chunk too, except the last columns.
    """
    for side, (relevance, samples) in enumerate(_SIDES):
        write_relevance(Array.open(path / relevance), first_column, 0, tops.relevance[:, side])
        write_relevance(Array.open(path / samples), first_column, 0, tops.samples[:, side])


class TopSamples:
    """The top samples of each column of a result, opened for reading.

    Args:
        path: path of the group.
        run_id: id of the run.
        listed: function that tells by its name whether an array belongs to the group
            (`store/run/listing.py`). None: every one that exists belongs.

    Raises:
        StoreError: the group is missing or damaged, or belongs to another run.
    """

    def __init__(self, path: Path, run_id: str, listed: Listed | None = None) -> None:
        self.path = path
        self._group = Group.open(path, RELEVANCE_UNREADABLE, listed)
        self.attributes = self._group.attributes
        if [self.attributes.get(name) for name in (names.KIND, names.RUN_ID)] != [_KIND, run_id]:
            raise StoreError(f"{path} has no top samples of this run: {RELEVANCE_UNREADABLE}")
        self._sides = [[self._group.array(name) for name in own] for own in _SIDES]
        first = self._sides[0][0]
        for own in self._sides:
            for array, dtype in zip(own, ("float32", "int64"), strict=True):
                _check(array, first, dtype)
        self.columns = parse_columns(path, self.attributes, first.shape[0])

    @property
    def count(self) -> int:
        """Number of ranks of each side."""
        return self._sides[0][0].shape[1]

    @property
    def chunks(self) -> tuple[int, ...]:
        """Columns and ranks of a chunk."""
        return self._sides[0][0].chunks

    @property
    def n_bytes(self) -> int:
        """Number of bytes of the decoded values."""
        return sum(array.n_bytes for own in self._sides for array in own)

    def check(self) -> None:
        """Check that no file is missing. Raises: StoreError."""
        for own in self._sides:
            for array in own:
                if (fault := array.shortfall()) is not None:
                    raise StoreError(f"{array.path} {fault}: {RELEVANCE_UNREADABLE}")

    def read(self, columns: Span, count: int, n_samples: int) -> Tops:
        """Return the first `count` ranks of some columns.

        Args:
            columns: first column and one past the last.
            count: largest number of ranks.
            n_samples: number of training samples.

        Raises:
            StoreError: damaged.
        """
        window = (slice(*columns), slice(0, count))
        with damage_named(self.path, RELEVANCE_UNREADABLE):
            relevance, samples = (
                np.stack([own[which].read(*window) for own in self._sides], axis=1)
                for which in (0, 1)
            )
        if samples.size and not -1 <= samples.min() <= samples.max() < n_samples:
            raise StoreError(
                f"{self.path} has samples {samples.min()} to {samples.max()}, and there are "
                f"{n_samples}: {RELEVANCE_UNREADABLE}"
            )
        return Tops(samples, relevance)


def _check(array: Array, first: Array, dtype: str) -> None:
    if (
        len(array.shape) != 2
        or array.dtype != dtype
        or (array.shape, array.chunks, array.shards) != (first.shape, first.chunks, None)
        or array.chunks[0] > CHUNK_TESTS
        or array.chunks[1] > _CHUNK_RANKS
    ):
        raise StoreError(f"{array.path} is not as hydra-pipe writes it: {RELEVANCE_UNREADABLE}")
