"""A whole export: the relevance matrix, column by column, into Parquet tables."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa

from hydra_pipe.errors import UsageError
from hydra_pipe.exporting.parts import Matrix, TableParts
from hydra_pipe.exporting.ranking import Ranked, Ranking
from hydra_pipe.exporting.source import ExportSource, check_ranks, open_source, own_checksums
from hydra_pipe.exporting.totals import Adding
from hydra_pipe.plan.costs import base_bytes
from hydra_pipe.plan.exporting import ExportInput, plan_export
from hydra_pipe.progress import Progress
from hydra_pipe.store.data import rankings
from hydra_pipe.store.data.rankings import key_columns, spread_columns
from hydra_pipe.store.disk_space import say_if_tight
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import DEFAULT_METHOD, result_of
from hydra_pipe.store.run.stage_runner import running, taken_up
from hydra_pipe.store.run.stages import EXPORT, OF_SELF, REDUCE, Settings
from hydra_pipe.units import parse_bytes, resident_bytes

# Bytes of a row of matrix/, of the rankings and of samples.parquet. A label counts as an integer.
_PAIR_BYTES, _RANKED_BYTES, _SAMPLE_BYTES = 20, 41, 80


def export_run(
    run: str | os.PathLike[str],
    *,
    method: str = DEFAULT_METHOD,
    probe: str | None = None,
    top: int = 100,
    full: bool = False,
    memory: str = "4GiB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> bool:
    """Write the rankings of a reduced run as Parquet.

    Tables are written anew if the relevance of samples for themselves (`reduce --method self`) has
    been computed since the last export.

    Args:
        run: directory of the run.
        method: method of the relevance.
        probe: name of the probe whose samples are ranked for. None: the run's own test samples.
        top: training samples a side ("helpful", "harmful") for each test sample.
        full: also write every pair.
        memory: budget for the whole process, such as "4GiB". The tables do not depend on it.
        overwrite: replace tables written with other settings.
        progress: display of progress. None: no display.

    Returns:
        True if there was anything to do.

    Raises:
        RunError: there is no run, or it has no relevance of that method.
        StoreError: the relevance is damaged.
        BudgetError: the budget is too small.
        UsageError: `top` is not positive, `memory` is no size, or `method` has nothing to rank.
    """
    method, memory_bytes = result_of(method, probe), parse_bytes(memory)
    if top < 1:
        raise UsageError(f"--top {top}: give 1 or more")
    check_ranks(method)
    directory = RunDirectory.open(run)
    directory.require(REDUCE.of(method), directory.command(REDUCE.of(method)))
    stage, settings = EXPORT.of(method), {"top": top, "full": full}
    progress = progress or Progress()

    def has_work() -> bool:
        return overwrite or _has_work(directory, method, settings)

    with taken_up(directory, stage, has_work=has_work, progress=progress) as is_needed:
        if is_needed:
            _export(directory, method, settings, memory_bytes, progress)
    return is_needed


def _has_work(directory: RunDirectory, method: str, settings: Settings) -> bool:
    """Tell whether tables are missing or outdated.

    They are outdated too if they lack the present relevance of samples for themselves.
    """
    stage, own = EXPORT.of(method), own_checksums(directory, method)
    return directory.has_work(stage, settings) or own not in (
        None,
        directory.stages[stage].facts.get(OF_SELF),
    )


def _export(
    directory: RunDirectory, method: str, settings: Settings, memory_bytes: int, progress: Progress
) -> None:
    source = open_source(directory, method)
    export = _Export(source, **settings, memory_bytes=memory_bytes)
    with running(directory, EXPORT.of(method), settings) as work, work.replaced() as partial:
        say_if_tight(export.most_bytes(), work.place, progress)
        export.write(partial, progress)
        tables = sorted(partial.rglob("*.parquet"))
        work.facts["files"] = {
            str(table.relative_to(partial)): rankings.n_rows_of(table) for table in tables
        }
        if source.own is not None:
            work.facts[OF_SELF] = own_checksums(directory, method)


class _Export:
    """The tables of one export.

    Args:
        source: relevance and recording that the tables are made from.
        top, full: arguments of `export_run`.
        memory_bytes: the budget.

    Raises:
        BudgetError: the export does not fit the budget.
    """

    def __init__(self, source: ExportSource, top: int, full: bool, memory_bytes: int) -> None:
        self.source = source
        self.top = top
        self.full = full
        self.adding = Adding(source)
        self.plan = plan_export(
            ExportInput(
                n_samples=source.n_samples,
                n_tests=source.n_tests,
                top=top,
                full=full,
                n_cells=self.adding.n_cells,
                chunk_tests=source.relevance.chunks[1],
                base_bytes=base_bytes(resident_bytes()) + source.key_bytes,
                memory_bytes=memory_bytes,
            )
        )

    def most_bytes(self) -> int:
        """Return an upper bound of the size of the tables: nothing can be compressed.

        Labels that are long words may take more.
        """
        n_samples, n_tests = self.source.n_samples, self.source.n_tests
        pairs = n_samples * n_tests if self.full else 0
        return (
            pairs * _PAIR_BYTES
            + n_tests * 2 * min(self.top, n_samples) * _RANKED_BYTES
            + n_samples * _SAMPLE_BYTES
        )

    def write(self, target: Path, progress: Progress) -> None:
        """Write all tables into `target`, in one pass over the relevance.

        A block is ranked and written while the next block is read.
        """
        source, adding, plan = self.source, self.adding, self.plan
        n_samples, n_tests = source.n_samples, source.n_tests
        schema = source.ranking_schema
        with ExitStack() as stack:
            parts = stack.enter_context(
                TableParts(target, schema, plan.ranking_group_tests, plan.ranking_file_tests)
            )
            matrix = None
            if self.full:
                matrix = stack.enter_context(
                    Matrix(target / rankings.MATRIX, source.test_ids, n_samples, plan, source.meta)
                )
            pool = stack.enter_context(ThreadPoolExecutor(2))
            task = stack.enter_context(progress.task("export", n_samples * n_tests, "pairs"))
            ranking = Ranking(0, 0, self.top)
            for block, tests, samples in source.blocks(plan.blocks(n_samples, n_tests), pool):
                written = (
                    None if matrix is None else pool.submit(matrix.write, block, tests, samples)
                )
                if samples.start == 0:
                    ranking = Ranking(tests.start, len(block), self.top)
                ranking.add(block, samples.start)
                adding.add(block, tests.start, samples.start)
                if samples.stop == n_samples:
                    ranked = ranking.ranked()
                    parts.add(self._ranking_table(ranked, schema), ranked.ends)
                if written is not None:
                    written.result()
                task.advance(block.size)
        with rankings.table_writer(target / rankings.SAMPLES, source.samples_schema) as writer:
            for table in adding.samples(plan.dynamics_samples, progress):
                writer.write_table(table)
        classes = adding.classes()
        with rankings.table_writer(target / rankings.CLASSES, classes.schema) as writer:
            writer.write_table(classes)

    def _ranking_table(self, ranked: Ranked, schema: pa.Schema) -> pa.Table:
        sides = pa.DictionaryArray.from_arrays(
            pa.array(np.where(ranked.helpful, 0, 1).astype(np.int8)),
            pa.array(["helpful", "harmful"]),
        )
        columns = [
            pa.array(self.source.test_ids[ranked.test]),
            sides,
            pa.array(ranked.rank),
            pa.array(ranked.train),
            pa.array(ranked.relevance),
            rankings.label_column(self.source.test_labels, ranked.test, self.source.test_type),
            rankings.label_column(self.source.train_labels, ranked.train, self.source.train_type),
            *key_columns(
                (self.source.test_keys, self.source.test_ids[ranked.test]),
                (self.source.train_keys, ranked.train),
            ),
            *spread_columns(self.source.combined, ranked.train, ranked.test),
        ]
        return pa.Table.from_arrays(columns, schema=schema)
