"""Numbers by class: what is predicted for which label, and how many samples a class has."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.reporting.findings import MOST_CLASSES
from hydra_pipe.types import I64


@dataclass(frozen=True)
class Confusion:
    """Numbers of samples by label and prediction.

    Args:
        classes: names of the classes, those with the most samples.
        counts: numbers of samples with the label of the row and the prediction of the column,
            shape (class, class).
        n_right: number of all samples whose prediction is the label.
        n_samples: number of all samples.
        n_classes: number of all classes.
    """

    classes: list[str]
    counts: I64
    n_right: int
    n_samples: int
    n_classes: int


def confusion(labels: I64, predicted: I64, names: Sequence[str]) -> Confusion:
    """Count samples by label and prediction.

    Args:
        labels: class of each sample, shape (sample,).
        predicted: predicted class of each sample, shape (sample,). -1: unknown.
        names: names of the classes.
    """
    known = predicted >= 0
    labels, predicted = labels[known], predicted[known]
    n = len(names)
    counts = np.bincount(labels * n + predicted, minlength=n * n).reshape(n, n).astype(np.int64)
    weight = counts.sum(axis=1) + counts.sum(axis=0)
    kept = np.sort(np.argsort(-weight, kind="stable")[:MOST_CLASSES])
    return Confusion(
        [names[i] for i in kept],
        counts[np.ix_(kept, kept)],
        int(np.trace(counts)),
        len(labels),
        n,
    )


@dataclass(frozen=True)
class ClassCount:
    """Numbers of samples of one class.

    Args:
        name: name of the class.
        n_train: number of training samples with this label.
        n_doubted: number of them whose label looks wrong.
        n_test: number of test samples with this label. None if unknown.
        n_right: number of these that are predicted right. None if unknown.
    """

    name: str
    n_train: int
    n_doubted: int
    n_test: int | None
    n_right: int | None


def class_counts(
    labels: I64,
    doubted: NDArray[np.bool_],
    names: Sequence[str],
    tests: Confusion | None,
) -> list[ClassCount]:
    """Count the samples of each class, the classes with the most training samples first.

    Args:
        labels: class of each training sample, shape (sample,).
        doubted: mask of the samples whose label looks wrong, shape (sample,).
        names: names of the classes.
        tests: labels and predictions of the test samples, if they are known.
    """
    n_train = np.bincount(labels, minlength=len(names))
    n_doubted = np.bincount(labels[doubted], minlength=len(names))
    of_tests: dict[str, tuple[int, int]] = {}
    if tests is not None:
        of_tests = {
            name: (int(row.sum()), int(row[i]))
            for i, (name, row) in enumerate(zip(tests.classes, tests.counts, strict=True))
        }
    order = np.argsort(-n_train, kind="stable")
    kept = np.sort(order[:MOST_CLASSES])
    return [
        ClassCount(
            names[i], int(n_train[i]), int(n_doubted[i]), *of_tests.get(names[i], (None,) * 2)
        )
        for i in kept.tolist()
    ]
