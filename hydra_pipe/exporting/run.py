"""A whole export: the relevance matrix, column by column, into Parquet tables."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from hydra_pipe.errors import UsageError
from hydra_pipe.exporting.parts import Matrix, TableParts
from hydra_pipe.exporting.source import (
    ExportSource,
    check_ranks,
    open_source,
    open_top_source,
    own_checksums,
)
from hydra_pipe.exporting.totals import Adding
from hydra_pipe.maths.ranking import Ranking
from hydra_pipe.plan.costs import base_bytes
from hydra_pipe.plan.exporting import ExportInput, plan_export, plan_top_export
from hydra_pipe.plan.records import spans
from hydra_pipe.progress import Progress
from hydra_pipe.store import names
from hydra_pipe.store.data import rankings
from hydra_pipe.store.disk_space import say_if_tight
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import DEFAULT_METHOD, ResultName, refuse_top, result_of
from hydra_pipe.store.run.stage_runner import running, taken_up
from hydra_pipe.store.run.stages import EXPORT, OF_SELF, TOPS, Settings, reduces_to
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
    if full:
        refuse_top(method)
    directory, made_from = RunDirectory.open(run), reduces_to(method)
    reduced = directory.require(made_from, directory.command(made_from))
    if made_from.kind is TOPS and top > (kept := reduced.count(names.TOP, least=1)):
        raise UsageError(
            f"--top {top}: {method} has the top {kept} on each side: give --top {kept} or less, or "
            f"run hydra-pipe reduce with --top {top} --overwrite"
        )
    stage, settings = EXPORT.of(method), {names.TOP: top, "full": full}
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
    stage = EXPORT.of(method)
    own = None if ResultName.parse(method).is_top else own_checksums(directory, method)
    return directory.has_work(stage, settings) or own not in (
        None,
        directory.stages[stage].facts.get(OF_SELF),
    )


def _export(
    directory: RunDirectory, method: str, settings: Settings, memory_bytes: int, progress: Progress
) -> None:
    if ResultName.parse(method).is_top:
        _export_top(directory, method, settings, memory_bytes, progress)
        return
    source = open_source(directory, method)
    export = _Export(source, **settings, memory_bytes=memory_bytes)
    with running(directory, EXPORT.of(method), settings) as work, work.replaced() as partial:
        say_if_tight(export.most_bytes(), work.place, progress)
        export.write(partial, progress)
        work.facts["files"] = _files(partial)
        if source.own is not None:
            work.facts[OF_SELF] = own_checksums(directory, method)


def _export_top(
    directory: RunDirectory, method: str, settings: Settings, memory_bytes: int, progress: Progress
) -> None:
    """Write the rankings of a result of the top samples alone."""
    source, top = open_top_source(directory, method), settings[names.TOP]
    plan = plan_top_export(
        ExportInput(
            n_samples=source.n_samples,
            n_tests=source.n_tests,
            top=top,
            full=False,
            n_cells=0,
            chunk_tests=source.tops.chunks[0],
            base_bytes=base_bytes(resident_bytes()) + source.key_bytes,
            memory_bytes=memory_bytes,
        )
    )
    progress.say(
        f"{rankings.SAMPLES} and {rankings.CLASSES} need every pair, and {method} has only the "
        "top samples of each test: reduce --mean has the mean of each sample over the tests"
    )
    with running(directory, EXPORT.of(method), settings) as work, work.replaced() as partial:
        ranked_bytes = source.n_tests * 2 * min(top, source.n_samples) * _RANKED_BYTES
        say_if_tight(ranked_bytes, work.place, progress)
        with (
            TableParts(partial, source.ranking_schema, plan.group_tests, plan.file_tests) as parts,
            progress.task("export", source.n_tests, "tests") as task,
        ):
            for first, last in spans(0, source.n_tests, plan.group_tests):
                tops = source.tops.read((first, last), top, source.n_samples)
                ranked = tops.ranked(first, top)
                parts.add(source.ranking_table(ranked), ranked.ends)
                task.advance(last - first)
        work.facts["files"] = _files(partial)


def _files(directory: Path) -> dict[str, int]:
    """Return the number of rows of each table in a directory."""
    return {
        str(table.relative_to(directory)): rankings.n_rows_of(table)
        for table in sorted(directory.rglob("*.parquet"))
    }


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
        with ExitStack() as stack:
            parts = stack.enter_context(
                TableParts(
                    target,
                    source.ranking_schema,
                    plan.ranking_group_tests,
                    plan.ranking_file_tests,
                )
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
                    parts.add(source.ranking_table(ranked), ranked.ends)
                if written is not None:
                    written.result()
                task.advance(block.size)
        with rankings.table_writer(target / rankings.SAMPLES, source.samples_schema) as writer:
            for table in adding.samples(plan.dynamics_samples, progress):
                writer.write_table(table)
        classes = adding.classes()
        with rankings.table_writer(target / rankings.CLASSES, classes.schema) as writer:
            writer.write_table(classes)
