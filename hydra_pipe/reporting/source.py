"""A result with its recording, as the source of a report."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from hydra_pipe.errors import UsageError
from hydra_pipe.plan.id_ranges import parse_selection, write_selection
from hydra_pipe.store.data.reduced_run import ReducedRun
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import ResultName
from hydra_pipe.store.run.stages import EVALUATE, RECORD


@dataclass(frozen=True)
class ReportSource(ReducedRun):
    """A result, and the recording it belongs to.

    Args:
        directory: directory of the run.
        result: name of the result.
    """

    directory: RunDirectory
    result: str

    @classmethod
    def open(cls, directory: RunDirectory, name: str) -> "ReportSource":
        """Open the result `name`, whose stage is complete.

        Raises:
            StoreError: the result is damaged, or belongs to another recording.
        """
        found = ReducedRun.open(directory, name)
        agreeing = (
            found.up_to_step,
            found.gradients,
            found.counts,
            found.relevance,
            found.columns,
            found.tested,
        )
        return cls(*agreeing, directory, name)

    @property
    def probe(self) -> str | None:
        """Name of the probe with the columns' samples, or None for the run's own test samples."""
        return ResultName.parse(self.result).probe

    @property
    def n_tests(self) -> int:
        """Number of test samples, including those without a column."""
        return (
            self.counts.n_tests if self.probe is None else len(self.tested.losses(self.gradients))
        )

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
        spans = parse_selection(tests, self.n_tests)
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
