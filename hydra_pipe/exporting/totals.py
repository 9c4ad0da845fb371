"""Totals of the whole matrix for each training sample and for each pair of classes.

They are added up block by block, or read from an export.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hydra_pipe.errors import StoreError, shown
from hydra_pipe.exporting.dynamics import columns_of, totals_over
from hydra_pipe.exporting.ranking import ClassMeans, rank_harmful
from hydra_pipe.exporting.source import ExportSource, own_checksums
from hydra_pipe.plan.exporting import GROUP_ROWS, blocks_to_add
from hydra_pipe.progress import Progress
from hydra_pipe.store.data import rankings
from hydra_pipe.store.data.rankings import key_columns
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import EXPORT, OF_SELF

# Samples whose dynamics are added up at once if there is no budget: 600 MB.
_AT_ONCE = 2**22


@dataclass(frozen=True)
class Totals:
    """Two tables. Neither is as large as the matrix.

    Args:
        samples: a row for each training sample (`rankings.samples_schema`).
        classes: a row for each pair of labels (`rankings.classes_schema`). No rows if labels are
            unknown.
    """

    samples: pa.Table
    classes: pa.Table


class Adding:
    """`Totals` in the making.

    The order of the additions does not depend on the width of blocks. So any budget gives the same
    bytes.
    """

    def __init__(self, source: ExportSource) -> None:
        self._source = source
        self._sums = np.zeros(source.n_samples)
        known = source.train_labels is not None and source.test_labels is not None
        self._classes = ClassMeans(source.train_labels, source.test_labels) if known else None  # type: ignore[arg-type]

    @property
    def n_cells(self) -> int:
        """Number of pairs of labels."""
        return 0 if self._classes is None else self._classes.n_cells

    def add(self, block: NDArray[np.float32], first_test: int, first_sample: int) -> None:
        """Count a block, shape (test, sample).

        Args:
            block: block of the relevance, shape (test, sample).
            first_test: first column of the block.
            first_sample: first training sample of the block.
        """
        sums = self._sums[first_sample : first_sample + block.shape[1]]
        for column in block:
            sums += column
        if self._classes is not None:
            self._classes.add(block, first_test, first_sample)

    def samples(self, at_once: int, progress: Progress) -> Iterator[pa.Table]:
        """Yield `Totals.samples`, a few rows after the other. All blocks must be counted before.

        Args:
            at_once: number of samples whose dynamics are added up at once, a power of two.
            progress: place to show progress.

        Raises:
            StoreError: the recording is damaged.
        """
        source, sums = self._source, self._sums
        schema = source.samples_schema
        ranks, visits = rank_harmful(sums), source.samples.visits(progress)
        for first in range(0, len(sums), GROUP_ROWS):
            rows = slice(first, min(first + GROUP_ROWS, len(sums)))
            if first % at_once == 0:
                counted = slice(first, min(first + at_once, len(sums)))
                dynamics = totals_over(source.samples.gradients, counted, progress)
            own = slice(rows.start - counted.start, rows.stop - counted.start)
            columns = [
                pa.array(np.arange(rows.start, rows.stop)),
                rankings.label_column(source.train_labels, rows, source.train_type),
                pa.array(sums[rows]),
                pa.array(sums[rows] / source.n_tests),
                pa.array(ranks[rows]),
                pa.nulls(rows.stop - rows.start, pa.float32())
                if source.own is None
                else pa.array(source.own[rows]),
                pa.array(visits[rows]),
                *columns_of(dynamics.statistics(own)),
                *key_columns((source.train_keys, np.arange(rows.start, rows.stop))),
            ]
            yield pa.Table.from_arrays(columns, schema=schema)

    def classes(self) -> pa.Table:
        """Return `Totals.classes`. All blocks must be counted before."""
        source = self._source
        schema = rankings.classes_schema(source.train_type, source.test_type, source.meta)
        if self._classes is None:
            return schema.empty_table()
        train, test = np.meshgrid(
            self._classes.train_names, self._classes.test_names, indexing="ij"
        )
        columns = [
            pa.array(train.ravel(), source.train_type),
            pa.array(test.ravel(), source.test_type),
            pa.array(self._classes.means().ravel()),
            pa.array(self._classes.pairs().ravel()),
        ]
        return pa.Table.from_arrays(columns, schema=schema)


def totals_of(directory: RunDirectory, source: ExportSource, progress: Progress) -> Totals:
    """Return the totals of `source`.

    They are read from the export, if the export is of the present relevance. Else they are added up
    from the matrix.

    Raises:
        StoreError: the export, the relevance or the recording is damaged.
    """
    method = source.method
    if _exported(directory, method):
        pairs = 0
        if source.train_labels is not None and source.test_labels is not None:
            pairs = len(np.unique(source.train_labels)) * len(np.unique(source.test_labels))
        classes = rankings.classes_schema(source.train_type, source.test_type, source.meta)
        return Totals(
            _read(directory, method, rankings.SAMPLES, source.samples_schema, source.n_samples),
            _read(directory, method, rankings.CLASSES, classes, pairs),
        )
    adding = Adding(source)
    spans = blocks_to_add(source.n_samples, source.n_tests, source.relevance.chunks[1])
    with (
        ThreadPoolExecutor(1) as pool,
        progress.task("add up", source.n_samples * source.n_tests, "pairs") as task,
    ):
        for block, tests, samples in source.blocks(spans, pool):
            adding.add(block, tests.start, samples.start)
            task.advance(block.size)
    return Totals(pa.concat_tables(adding.samples(_AT_ONCE, progress)), adding.classes())


def _exported(directory: RunDirectory, method: str) -> bool:
    """Tell whether there are tables of the present relevance.

    The relevance of samples for themselves must be the present one too.
    """
    stage = EXPORT.of(method)
    if method not in directory.complete(EXPORT):
        return False
    facts = directory.stages[stage].facts
    return not directory.stale(stage) and facts.get(OF_SELF) == own_checksums(directory, method)


def _read(
    directory: RunDirectory, method: str, name: str, schema: pa.Schema, n_rows: int
) -> pa.Table:
    file = directory.path / EXPORT.of(method).area / name
    try:
        table = rankings.opened_table(file)
        # A file of few bytes can claim many rows.
        if (
            not table.schema_arrow.equals(schema, check_metadata=True)
            or table.metadata.num_rows != n_rows
        ):
            raise ValueError(
                f"it has {table.metadata.num_rows} rows of {shown(table.schema_arrow.names)}"
            )
        return table.read()
    except (OSError, ValueError, pa.ArrowException) as error:
        again = f"hydra-pipe export {directory.path} --method {method} --overwrite"
        raise StoreError(
            f"{file} is not what was exported ({shown(error)}): write it again with {again}"
        ) from error
