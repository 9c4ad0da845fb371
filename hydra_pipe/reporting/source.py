"""A result with its samples, or a recording alone, as the source of a report."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from hydra_pipe.errors import UsageError
from hydra_pipe.plan.id_ranges import write_selection
from hydra_pipe.store.data.keys import selected
from hydra_pipe.store.data.probes import WhichTests
from hydra_pipe.store.data.recording import open_recording
from hydra_pipe.store.data.reduced_run import ReducedRun, SamplesOfColumns
from hydra_pipe.store.data.relevance import ResultColumns
from hydra_pipe.store.data.samples import RecordedSamples
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import DYNAMICS, ResultName
from hydra_pipe.store.run.stages import CLEAN, EVALUATE, RECORD
from hydra_pipe.store.zarr.arrays import Array


@dataclass(frozen=True, kw_only=True)
class ReportSource(SamplesOfColumns):
    """Samples, and a result for them. Without a result, each test sample has a column.

    Args:
        directory: directory of the run.
        result: name of the result, or "dynamics" for the recording alone.
        relevance: the relevance, or None for the recording alone.
    """

    directory: RunDirectory
    result: str
    relevance: Array | None

    @classmethod
    def open(cls, directory: RunDirectory, name: str) -> "ReportSource":
        """Open the result `name`, whose stage is complete, or the recording if it is "dynamics".

        Raises:
            RunError: the recording is not complete.
            StoreError: the result is damaged, or belongs to another recording.
        """
        if name == DYNAMICS:
            gradients, counts = open_recording(directory, None)
            return cls(
                directory=directory,
                result=name,
                up_to_step=None,
                samples=RecordedSamples(gradients, counts, WhichTests(counts.checkpoint)),
                columns=ResultColumns(((0, counts.n_tests),)),
                relevance=None,
            )
        return cls(directory=directory, result=name, **vars(ReducedRun.open(directory, name)))

    @property
    def probe(self) -> str | None:
        """Name of the probe with the columns' samples, or None for the run's own test samples."""
        return ResultName.parse(self.result).probe

    @property
    def n_tests(self) -> int:
        """Number of test samples, including those without a column."""
        return self.samples.n_tests

    @property
    def recording(self) -> RecordedSamples | None:
        """The recording that the page is about. None: it is about several runs."""
        return self.samples if isinstance(self.samples, RecordedSamples) else None

    @property
    def grouped(self) -> bool:
        """True if columns are means over test samples."""
        return self.columns.by is not None

    def selected(self, tests: str | None) -> str | None:
        """Return the selection `tests` in its one canonical spelling.

        Raises:
            UsageError: `tests` names test samples that have no column.
        """
        if tests is None:
            return None
        if self.grouped:
            raise UsageError(
                f"--tests {tests}: {self.result} has means over test samples: leave it out"
            )
        spans = selected(tests, self.n_tests, self.keys_of_tests())
        there = self.columns.test_ids
        for first, last in spans:
            lacking = np.setdiff1d(np.arange(first, last), there)
            if len(lacking):
                raise UsageError(
                    f"--tests {tests}: {self.result} has no relevance for test sample "
                    f"{lacking[0]}, it was reduced for "
                    f"{write_selection(self.columns.tests)}"
                )
        return write_selection(spans)

    @property
    def final(self) -> bool:
        """True if the result is for the parameters at the end of training."""
        return self.up_to_step is None or self.up_to_step == self.directory.stages[
            RECORD
        ].facts.get("n_steps")


def evaluations_of(directory: RunDirectory) -> dict[str, Any]:
    """Return the checksums of the evaluations that are there, by stage."""
    return {
        str(stage): directory.checksums(stage)
        for stage in map(EVALUATE.of, directory.complete(EVALUATE))
    }


def cleaning_of(directory: RunDirectory) -> Any:
    """Return the checksums of the proposal of labels by dynamics, or None if there is none.

    A proposal of an earlier recording does not count.
    """
    stage = CLEAN.of(DYNAMICS)
    if DYNAMICS not in directory.complete(CLEAN) or directory.stale(stage):
        return None
    return directory.checksums(stage)
