"""A whole export: the relevance matrix, column by column, into Parquet tables."""

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hydra_pipe.errors import StoreError, UsageError
from hydra_pipe.exporting.ranking import ClassMeans, Ranked, rank_harmful, rank_tests
from hydra_pipe.progress import Progress
from hydra_pipe.store import names, rankings
from hydra_pipe.store.arrays import Array
from hydra_pipe.store.checksums import seal
from hydra_pipe.store.files import replaced_directory
from hydra_pipe.store.gradients import Gradients
from hydra_pipe.store.locks import one_writer
from hydra_pipe.store.prefix import open_recording
from hydra_pipe.store.relevance import (
    ITSELF,
    RELEVANCE_UNREADABLE,
    columns_of,
    open_relevance,
    parts_of_result,
    read_relevance,
    result_name,
)
from hydra_pipe.store.rows import check_within
from hydra_pipe.store.run import CHECKSUMS, OF_REDUCE, OF_SELF, UPTO, RunDirectory, Settings, export_stage, reduce_stage
from hydra_pipe.store.space import say_if_tight

# Columns of the matrix that are in memory at once, as bytes; and pairs in a row group of the full table.
BLOCK_BYTES = 64 * 2**20
ROW_GROUP = 2**20
VISIT_ROWS = 2**20
# of a row of matrix/, of the rankings and of samples.parquet, labels counted as integers
_PAIR_BYTES, _RANKED_BYTES, _SAMPLE_BYTES = 20, 41, 52


def export_run(
    run: str | os.PathLike[str],
    *,
    method: str = "hydra",
    top: int = 100,
    full: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> bool:
    """Write the rankings of a reduced run as Parquet.

    Args:
        run: directory of the run.
        method: whose relevance.
        top: training samples a side ("helpful", "harmful") for each test sample.
        full: also write every pair.
        overwrite: replace tables written with other settings.
        progress: where to show progress; nowhere if absent.

    Where the relevance of samples for themselves has been computed since (`reduce --method self`), tables are written anew.

    Returns:
        Whether there was anything to do.

    Raises:
        RunError: there is no run, or it has no relevance of that method.
        StoreError: the relevance is damaged.
        UsageError: `top` is not positive, or there is nothing to rank in it.
    """
    if top < 1:
        raise UsageError(f"--top {top}: give 1 or more")
    if parts_of_result(method).method == ITSELF:
        raise UsageError(f"--method {method} ranks nothing: it is the column self_relevance of other methods' samples.parquet")
    directory = RunDirectory.open(run)
    directory.require(reduce_stage(method), f"hydra-pipe reduce {directory.path} --method {method}")
    stage, settings = export_stage(method), {"top": top, "full": full}
    if not overwrite and not _has_work(directory, method, settings):
        return False

    with one_writer(directory.path, stage):
        directory.refresh()  # another process may have done it in the meantime
        if not overwrite and not _has_work(directory, method, settings):
            return False
        _export(directory, method, top, full, progress or Progress())
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


def _export(directory: RunDirectory, method: str, top: int, full: bool, progress: Progress) -> None:
    stage, settings = export_stage(method), {"top": top, "full": full}
    reduction = directory.stages[reduce_stage(method)]
    upto = reduction.count(UPTO, least=1) if UPTO in reduction.settings else None
    gradients, counts = open_recording(directory, upto)
    relevance = open_relevance(directory.path / names.RELEVANCE, method)
    tests = columns_of(relevance).tests
    n_tests = tests[-1][1] if tests else 0
    fault = relevance.shortfall()
    if relevance.shape[0] != counts.n_samples or n_tests > counts.n_tests:
        fault = f"is of {relevance.shape[0]} samples x {n_tests} tests, {counts.n_samples} x {counts.n_tests} were recorded"
    if fault is not None:
        raise StoreError(f"{relevance.path} {fault}: {RELEVANCE_UNREADABLE}")
    target = directory.path / names.RANKINGS / names.rankings_directory(method)
    directory.begin(stage, settings)
    start = time.monotonic()
    try:
        # readers see the old tables or the new ones, all of them of one export
        with replaced_directory(target) as partial:
            own = _own_relevance(directory, method, counts.n_samples)
            attributes = relevance.attributes
            meta = rankings.metadata(method, attributes[names.SIGN], attributes[names.UNIT], directory.run_id)
            export = _Export(partial, gradients, relevance, own, meta, top, full)
            say_if_tight(export.most_bytes(), target, progress)
            export.write(progress)
            files = {str(f.relative_to(partial)): pq.read_metadata(f).num_rows for f in sorted(partial.rglob("*.parquet"))}
            source = {OF_REDUCE: directory.stages[reduce_stage(method)].facts.get(CHECKSUMS)}
            source |= {} if own is None else {OF_SELF: _own_checksums(directory, method)}
            checksums = seal(directory, stage, partial)
    except BaseException as error:
        with suppress(OSError):  # on a full disk the manifest stays at "running", which reads as unfinished too
            directory.end(stage, "failed", error=str(error) or type(error).__name__)
        raise
    directory.end(stage, "complete", seconds=time.monotonic() - start, files=files, checksums=checksums, **source)


@dataclass
class _Export:
    target: Path
    gradients: Gradients
    relevance: Array
    own: NDArray[np.float32] | None
    meta: dict[str, str]
    top: int
    full: bool

    def __post_init__(self) -> None:
        self.train_labels = self.gradients.labels(names.TRAIN_LABELS)
        columns = columns_of(self.relevance)
        self.test_ids = columns.ids
        self.test_labels = columns.labels(self.gradients.labels(names.TEST_LABELS))
        self.train_type = rankings.label_type(self.train_labels)
        self.test_type = rankings.label_type(self.test_labels)

    def most_bytes(self) -> int:
        """What the tables take at most, if nothing of them can be compressed, but for labels that are long words."""
        n_samples, n_tests = self.relevance.shape
        pairs = n_samples * n_tests if self.full else 0
        return pairs * _PAIR_BYTES + n_tests * 2 * min(self.top, n_samples) * _RANKED_BYTES + n_samples * _SAMPLE_BYTES

    def write(self, progress: Progress) -> None:
        """All tables, in one pass over the relevance."""
        n_samples, n_tests = self.relevance.shape
        sums = np.zeros(n_samples)
        classes = (
            ClassMeans(self.train_labels, self.test_labels)
            if self.train_labels is not None and self.test_labels is not None
            else None
        )
        chunk = self.relevance.chunks[1]
        width = max(chunk, BLOCK_BYTES // (n_samples * 4) // chunk * chunk)
        schema = rankings.ranking_schema(self.test_type, self.train_type, self.meta)
        if self.full:
            (self.target / rankings.MATRIX).mkdir()
        with progress.task("export", n_tests, "tests") as task:
            for part, first in enumerate(range(0, n_tests, width)):
                block = read_relevance(self.relevance, slice(first, min(first + width, n_tests)))
                ranked = rank_tests(block, first, self.top)
                pq.write_table(self._ranking_table(ranked, schema), self.target / rankings.PARTS.format(part))
                if self.full:
                    self._write_matrix(block, first, part)
                sums += block.sum(axis=1, dtype=np.float64)
                if classes is not None:
                    classes.add(block, first)
                task.advance(block.shape[1])
        pq.write_table(self._samples_table(sums, n_tests), self.target / rankings.SAMPLES)
        pq.write_table(self._classes_table(classes), self.target / rankings.CLASSES)

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

    def _samples_table(self, sums: NDArray[np.float64], n_tests: int) -> pa.Table:
        ids = np.arange(len(sums))
        columns = [
            pa.array(ids),
            rankings.label_column(self.train_labels, ids, self.train_type),
            pa.array(sums),
            pa.array(sums / n_tests),
            pa.array(rank_harmful(sums)),
            pa.nulls(len(sums), pa.float32()) if self.own is None else pa.array(self.own),
            pa.array(self._visits(len(sums))),
        ]
        return pa.Table.from_arrays(columns, schema=rankings.samples_schema(self.train_type, self.meta))

    def _visits(self, n_samples: int) -> NDArray[np.int64]:
        visits = np.zeros(n_samples, np.int64)
        n_rows = self.gradients.rows.n_rows
        for first in range(0, n_rows, VISIT_ROWS):
            samples = self.gradients.samples(slice(first, first + VISIT_ROWS))
            check_within(samples, n_samples, f"samples of {self.gradients.path}")
            visits += np.bincount(samples, minlength=n_samples)
        return visits

    def _classes_table(self, classes: ClassMeans | None) -> pa.Table:
        schema = rankings.classes_schema(self.train_type, self.test_type, self.meta)
        if classes is None:
            return schema.empty_table()
        train, test = np.meshgrid(classes.train_names, classes.test_names, indexing="ij")
        columns = [
            pa.array(train.ravel(), self.train_type),
            pa.array(test.ravel(), self.test_type),
            pa.array(classes.means().ravel()),
            pa.array(classes.pairs().ravel()),
        ]
        return pa.Table.from_arrays(columns, schema=schema)

    def _write_matrix(self, block: NDArray[np.float32], first: int, part: int) -> None:
        """Every pair of the block, sorted by test sample; row groups hold whole test samples where these are small enough."""
        n_samples, n_tests = block.shape
        at_once = max(1, ROW_GROUP // n_samples)
        schema = rankings.matrix_schema(self.meta)
        train = np.arange(n_samples)
        with pq.ParquetWriter(self.target / rankings.MATRIX / rankings.PARTS.format(part), schema) as writer:
            for low in range(0, n_tests, at_once):
                columns = block[:, low : low + at_once]
                tests = self.test_ids[first + low : first + low + columns.shape[1]]
                table = pa.Table.from_arrays(
                    [
                        pa.array(np.repeat(tests, n_samples)),
                        pa.array(np.tile(train, len(tests))),
                        pa.array(np.ascontiguousarray(columns.T).ravel()),
                    ],
                    schema=schema,
                )
                writer.write_table(table, row_group_size=ROW_GROUP)
