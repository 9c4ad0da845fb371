"""Queries: test samples, or groups of them, about which an evaluation asks relevance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import UsageError
from hydra_pipe.plan.id_ranges import parse_selection, write_selection
from hydra_pipe.retraining.subject import Relevance, Subject
from hydra_pipe.store import names
from hydra_pipe.store.data.keys import selected
from hydra_pipe.store.run.results import BY_LABEL, MEAN
from hydra_pipe.types import F64, I64

# Number of test samples to ask about unless `--tests` chooses.
MOST_QUERIES = 20


@dataclass(frozen=True)
class Query:
    """A test sample, or a group of test samples whose mean loss counts.

    Args:
        name: id of the test sample, label of the group, or "mean" for all test samples.
        tests: ids of the test samples, shape (test,).
    """

    name: int | str
    tests: I64


def selection_of(subject: Subject, given: str) -> str:
    """Return the one spelling of a selection of test samples.

    Raises:
        UsageError: `given` cannot be read, or names a test sample that does not exist.
    """
    keys = subject.gradients.keys(names.TEST_KEYS)
    return write_selection(selected(given, subject.n_tests, keys))


def ids_of(subject: Subject, selection: str) -> I64:
    """Return the ids of a selection of test samples. Shape (test,)."""
    spans = parse_selection(selection, subject.n_tests)
    return np.concatenate([np.arange(*span) for span in spans])


def queries_of(subject: Subject, settings: Mapping[str, Any]) -> list[Query]:
    """Return the queries of an evaluation.

    Args:
        subject: run and pipeline.
        settings: settings of the evaluation: `tests`, a selection of test samples, or `by`, a
            grouping of all of them.

    Raises:
        UsageError: groups are by label, and the test samples have no labels.
    """
    by = settings.get(names.BY)
    if by is None:
        ids = ids_of(subject, settings[names.TESTS])
        return [Query(int(test), np.array([test])) for test in ids]
    if by != BY_LABEL:
        return [Query(MEAN, np.arange(subject.n_tests))]
    labels = subject.test_labels()
    if labels is None:
        raise UsageError(
            f"--by label: {subject.run.path} has no labels of test samples: take --by mean, or "
            "record with Pipeline(..., test_labels=...)"
        )
    return [Query(label, np.flatnonzero(labels == label)) for label in np.unique(labels).tolist()]


def relevance_for(found: Relevance, queries: Sequence[Query]) -> F64:
    """Return relevance for each query, shape (sample, query).

    The relevance for a group is the mean over its test samples. A result that was reduced by
    groups has the groups as its columns.

    Args:
        found: relevance that covers the test samples of the queries, or has their groups.
        queries: queries.

    Raises:
        StoreError: the relevance is damaged.
    """
    values = found.values()
    if found.columns.by is None:
        places = [np.searchsorted(found.columns.test_ids, query.tests) for query in queries]
        means = [values[:, own].mean(axis=1, dtype=np.float64) for own in places]
    else:
        columns = [found.columns.names.index(query.name) for query in queries]
        means = [values[:, column].astype(np.float64) for column in columns]
    return np.stack(means, axis=1)


def losses_of(queries: Sequence[Query], losses: NDArray[np.float64]) -> F64:
    """Return the mean loss of each query.

    Args:
        queries: queries.
        losses: losses of all test samples, shape (..., test).

    Returns:
        Shape (..., query).
    """
    return np.stack([losses[..., query.tests].mean(axis=-1) for query in queries], axis=-1)
