"""A whole export: the relevance matrix, column by column, into Parquet tables."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hydra_pipe.errors import StoreError, UsageError
from hydra_pipe.exporting.parts import Matrix, Parts
from hydra_pipe.exporting.ranking import ClassMeans, Ranked, Ranking, rank_harmful
from hydra_pipe.plan.exporting import GROUP_ROWS, ExportInput, plan_export
from hydra_pipe.plan.reduction import BASE_BYTES, OVERHEAD_BYTES
from hydra_pipe.progress import Progress
from hydra_pipe.store import names, rankings
from hydra_pipe.store.arrays import Array
from hydra_pipe.store.checksums import seal
from hydra_pipe.store.commands import command_of
from hydra_pipe.store.files import replaced_directory
from hydra_pipe.store.gradients import Gradients
from hydra_pipe.store.locks import one_writer
from hydra_pipe.store.probes import WhichTests
from hydra_pipe.store.relevance import (
    ITSELF,
    RELEVANCE_UNREADABLE,
    columns_of,
    open_relevance,
    parts_of_result,
    read_columns,
    read_relevance,
    result_name,
    result_of,
)
from hydra_pipe.store.result import ReducedRun
from hydra_pipe.store.rows import check_within
from hydra_pipe.store.run import CHECKSUMS, OF_REDUCE, OF_SELF, RunDirectory, Settings, export_stage, reduce_stage
from hydra_pipe.store.space import say_if_tight
from hydra_pipe.units import parse_bytes, resident_bytes

VISIT_ROWS = 2**20
# of a row of matrix/, of the rankings and of samples.parquet, labels counted as integers
_PAIR_BYTES, _RANKED_BYTES, _SAMPLE_BYTES = 20, 41, 52


def export_run(
    run: str | os.PathLike[str],
    *,
    method: str = "hydra",
    test: str | None = None,
    top: int = 100,
    full: bool = False,
    memory: str = "4GiB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> bool:
    """Write the rankings of a reduced run as Parquet.

    Args:
        run: directory of the run.
        method: whose relevance.
        test: for the samples of this probe, instead of the run's own test samples.
        top: training samples a side ("helpful", "harmful") for each test sample.
        full: also write every pair.
        memory: budget for the whole process, such as "4GiB". The tables do not depend on it.
        overwrite: replace tables written with other settings.
        progress: where to show progress; nowhere if absent.

    Where the relevance of samples for themselves has been computed since (`reduce --method self`), tables are written anew.

    Returns:
        Whether there was anything to do.

    Raises:
        RunError: there is no run, or it has no relevance of that method.
        StoreError: the relevance is damaged.
        BudgetError: the budget is too small.
        UsageError: `top` is not positive, `memory` is no size, or there is nothing to rank in it.
    """
    method, memory_bytes = result_of(method, test), parse_bytes(memory)
    if top < 1:
        raise UsageError(f"--top {top}: give 1 or more")
    if parts_of_result(method).method == ITSELF:
        raise UsageError(f"--method {method} ranks nothing: it is the column self_relevance of other methods' samples.parquet")
    directory = RunDirectory.open(run)
    directory.require(reduce_stage(method), command_of(directory, reduce_stage(method)))
    stage, settings = export_stage(method), {"top": top, "full": full}
    if not overwrite and not _has_work(directory, method, settings):
        return False

    with one_writer(directory.path, stage):
        directory.refresh()  # another process may have done it in the meantime
        if not overwrite and not _has_work(directory, method, settings):
            return False
        _export(directory, method, settings, memory_bytes, progress or Progress())
    return True


def _has_work(directory: RunDirectory, method: str, settings: Settings) -> bool:
    """Whether there are no tables, or they lack what samples are for themselves, or have another than there is."""
    stage, own = export_stage(method), _own_checksums(directory, method)
    return directory.has_work(stage, settings) or own not in (None, directory.stages[stage].facts.get(OF_SELF))


def _own_name(method: str) -> str:
    """The relevance of samples for themselves, over the same steps as `method`."""
    return result_name(ITSELF, None, parts_of_result(method).upto)


def _own_checksums(directory: RunDirectory, method: str) -> object:
    """Of that relevance; None: it was not computed."""
    stage = directory.stages.get(reduce_stage(_own_name(method)))
    return stage.facts.get(CHECKSUMS) if stage is not None and stage.state == "complete" else None


def _own_relevance(directory: RunDirectory, method: str, n_samples: int) -> NDArray[np.float32] | None:
    """That relevance, shape (sample,); None: it was not computed. Raises: StoreError: damaged."""
    if _own_checksums(directory, method) is None:
        return None
    array = open_relevance(directory.path / names.RELEVANCE, _own_name(method))
    if array.shape != (n_samples, 1) or columns_of(array).by != ITSELF:
        raise StoreError(f"{array.path} is not of {n_samples} samples for themselves: {RELEVANCE_UNREADABLE}")
    return read_relevance(array, slice(None))[:, 0]


def _export(directory: RunDirectory, method: str, settings: Settings, memory_bytes: int, progress: Progress) -> None:
    stage, found = export_stage(method), ReducedRun.open(directory, method)
    relevance = found.relevance
    own = _own_relevance(directory, method, found.n_samples)
    attributes = relevance.attributes
    meta = rankings.metadata(method, attributes[names.SIGN], attributes[names.UNIT], directory.run_id)
    export = _Export(found.gradients, found.tested, relevance, own, meta, **settings, memory_bytes=memory_bytes)
    target = directory.path / names.RANKINGS / names.rankings_directory(method)
    directory.begin(stage, settings)
    start = time.monotonic()
    try:
        # readers see the old tables or the new ones, all of them of one export
        with replaced_directory(target) as partial:
            say_if_tight(export.most_bytes(), target, progress)
            export.write(partial, progress)
            files = {str(f.relative_to(partial)): pq.read_metadata(f).num_rows for f in sorted(partial.rglob("*.parquet"))}
            source = {OF_REDUCE: directory.stages[reduce_stage(method)].facts.get(CHECKSUMS)}
            source |= {} if own is None else {OF_SELF: _own_checksums(directory, method)}
            checksums = seal(directory, stage, partial)
    except BaseException as error:
        with suppress(OSError):  # on a full disk the manifest stays at "running", which reads as unfinished too
            directory.end(stage, "failed", error=str(error) or type(error).__name__)
        raise
    directory.end(stage, "complete", seconds=time.monotonic() - start, files=files, checksums=checksums, **source)


class _Export:
    """The tables of one export.

    Args:
        gradients: of the run, for labels and visits.
        tested: whose test samples these are.
        relevance: of the method.
        own: relevance of samples for themselves, shape (sample,), or None.
        meta: of the schemas.
        top, full: see `export_run`.
        memory_bytes: the budget.

    Raises:
        BudgetError: it does not fit.
    """

    def __init__(
        self,
        gradients: Gradients,
        tested: WhichTests,
        relevance: Array,
        own: NDArray[np.float32] | None,
        meta: dict[str, str],
        top: int,
        full: bool,
        memory_bytes: int,
    ) -> None:
        self.gradients = gradients
        self.relevance = relevance
        self.own = own
        self.meta = meta
        self.top = top
        self.full = full
        self.train_labels = gradients.labels(names.TRAIN_LABELS)
        columns = columns_of(relevance)
        self.test_ids = columns.ids
        self.test_labels = columns.labels(tested.labels(gradients))
        self.train_type = rankings.label_type(self.train_labels)
        self.test_type = rankings.label_type(self.test_labels)
        self.classes = None
        if self.train_labels is not None and self.test_labels is not None:
            self.classes = ClassMeans(self.train_labels, self.test_labels)
        self.plan = plan_export(
            ExportInput(
                n_samples=relevance.shape[0],
                n_tests=relevance.shape[1],
                top=top,
                full=full,
                n_cells=0 if self.classes is None else self.classes.n_cells,
                chunk_tests=relevance.chunks[1],
                base_bytes=max(BASE_BYTES, resident_bytes() + OVERHEAD_BYTES),
                memory_bytes=memory_bytes,
            )
        )

    def most_bytes(self) -> int:
        """What the tables take at most, if nothing of them can be compressed, but for labels that are long words."""
        n_samples, n_tests = self.relevance.shape
        pairs = n_samples * n_tests if self.full else 0
        return pairs * _PAIR_BYTES + n_tests * 2 * min(self.top, n_samples) * _RANKED_BYTES + n_samples * _SAMPLE_BYTES

    def write(self, target: Path, progress: Progress) -> None:
        """All tables, into `target`, in one pass over the relevance: a block is ranked and written while the next one is read."""
        n_samples, n_tests = self.relevance.shape
        plan, schema = self.plan, rankings.ranking_schema(self.test_type, self.train_type, self.meta)
        sums = np.zeros(n_samples)
        with ExitStack() as stack:
            parts = stack.enter_context(Parts(target, schema, plan.ranking_group_tests, plan.ranking_file_tests))
            matrix = None
            if self.full:
                matrix = stack.enter_context(Matrix(target / rankings.MATRIX, self.test_ids, n_samples, plan, self.meta))
            pool = stack.enter_context(ThreadPoolExecutor(2))
            task = stack.enter_context(progress.task("export", n_samples * n_tests, "pairs"))
            ranking = Ranking(0, 0, self.top)
            for block, tests, samples in self._blocks(pool):
                written = None if matrix is None else pool.submit(matrix.write, block, tests, samples)
                if samples.start == 0:
                    ranking = Ranking(tests.start, len(block), self.top)
                ranking.add(block, samples.start)
                for column in block:
                    sums[samples] += column
                if self.classes is not None:
                    self.classes.add(block, tests.start, samples.start)
                if samples.stop == n_samples:
                    ranked = ranking.ranked()
                    parts.add(self._ranking_table(ranked, schema), ranked.ends)
                if written is not None:
                    written.result()
                task.advance(block.size)
        self._write_samples(target, sums, n_tests, progress)
        classes_schema = rankings.classes_schema(self.train_type, self.test_type, self.meta)
        with rankings.table_writer(target / rankings.CLASSES, classes_schema) as writer:
            writer.write_table(self._classes_table(classes_schema))

    def _blocks(self, pool: Executor) -> Iterator[tuple[NDArray[np.float32], slice, slice]]:
        """Blocks of the relevance, shape (test, sample), and what they are of; the next one is read meanwhile."""
        waiting: Future[NDArray[np.float32]] | None = None
        spans = list(self.plan.blocks(*self.relevance.shape))
        for number, (tests, samples) in enumerate(spans):
            block = read_columns(self.relevance, samples, tests) if waiting is None else waiting.result()
            if number + 1 < len(spans):
                after, low = spans[number + 1]
                waiting = pool.submit(read_columns, self.relevance, low, after)
            yield block, tests, samples
            del block  # before the next but one is read

    def _ranking_table(self, ranked: Ranked, schema: pa.Schema) -> pa.Table:
        sides = pa.DictionaryArray.from_arrays(
            pa.array(np.where(ranked.helpful, 0, 1).astype(np.int8)), pa.array(["helpful", "harmful"])
        )
        columns = [
            pa.array(self.test_ids[ranked.test]),
            sides,
            pa.array(ranked.rank),
            pa.array(ranked.train),
            pa.array(ranked.relevance),
            rankings.label_column(self.test_labels, ranked.test, self.test_type),
            rankings.label_column(self.train_labels, ranked.train, self.train_type),
        ]
        return pa.Table.from_arrays(columns, schema=schema)

    def _write_samples(self, target: Path, sums: NDArray[np.float64], n_tests: int, progress: Progress) -> None:
        schema = rankings.samples_schema(self.train_type, self.meta)
        ranks, visits = rank_harmful(sums), self._visits(len(sums), progress)
        with rankings.table_writer(target / rankings.SAMPLES, schema) as writer:
            for first in range(0, len(sums), GROUP_ROWS):
                rows = slice(first, min(first + GROUP_ROWS, len(sums)))
                columns = [
                    pa.array(np.arange(rows.start, rows.stop)),
                    rankings.label_column(self.train_labels, rows, self.train_type),
                    pa.array(sums[rows]),
                    pa.array(sums[rows] / n_tests),
                    pa.array(ranks[rows]),
                    pa.nulls(rows.stop - rows.start, pa.float32()) if self.own is None else pa.array(self.own[rows]),
                    pa.array(visits[rows]),
                ]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))

    def _visits(self, n_samples: int, progress: Progress) -> NDArray[np.int64]:
        visits = np.zeros(n_samples, np.int64)
        n_rows = self.gradients.rows.n_rows
        with progress.task("visits", n_rows, "rows") as task:
            for first in range(0, n_rows, VISIT_ROWS):
                samples = self.gradients.samples(slice(first, first + VISIT_ROWS))
                check_within(samples, n_samples, f"samples of {self.gradients.path}")
                visits += np.bincount(samples, minlength=n_samples)
                task.advance(len(samples))
        return visits

    def _classes_table(self, schema: pa.Schema) -> pa.Table:
        if self.classes is None:
            return schema.empty_table()
        train, test = np.meshgrid(self.classes.train_names, self.classes.test_names, indexing="ij")
        columns = [
            pa.array(train.ravel(), self.train_type),
            pa.array(test.ravel(), self.test_type),
            pa.array(self.classes.means().ravel()),
            pa.array(self.classes.pairs().ravel()),
        ]
        return pa.Table.from_arrays(columns, schema=schema)
