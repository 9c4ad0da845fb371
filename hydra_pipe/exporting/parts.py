"""Tables in several files, `part-*.parquet`.

A row group holds whole test samples. If a test sample is large, it holds a slab of one test sample.
"""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hydra_pipe.plan.exporting import ExportPlan
from hydra_pipe.store.data import rankings
from hydra_pipe.types import F32, I64


class TableParts:
    """Writer of row groups of a table, one after the other, in several files.

    Args:
        directory: directory of the files.
        schema: schema of the table.
        group_tests: test samples of a row group.
        file_tests: test samples of a file, a multiple of `group_tests`.
    """

    def __init__(
        self, directory: Path, schema: pa.Schema, group_tests: int, file_tests: int
    ) -> None:
        self._directory = directory
        self._schema = schema
        self._group_tests = group_tests
        self._file_tests = file_tests
        self._n_tests = self._number = 0
        self._waiting: list[pa.Table] = []
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._write_group()
        finally:
            if self._writer is not None:
                self._writer.close()

    def add(self, table: pa.Table, ends: I64) -> None:
        """Add rows.

        Args:
            table: rows in order of test sample.
            ends: one past the last row of each test sample, shape (test,).
        """
        start = test = 0
        while test < len(ends):
            take = min(self._group_tests - self._n_tests % self._group_tests, len(ends) - test)
            end = int(ends[test + take - 1])
            self._waiting.append(table.slice(start, end - start))
            start, test = end, test + take
            self._n_tests += take
            if self._n_tests % self._group_tests == 0:
                self._write_group()

    def _write_group(self) -> None:
        if not self._waiting:
            return
        table = pa.concat_tables(self._waiting)
        self._waiting = []
        number = (self._n_tests - 1) // self._file_tests
        if self._writer is None or number != self._number:
            if self._writer is not None:
                self._writer.close()
            self._writer, self._number = open_part(self._directory, number, self._schema), number
        self._writer.write_table(table, row_group_size=max(1, len(table)))


def open_part(directory: Path, number: int, schema: pa.Schema) -> pq.ParquetWriter:
    """Open a new file of a table that has several files."""
    return rankings.table_writer(directory / rankings.PARTS.format(number), schema)


class Matrix:
    """Writer of every pair, sorted by test sample, then training sample.

    Args:
        directory: directory of the files; made here.
        test_ids: ids of the columns of the relevance array.
        n_samples: number of training samples.
        plan: division into blocks, row groups and files.
        meta: metadata of the schema.
    """

    def __init__(
        self, directory: Path, test_ids: I64, n_samples: int, plan: ExportPlan, meta: dict[str, str]
    ) -> None:
        directory.mkdir()
        self._directory = directory
        self._test_ids = test_ids
        self._n_samples = n_samples
        self._group_tests = plan.group_tests
        self._schema = rankings.matrix_schema(meta)
        self._whole = plan.slab_samples == n_samples
        self._train = pa.array(np.tile(np.arange(plan.slab_samples), plan.group_tests))
        # Parts serves whole columns. With slabs, each test sample of the block has a file of
        # its own.
        self._parts = TableParts(directory, self._schema, plan.group_tests, plan.file_tests)
        self._writers: list[pq.ParquetWriter] = []
        self._files = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._parts.__exit__(kind, error, trace)
        finally:
            self._files.close()

    def write(self, block: F32, tests: slice, samples: slice) -> None:
        """Write a block, shape (test, sample).

        Blocks come in the order of the plan: all slabs of some test samples, then the next.
        """
        if self._whole:
            for low in range(0, len(block), self._group_tests):
                rows = block[low : low + self._group_tests]
                ends = np.arange(1, len(rows) + 1) * self._n_samples
                self._parts.add(self._table(rows, tests.start + low, 0), ends)
            return
        if samples.start == 0:
            tests_of_block = range(tests.start, tests.stop)
            self._writers = [
                self._files.enter_context(open_part(self._directory, test, self._schema))
                for test in tests_of_block
            ]
        for j, writer in enumerate(self._writers):
            writer.write_table(
                self._table(block[j : j + 1], tests.start + j, samples.start),
                row_group_size=block.shape[1],
            )
        if samples.stop == self._n_samples:
            self._files.close()

    def _table(self, rows: F32, first_test: int, first_sample: int) -> pa.Table:
        ids = self._test_ids[first_test : first_test + len(rows)]
        train = self._train.slice(0, rows.size)
        columns = [
            pa.array(np.repeat(ids, rows.shape[1])),
            train if first_sample == 0 else pc.add(train, first_sample),
            pa.array(rows.reshape(-1)),
        ]
        return pa.Table.from_arrays(columns, schema=self._schema)
