"""Answers from the matrix of hypergradients that a sweep has kept: R = H h, a task for each share of the samples."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import pairwise

import numpy as np
from dask.delayed import Delayed, delayed

from hydra_pipe.plan.reduction import SAMPLE_MULTIPLE, Found, Span
from hydra_pipe.reduction.blas import single_threaded_blas
from hydra_pipe.reduction.expansion import Expansion
from hydra_pipe.reduction.fisher import columns_of_tests
from hydra_pipe.reduction.hydra import CountRows, Job
from hydra_pipe.reduction.sharing import shared
from hydra_pipe.reduction.sweep import Floats
from hydra_pipe.store.arrays import Array
from hydra_pipe.store.gradients import Gradients
from hydra_pipe.store.hypergradients import HypergradientMatrix
from hydra_pipe.store.relevance import write_relevance


def graphs(job: Job, count_rows: CountRows) -> Iterator[tuple[Span, Delayed]]:
    """The passes in order: columns that are answered, and its graph. What is counted is samples: there are no rows."""
    answering, done = delayed(answer), delayed(_done)
    # in whole chunks of the relevance array
    n_chunks, n_shares = -(-job.n_samples // SAMPLE_MULTIPLE), len(job.plan.row_runs)
    bounds = [i * n_chunks // n_shares * SAMPLE_MULTIPLE for i in range(n_shares)] + [job.n_samples]
    for columns in job.plan.test_blocks:
        yield columns, done([answering(job, samples, columns, count_rows) for samples in pairwise(bounds)])


def _done(answers: list[None]) -> Found:
    """Where the answers of a pass come together. It finds nothing to tell."""
    return {}


@single_threaded_blas
def answer(job: Job, samples: Span, columns: Span, count_rows: CountRows) -> None:
    """Write some columns of the relevance of some samples."""
    assert job.kept is not None
    store = job.store()
    kept, array = HypergradientMatrix(job.kept, store), Array.open(job.relevance)
    with _held_columns(job, store, columns) as tests:
        for low in range(samples[0], samples[1], SAMPLE_MULTIPLE):
            own = slice(low, min(low + SAMPLE_MULTIPLE, samples[1]))
            found: Floats = np.zeros((own.stop - own.start, len(tests)), np.float32)
            for features in kept.tiles():
                found += kept.read(own, features) @ tests[:, features].T
            write_relevance(array, low, columns[0], found)
            count_rows(len(found))


def _held_columns(job: Job, store: Gradients, columns: Span) -> AbstractContextManager[Floats]:
    """A block that has test gradients multiplied out, or means of them, shape (column, feature)."""
    key = ("columns", job.gradients, job.tested, job.tests, None if job.groups is None else job.groups.tobytes(), columns)
    return shared(key, lambda: columns_of_tests(store, job, Expansion(store.layout), columns))
