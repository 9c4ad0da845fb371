"""A whole combination: the same result of several runs, column by column, into a run of its own."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hydra_pipe.combining.sources import MOST_RUNS, Source, Sources
from hydra_pipe.errors import RunError, StoreError, UsageError
from hydra_pipe.maths.ensembles import ColumnMoments, ColumnSpread
from hydra_pipe.plan.combining import CombiningInput, CombiningPlan, plan_combining
from hydra_pipe.plan.costs import base_bytes
from hydra_pipe.progress import Progress
from hydra_pipe.store import names
from hydra_pipe.store.data.combined import create_combined, write_block
from hydra_pipe.store.data.coordinates import own_coordinates, shared_coordinates, write_coordinates
from hydra_pipe.store.data.relevance import (
    CHUNK_TESTS,
    create_relevance,
    open_relevance,
    write_relevance,
)
from hydra_pipe.store.disk_space import say_if_tight
from hydra_pipe.store.files import location, remove, remove_partials, sync, sync_tree
from hydra_pipe.store.json_parsing import is_count
from hydra_pipe.store.run.commands import PATHS
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.permission import check_stages
from hydra_pipe.store.run.results import DEFAULT_METHOD
from hydra_pipe.store.run.stage_runner import Work, completing, taken_up
from hydra_pipe.store.run.stages import COMBINE, REDUCE, Settings, StageId
from hydra_pipe.types import F64
from hydra_pipe.units import format_bytes, parse_bytes, resident_bytes

# Facts of the stage: checksums of the relevance of each run, and how far an unfinished stage got.
_OF_RUNS, _ANSWERED = "of_runs", "answered"


def combine_runs(
    runs: Sequence[str | os.PathLike[str]],
    into: str | os.PathLike[str],
    *,
    method: str = DEFAULT_METHOD,
    memory: str = "4GiB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> bool:
    """Combine the relevance of several runs: their mean, its standard error, and their agreement.

    The runs differ in their seeds, their settings, or the samples that they saw. Samples and test
    samples are matched by their keys, or by their numbers where no run has keys. docs/combining.md
    says what the numbers mean. `export`, `report`, `clean(method=...)` and `open_run` take the
    result. After an interruption the same call resumes.

    Args:
        runs: directories of two runs or more, each with the relevance of `method`.
        into: directory of the combination, which may hold combinations of other methods.
        method: name of the result to combine, such as "hydra-fisher" or "influence-mean".
        memory: budget for the whole process, such as "4GiB".
        overwrite: True to compute an existing combination again, and discard its exports; or to
            replace a combination of other runs.
        progress: place to show progress. Default: nowhere.

    Returns:
        True if there was anything to do, else False. There is if a run's relevance was computed
        anew since.

    Raises:
        RunError: a run lacks the relevance; samples cannot be matched; `into` holds a recording, or
            a combination of other runs.
        StoreError: a run is damaged.
        NonFiniteError: a relevance has infinite values, or values that are not a number.
        BudgetError: the budget is too small.
        UsageError: fewer than two runs.
    """
    if not 2 <= len(runs) <= MOST_RUNS:
        raise UsageError(f"{len(runs)} runs to combine: give 2 to {MOST_RUNS}")
    memory_bytes, progress = parse_bytes(memory), progress or Progress()
    sources = [Source.open(location(run), method) for run in runs]
    directory = RunDirectory.open_or_none(into) or RunDirectory.create(into)
    if directory.stages and not directory.is_combined:
        raise RunError(f"{into} holds a recording: give --into a directory of its own")
    combination = _Combination(directory, method, sources, list(map(str, runs)))
    if not overwrite and not combination.has_work():
        return False
    if not directory.stages:
        directory.save()
    with taken_up(
        directory,
        *combination.stages,
        has_work=lambda: overwrite or combination.has_work(),
        progress=progress,
    ) as is_needed:
        if is_needed:
            combination.compute(memory_bytes, progress, anew=overwrite)
    return is_needed


@dataclass(frozen=True)
class _Combination:
    """The stages of a combination: its spread, and its mean.

    Args:
        directory: run to combine into.
        method: name of the result.
        sources: results of the runs.
        paths: paths of the runs, as given.
    """

    directory: RunDirectory
    method: str
    sources: list[Source]
    paths: list[str]

    @property
    def stages(self) -> tuple[StageId, StageId]:
        return COMBINE.of(self.method), REDUCE.of(self.method)

    @property
    def settings(self) -> Settings:
        return {names.RUNS: [source.directory.run_id for source in self.sources]}

    @property
    def _of_runs(self) -> list[object]:
        return [source.checksums for source in self.sources]

    def has_work(self) -> bool:
        """Tell whether the combination is missing, or older than the relevance of a run.

        Raises:
            RunError: other runs were combined here.
        """
        # Every combination counts: results of one run have the same samples.
        for name in self.directory.of_kind(COMBINE):
            self.directory.has_work(COMBINE.of(name), self.settings)
        is_missing = [self.directory.has_work(which, self.settings) for which in self.stages]
        entry = self.directory.stages.get(self.stages[0])
        return any(is_missing) or entry is None or entry.facts.get(_OF_RUNS) != self._of_runs

    def compute(self, memory_bytes: int, progress: Progress, *, anew: bool) -> None:
        """Compute the combination, or the rest of it.

        Raises:
            HydraError: any error of `combine_runs`.
        """
        sources = Sources.open(self.sources)
        plan = _plan(sources, memory_bytes)
        done = None if anew else self._done(sources, plan)
        if done is None:
            self._create(sources, plan, progress)
        else:
            self._resume(done, progress)
        progress.say(
            f"{sources.samples.rows.shape[1]:,} samples x {plan.n_columns:,} columns of "
            f"{len(self.sources)} runs, {plan.width:,} columns at once, "
            f"{format_bytes(plan.read_bytes)} to read, at most "
            f"{format_bytes(plan.peak_bytes)} of memory"
        )
        n_values = sum(len(rows) for rows in sources.samples.rows) * plan.n_columns
        with (
            completing(self.directory, self.stages[1]) as work,
            progress.task("combine", n_values, "pairs") as task,
        ):
            for first, last in plan.blocks(done or 0):
                self._write(first, *_spreads(sources, first, last))
                self._mark(last)
                task.advance((last - first) * n_values // plan.n_columns)
            counts = {"n_tests": sources.columns.n_tests, "n_columns": plan.n_columns}
            found = {
                "n_runs": len(self.sources),
                "n_samples": sources.samples.rows.shape[1],
                "n_columns": plan.n_columns,
                PATHS: self.paths,
                _OF_RUNS: self._of_runs,
            }
            Work(self.directory, self.stages[0], found).complete()
            work.facts |= counts

    def _create(self, sources: Sources, plan: CombiningPlan, progress: Progress) -> None:
        directory, method, own = self.directory, self.method, self.stages[0]
        contents = sources.contents()
        say_if_tight(plan.written_bytes, directory.path, progress)
        others = [COMBINE.of(name) for name in directory.of_kind(COMBINE)]
        stale = [
            which
            for which in others
            if directory.stages[which].settings != self.settings and which != own
        ]
        gone = [one for which in (own, *stale) for one in (which, *which.results)]
        check_stages(directory.path, *gone)
        # The manifest changes before the files do.
        directory.forget(*(one for one in gone if one in directory.stages))
        for which in self.stages:
            directory.begin(which, self.settings)
        directory.stages[own].facts |= {PATHS: self.paths, _OF_RUNS: self._of_runs}
        directory.save(own)
        for place in (place for one in gone for place in one.places):
            remove(directory.path / place)
        create_combined(
            directory.path / own.area, {names.RUN_ID: directory.run_id}, contents, plan.width
        )
        store, attributes = directory.path / names.RELEVANCE, _attributes(self.sources[0])
        create_relevance(
            store,
            method,
            attributes,
            sources.samples.rows.shape[1],
            sources.columns,
            plan.width,
            directory.run_id,
            whole=sources.is_whole,
        )
        coordinates = shared_coordinates(
            sources.samples.labels,
            sources.tests.labels,
            *(matched.rows.shape[1] for matched in (sources.samples, sources.tests)),
        )
        own_names = {} if sources.is_whole else own_coordinates(method, sources.columns)
        write_coordinates(store, {**coordinates, **own_names})
        self._mark(0)

    def _done(self, sources: Sources, plan: CombiningPlan) -> int | None:
        """Return the number of columns that an interrupted call has left, or None to begin."""
        entry = self.directory.stages.get(self.stages[0])
        if entry is None or entry.state == "complete" or entry.facts.get(_OF_RUNS) != self._of_runs:
            return None
        done = entry.facts.get(_ANSWERED)
        try:
            array = open_relevance(self.directory.path / names.RELEVANCE, self.method)
        except StoreError:
            return None
        shape = (sources.samples.rows.shape[1], plan.n_columns)
        width = array.chunks[1]
        is_of_plan = array.shape == shape and width == min(CHUNK_TESTS, plan.width)
        return done if is_of_plan and is_count(done) and done <= plan.n_columns else None

    def _resume(self, done: int, progress: Progress) -> None:
        for which in self.stages:
            remove_partials(self.directory.path / which.area)
            self.directory.stages[which].state = "running"
            self.directory.stages[which].facts.pop("error", None)
        self.directory.save(*self.stages)
        progress.say(f"resuming after {done:,} columns")

    def _write(self, first: int, spreads: list[ColumnSpread], scales: F64) -> None:
        values = np.stack([spread.mean for spread in spreads], axis=1).astype(np.float32)
        array = open_relevance(self.directory.path / names.RELEVANCE, self.method)
        write_relevance(array, 0, first, values)
        write_block(self.directory.path / self.stages[0].area, first, spreads, scales)

    def _mark(self, done: int) -> None:
        """Note in the manifest that the first `done` columns are safe on the disk."""
        for which in self.stages:
            sync_tree(self.directory.path / which.area, files=False)
            sync((self.directory.path / which.area).parent)
        self.directory.stages[self.stages[0]].facts[_ANSWERED] = done
        self.directory.save(self.stages[0])


def _plan(sources: Sources, memory_bytes: int) -> CombiningPlan:
    return plan_combining(
        CombiningInput(
            rows=tuple(int(rows.max()) + 1 for rows in sources.samples.rows),
            n_samples=sources.samples.rows.shape[1],
            n_columns=sources.columns.n_columns,
            chunk_tests=CHUNK_TESTS,
            base_bytes=base_bytes(resident_bytes()),
            memory_bytes=memory_bytes,
        )
    )


def _attributes(source: Source) -> dict[str, Any]:
    attributes = source.reduced.relevance.attributes
    return {name: attributes[name] for name in (names.METHOD, names.SIGN, names.UNIT)}


def _spreads(sources: Sources, first: int, last: int) -> tuple[list[ColumnSpread], F64]:
    """Return the spread of some columns, and their root mean square in each run.

    Raises:
        NonFiniteError, StoreError: the errors of `Source.values`.
    """
    n_samples = sources.samples.rows.shape[1]
    moments = [ColumnMoments(n_samples) for _ in range(first, last)]
    scales = np.full((len(sources.of_runs), last - first), np.nan)
    for run, source in enumerate(sources.of_runs):
        places, rows = sources.places[run, first:last], sources.samples.rows[run]
        there, samples = np.flatnonzero(places >= 0), np.flatnonzero(rows >= 0)
        if not len(there):
            continue
        values = source.values(places[there])
        for column, own in zip(there.tolist(), values, strict=True):
            of_run = own[rows[samples]].astype(np.float64)
            scales[run, column] = moments[column].add(samples, of_run)
    return [one.spread() for one in moments], scales
