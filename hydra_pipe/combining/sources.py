"""The results to combine, opened and matched: their samples, their columns, what they mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.combining.matching import Matched, OfRun, matched
from hydra_pipe.errors import NonFiniteError, RunError
from hydra_pipe.progress import Progress
from hydra_pipe.store import names
from hydra_pipe.store.data.combined import ABSENT, Contents
from hydra_pipe.store.data.reduced_run import ReducedRun
from hydra_pipe.store.data.relevance import ResultColumns, read_columns, spans_of
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import REDUCE
from hydra_pipe.types import F32, F64, I64

# Attributes of a relevance array that must be the same in all runs.
_MEANING = (names.METHOD, names.SIGN, names.UNIT)
MOST_RUNS = 254


@dataclass(frozen=True)
class Source:
    """A result of one run.

    Args:
        directory: directory of the run.
        result: name of the result.
        reduced: the result.
    """

    directory: RunDirectory
    result: str
    reduced: ReducedRun

    @classmethod
    def open(cls, run: Path, result: str) -> "Source":
        """Open the result of a run.

        Raises:
            RunError: there is no run, it combines runs itself, or lacks the result.
            StoreError: the result is damaged.
        """
        directory = RunDirectory.open(run)
        if directory.is_combined:
            raise RunError(f"{run} combines runs itself: give the runs that it combines")
        directory.require(REDUCE.of(result), directory.command(REDUCE.of(result)))
        return cls(directory, result, ReducedRun.open(directory, result))

    @property
    def checksums(self) -> object:
        """Checksums of the relevance, which change when it is computed anew."""
        return self.directory.checksums(REDUCE.of(self.result))

    @property
    def meaning(self) -> tuple[Any, ...]:
        """Method, sign and unit, and the grouping of the columns."""
        attributes = self.reduced.relevance.attributes
        return (*(attributes[name] for name in _MEANING), self.reduced.columns.by)

    def values(self, columns: I64) -> F32:
        """Return columns of the relevance, shape (column, sample).

        Args:
            columns: numbers of columns in this run, without -1.

        Raises:
            NonFiniteError: a value is infinite or not a number.
            StoreError: damaged.
        """
        relevance = self.reduced.relevance
        found: F32 = np.empty((len(columns), relevance.shape[0]), np.float32)
        for places in np.split(np.arange(len(columns)), np.flatnonzero(np.diff(columns) != 1) + 1):
            if len(places):
                window = slice(int(columns[places[0]]), int(columns[places[-1]]) + 1)
                found[places] = read_columns(relevance, slice(None), window)
        if not np.isfinite(found).all():
            column = int(columns[np.argmin(np.isfinite(found).all(axis=1))])
            raise NonFiniteError(
                f"{relevance.path} has values that are infinite or not a number for test "
                f"{self.reduced.columns.ids[column]}: leave the run out"
            )
        return found


@dataclass(frozen=True)
class Sources:
    """Results to combine, with their samples and columns matched.

    Args:
        of_runs: result of each run.
        samples, tests: training samples and test samples of all runs together.
        columns: meaning of the columns.
        places: column of each column in each run, int64 (run, column). -1: the run lacks it.
    """

    of_runs: Sequence[Source]
    samples: Matched
    tests: Matched
    columns: ResultColumns
    places: I64

    @classmethod
    def open(cls, of_runs: Sequence[Source]) -> "Sources":
        """Match the samples and the columns of results.

        Raises:
            RunError: the results mean different things, or their samples cannot be matched.
            StoreError: a run is damaged.
        """
        first = of_runs[0]
        for other in of_runs[1:]:
            if other.meaning != first.meaning:
                raise RunError(
                    f"{other.result} of {other.directory.path} means something else than of "
                    f"{first.directory.path} ({_differing(first, other)}): combine results of one "
                    "method"
                )
        samples = matched([_training(one) for one in of_runs], "training samples")
        tests = matched([_testing(one) for one in of_runs], "test samples")
        columns, places = _columns([one.reduced.columns for one in of_runs], tests.rows)
        _check_runs(of_runs, places)
        return cls(of_runs, samples, tests, columns, places)

    @property
    def is_whole(self) -> bool:
        """True if each test sample has a column."""
        return self.columns.by is None and self.columns.n_columns == self.tests.rows.shape[1]

    def contents(self) -> Contents:
        """Return all that is known beside the relevance. Raises: StoreError: damaged."""
        visits = np.zeros(self.samples.rows.shape[1], np.int64)
        losses: list[F64] = []
        for one, rows, tests in zip(self.of_runs, self.samples.rows, self.tests.rows, strict=True):
            there = rows >= 0
            visits[there] += one.reduced.samples.visits(Progress())[rows[there]]
            own = np.full(len(tests), np.nan)
            own[tests >= 0] = one.reduced.samples.test_losses()[tests[tests >= 0]]
            losses.append(own)
        return Contents(
            rows=self.samples.rows,
            columns=self.places,
            visits=visits,
            test_losses=_mean_of_known(np.stack(losses)),
            in_first=(self.tests.rows[0] >= 0).astype(np.uint8),
            labels=self.samples.labels,
            test_labels=self.tests.labels,
            keys=self.samples.keys,
            test_keys=self.tests.keys,
        )


def _training(source: Source) -> OfRun:
    samples = source.reduced.samples
    return OfRun(source.directory.path, samples.n_samples, samples.labels(), samples.keys())


def _testing(source: Source) -> OfRun:
    samples = source.reduced.samples
    return OfRun(source.directory.path, samples.n_tests, samples.test_labels(), samples.test_keys())


def _columns(of_runs: Sequence[ResultColumns], rows: I64) -> tuple[ResultColumns, I64]:
    """Return the columns of all runs together, and the column of each in each run.

    Args:
        of_runs: columns of each run.
        rows: number of each test sample in each run, shape (run, test). -1: none.
    """
    tests = []
    for columns, own in zip(of_runs, rows, strict=True):
        together = np.full(int(own.max(initial=-1)) + 1, ABSENT)
        together[own[own >= 0]] = np.flatnonzero(own >= 0)
        tests.append(together[columns.test_ids] if columns.tests else np.zeros(0, np.int64))
    all_tests = np.unique(np.concatenate(tests))
    by = of_runs[0].by
    if by is None:
        found = ResultColumns(spans_of(all_tests))
        names_of = [own.tolist() for own in tests]
        together_names: list[Any] = all_tests.tolist()
    else:
        names_of = [list(columns.names) for columns in of_runs]
        together_names = list(dict.fromkeys(name for own in names_of for name in own))
        found = ResultColumns(spans_of(all_tests), by, tuple(together_names))
    places = np.full((len(of_runs), len(together_names)), ABSENT, np.int64)
    at = {name: place for place, name in enumerate(together_names)}
    for run, own_names in enumerate(names_of):
        places[run, [at[name] for name in own_names]] = np.arange(len(own_names))
    return found, places


def _check_runs(of_runs: Sequence[Source], places: I64) -> None:
    """Refuse the same run twice, unless its results are for other test samples.

    Raises:
        RunError: two results are of one run, and share a column.
    """
    seen: dict[str, NDArray[np.bool_]] = {}
    for one, own in zip(of_runs, places >= 0, strict=True):
        before = seen.setdefault(one.directory.run_id, np.zeros(len(own), bool))
        if (before & own).any():
            raise RunError(
                f"{one.directory.path} is the same run as another one: it would count twice"
            )
        before |= own


def _differing(one: Source, other: Source) -> str:
    pairs = zip(one.meaning, other.meaning, strict=True)
    return "; ".join(f"{now}, not {was}" for was, now in pairs if was != now)


def _mean_of_known(values: F64) -> F32:
    """Return the mean over the first axis of the values that are numbers."""
    known = np.isfinite(values)
    n = known.sum(axis=0)
    sums = np.where(known, values, 0.0).sum(axis=0)
    return np.where(n > 0, sums / np.maximum(n, 1), np.nan).astype(np.float32)
