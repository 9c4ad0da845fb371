"""Test samples that choose a proposal, and others that measure what it gains.

A test sample that has helped to choose what is left out flatters the choice. So the tests are
split. The relevance to one half chooses, by the same rule, and the other half measures. Then the
halves change places. The result therefore describes the rule, not the very set that is proposed,
which all tests have chosen. No test sample chooses a proposal by dynamics: all of them measure.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.cleaning.by_relevance import suggested_labels
from hydra_pipe.cleaning.classes import Classes
from hydra_pipe.cleaning.decision import Cut, scores_of
from hydra_pipe.cleaning.evidence import sums_over
from hydra_pipe.cleaning.judged import unjudged
from hydra_pipe.cleaning.treatments import AS_GIVEN, Proposed
from hydra_pipe.progress import Progress
from hydra_pipe.store.data.reduced_run import ReducedRun
from hydra_pipe.store.data.relevance import ResultColumns
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.types import I64

_SEED = 0x636C65


@dataclass(frozen=True)
class Fold:
    """A split of the test samples: some choose, the others measure.

    Args:
        chosen: mask of the relevance columns whose sum chooses, bool (column,).
        tests: ids of the test samples that measure.
    """

    chosen: NDArray[np.bool_]
    tests: I64


@dataclass(frozen=True)
class Folds:
    """Splits of the test samples, and what is proposed in each.

    Args:
        tests: test samples that measure, for each split.
        proposed: proposal of each split.
        how: words on how independent the measuring tests are of the choice.
    """

    tests: list[I64]
    proposed: list[Proposed]
    how: str


FOLDS_OF_ALL = "measured on all tests: none has chosen"
DECIDED_BY_TESTS = (
    "NOT independent: these tests have chosen the proposals that were decided on, so the measured "
    "gain is too good"
)


def folds_by_relevance(
    run: RunDirectory, method: str, cut: Cut, classes: Classes | None, progress: Progress
) -> Folds:
    """Return the splits of the tests, and what the rule proposes by each fold's own tests.

    Raises:
        StoreError: the relevance is damaged.
    """
    found = ReducedRun.open(run, method)
    labels = found.samples.labels()
    n_samples, n_tests = found.samples.n_samples, found.samples.n_tests
    folds, how = folds_of(found.columns, n_tests, found.labels_of_columns())
    sums = sums_over(found.relevance, np.stack([fold.chosen for fold in folds]), progress)
    judged = ~unjudged(found, labels)[0] if cut.is_fitted else None
    proposed = []
    for fold, own in zip(folds, sums, strict=True):
        ids = cut.of(scores_of(own, labels), judged)
        suggested = [
            None if label is None or classes is None else classes.number_of(label)
            for label in suggested_labels(found, labels, ids, fold.chosen)
        ]
        numbers = np.array([AS_GIVEN if n is None else n for n in suggested], np.int64)
        sure = numbers != AS_GIVEN
        nobody = np.zeros(len(ids), bool)
        proposed.append(Proposed(n_samples, ids, numbers, sure, sure, nobody, None))
    return Folds([fold.tests for fold in folds], proposed, how)


def folds_of(
    columns: ResultColumns, n_tests: int, labels: NDArray[Any] | None
) -> tuple[list[Fold], str]:
    """Return the folds, and words on how independent the measuring tests are of the choice.

    Args:
        columns: columns of the relevance.
        n_tests: number of test samples in the recording.
        labels: labels of the columns, whose shares both halves should have alike. None if
            unknown.
    """
    everything = np.ones(columns.n_columns, bool)
    if columns.by is None and columns.n_columns > 1:
        order = np.random.default_rng(_SEED).permutation(columns.n_columns)
        if labels is not None:
            order = order[
                np.argsort(np.unique(labels, return_inverse=True)[1][order], kind="stable")
            ]
        half = np.zeros(columns.n_columns, bool)
        half[order[::2]] = True
        ids = columns.test_ids
        folds = [Fold(half, ids[~half]), Fold(~half, ids[half])]
        return (
            folds,
            "the relevance to one half of the tests chooses, by the same rule, and the other "
            "half measures; then the other way round",
        )
    others = np.setdiff1d(np.arange(n_tests), columns.test_ids)
    if len(others):
        return [
            Fold(everything, others)
        ], f"measured on the {len(others):,} tests that the relevance does not cover"
    if columns.by is None:
        return [Fold(everything, np.arange(n_tests))], (
            "NOT independent: there is one test sample, and it has also chosen the proposals, so "
            "the gain says nothing"
        )
    return [Fold(everything, np.arange(n_tests))], (
        "NOT independent: a mean over the tests cannot be split, so these tests have also chosen "
        "the proposals, and the measured gain is too good; reduce without --mean or --by to "
        "measure it on other tests"
    )
