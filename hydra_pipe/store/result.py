"""A relevance array together with the recording that it was computed from, held against each other."""

from dataclasses import dataclass

from hydra_pipe.errors import StoreError
from hydra_pipe.store import names
from hydra_pipe.store.arrays import Array
from hydra_pipe.store.gradients import Gradients
from hydra_pipe.store.prefix import open_recording
from hydra_pipe.store.relevance import RELEVANCE_UNREADABLE, Columns, columns_of, open_relevance
from hydra_pipe.store.run import UPTO, RunDirectory, reduce_stage


@dataclass(frozen=True)
class ReducedRun:
    """What a complete reduction has left.

    Args:
        gradients: the recording.
        relevance: the array, whose files are all there.
        columns: what its columns are.
        n_samples: training samples.
    """

    gradients: Gradients
    relevance: Array
    columns: Columns
    n_samples: int

    @classmethod
    def open(cls, directory: RunDirectory, name: str) -> "ReducedRun":
        """The result `name`, whose stage is complete. Raises: StoreError: damaged, or of another recording."""
        reduction = directory.stages[reduce_stage(name)]
        upto = reduction.count(UPTO, least=1) if UPTO in reduction.settings else None
        gradients, counts = open_recording(directory, upto)
        relevance = open_relevance(directory.path / names.RELEVANCE, name)
        columns = columns_of(relevance)
        n_tests = columns.tests[-1][1] if columns.tests else 0
        fault = relevance.shortfall()
        if relevance.shape[0] != counts.n_samples or n_tests > counts.n_tests:
            fault = f"is of {relevance.shape[0]} samples x {n_tests} tests, {counts.n_samples} x {counts.n_tests} were recorded"
        if fault is not None:
            raise StoreError(f"{relevance.path} {fault}: {RELEVANCE_UNREADABLE}")
        return cls(gradients, relevance, columns, counts.n_samples)
