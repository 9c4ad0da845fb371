"""The results of a run as they are now, with a cache that lasts until a result is computed anew."""

import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import RunError, UsageError, shown
from hydra_pipe.exporting.source import (
    ExportSource,
    TableSource,
    TopSource,
    check_ranks,
    open_source,
    open_top_source,
    own_checksums,
)
from hydra_pipe.exporting.totals import Totals, totals_of
from hydra_pipe.plan.id_ranges import write_selection
from hydra_pipe.progress import Progress
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.recording import open_gradients
from hydra_pipe.store.data.relevance import read_relevance
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import refuse_top
from hydra_pipe.store.run.stages import CHECKSUMS, RECORD, REDUCE, TOPS, reduces_to

# Most bytes of a chunk whose columns are all kept in memory.
_MOST_KEPT_BYTES = 64 * 2**20


@dataclass(frozen=True)
class _Block:
    """Columns of a matrix, (sample, column), starting with column `first`."""

    of: tuple[Any, ...]
    first: int
    values: NDArray[np.float32]


def place_of(source: TableSource, test_id: int) -> int:
    """Return the place of the column of a test sample.

    Raises:
        UsageError: the result has no such column.
    """
    wanted = operator.index(test_id)
    column = int(np.searchsorted(source.test_ids, wanted))
    if column == source.n_tests or source.test_ids[column] != wanted:
        columns = source.columns
        there = (
            f"test samples {write_selection(columns.tests)}"
            if columns.by is None
            else f"columns 0 to {source.n_tests - 1}"
        )
        raise UsageError(
            f"the relevance of method {source.method} has no test sample {wanted}: it has {there}"
        )
    return column


class Results:
    """The results of one run.

    Args:
        directory: directory of the run. Its manifest is read again before each answer, because a
            notebook may reduce between two looks.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._gradients: Gradients | None = None
        self._sources: dict[str, tuple[Any, ExportSource]] = {}
        self._totals: dict[str, tuple[Any, Totals]] = {}
        self._block: _Block | None = None

    @property
    def path(self) -> Path:
        """Path of the run."""
        return self._directory.path

    def directory(self) -> RunDirectory:
        """Return the run, with its manifest as it is now.

        Raises:
            RunError: the run is gone.
            StoreError: the manifest is damaged.
        """
        before = (self._directory.run_id, self._directory.stages.get(RECORD))
        self._directory.refresh()
        if before != (self._directory.run_id, self._directory.stages.get(RECORD)):
            self._gradients = None  # recorded further, or anew
        return self._directory

    @property
    def gradients(self) -> Gradients:
        """The recorded rows.

        Raises:
            RunError, StoreError: the recording is missing or damaged, or the run combines others.
        """
        if self.directory().is_combined:
            self._directory.require_recording()
        if self._gradients is None:
            self._gradients = open_gradients(self._directory)
        return self._gradients

    def methods(self) -> list[str]:
        """Return the names of the results that are there, those of the top samples last."""
        directory = self.directory()
        return directory.complete(REDUCE) + directory.complete(TOPS)

    def check(self, method: str) -> None:
        """Refuse a result that is not there.

        Raises:
            RunError: the relevance of `method` is not there.
        """
        methods = self.methods()
        if method not in methods:
            raise RunError(
                f"{self._directory.path} has no relevance of method {method} (it has "
                f"{', '.join(methods) or 'none'}): run "
                f"{self._directory.command(reduces_to(method))} first"
            )

    def source(self, method: str) -> ExportSource:
        """Return the relevance of `method`, with its recording.

        Raises:
            UsageError: the method has no test samples, or the result has the top samples alone.
            RunError: the relevance was not computed.
            StoreError: the relevance is damaged.
        """
        check_ranks(method)
        refuse_top(method)
        self.check(method)
        key, kept = self._key(method), self._sources.get(method)
        if kept is None or kept[0] != key:
            kept = self._sources[method] = (key, open_source(self._directory, method))
        return kept[1]

    def top_source(self, method: str) -> TopSource:
        """Return the top samples of `method`, with their recording. Raises: as `source`."""
        self.check(method)
        return open_top_source(self._directory, method)

    def totals(self, method: str, progress: Progress) -> Totals:
        """Return totals over all training samples and classes, without the matrix in memory.

        Raises:
            HydraError: any error of `source`.
        """
        source = self.source(method)
        key, kept = self._key(method), self._totals.get(method)
        if kept is None or kept[0] != key:
            kept = self._totals[method] = (key, totals_of(self._directory, source, progress))
        return kept[1]

    def test_id(self, source: TableSource, test: int | str) -> int:
        """Return the id of the test sample of a result that has the id or the key `test`.

        Raises:
            UsageError: no test sample has the key.
            RunError, StoreError: any error of `source`.
        """
        if not isinstance(test, str):
            return operator.index(test)
        keys = source.test_keys
        found = -1 if keys is None else int(keys.ids_of([test])[0])
        if found < 0:
            raise UsageError(
                f"no test sample of {source.method} has the key {shown(test)}: give an id"
            )
        return found

    def column(self, method: str, test_id: int) -> NDArray[np.float32]:
        """Return the relevance of every training sample for one test sample, shape (sample,).

        Args:
            method: name of the result.
            test_id: id of the test sample, or number of the column for means.

        Raises:
            UsageError: the relevance has no such column.
            RunError, StoreError: any error of `source`.
        """
        source = self.source(method)
        column = place_of(source, test_id)
        block = self._block
        if (
            block is None
            or block.of != (method, self._key(method))
            or not 0 <= column - block.first < block.values.shape[1]
        ):
            block = self._block = self._read_block(method, source, column)
        return block.values[:, column - block.first]

    def _read_block(self, method: str, source: ExportSource, column: int) -> _Block:
        # A file holds several columns, and a user who asks for one test sample will ask for
        # another.
        width = source.relevance.chunks[1]
        width = width if source.n_samples * width * 4 <= _MOST_KEPT_BYTES else 1
        first = column // width * width
        values = read_relevance(source.relevance, slice(first, min(first + width, source.n_tests)))
        return _Block((method, self._key(method)), first, values)

    def _key(self, method: str) -> tuple[Any, ...]:
        """Return a value that changes when the relevance is computed anew.

        It also changes with the relevance of samples to themselves.
        """
        stage = self._directory.stages[REDUCE.of(method)]
        return (
            self._directory.run_id,
            stage.facts.get(CHECKSUMS),
            own_checksums(self._directory, method),
        )
