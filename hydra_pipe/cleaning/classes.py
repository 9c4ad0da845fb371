"""Classes of the training targets: the class of each sample, and the label of each class."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.progress import Progress
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.rows import check_within
from hydra_pipe.store.data.samples import ResultSamples
from hydra_pipe.types import I64

# Most classes of a run. Larger integers are taken for something else.
MOST_CLASSES = 2**20
# Rows that are read at once.
_ROWS = 2**20


@dataclass(frozen=True)
class Classes:
    """The classes of a run.

    Args:
        given: class that each training sample was trained with, shape (sample,). -1: unknown.
        labels: label of each class, shape (class,): integers, or str objects.
    """

    given: I64
    labels: NDArray[Any]

    def number_of(self, label: object) -> int | None:
        """Return the class with this label, or None if there is none."""
        found = np.flatnonzero(self.labels == label)
        return int(found[0]) if len(found) == 1 else None


def classes_of(samples: ResultSamples, progress: Progress) -> Classes | None:
    """Return the classes of the samples of a result, or None if they are not known.

    Where several runs are combined, integer labels count as classes.

    Raises:
        StoreError: damaged.
    """
    if samples.gradients is not None:
        return trained_classes(samples.gradients, samples.n_samples, progress)
    labels = samples.labels()
    is_plain = labels is not None and labels.dtype.kind in "iu"
    if labels is None or not is_plain or not 0 <= labels.min() <= labels.max() < MOST_CLASSES:
        return None
    return Classes(labels, np.arange(int(labels.max()) + 1))


def trained_classes(gradients: Gradients, n_samples: int, progress: Progress) -> Classes | None:
    """Return the classes of a recording, or None if its targets are not known as classes.

    Integer labels count as classes where the recording does not know the targets.

    Raises:
        StoreError: damaged.
    """
    given: I64 = np.full(n_samples, -1, np.int64)
    n_rows = gradients.rows.n_rows
    with progress.task("classes", n_rows, "rows") as task:
        for first in range(0, n_rows, _ROWS):
            rows = slice(first, min(first + _ROWS, n_rows))
            targets = gradients.row_dynamics(names.TARGET, rows).astype(np.int64)
            samples, known = gradients.samples(rows), targets >= 0
            check_within(samples, n_samples, f"samples of {gradients.path}")
            given[samples[known]] = targets[known]
            task.advance(len(samples))
    recorded = gradients.labels(names.TRAIN_LABELS)
    known = given >= 0
    if recorded is not None and recorded.dtype.kind in "iu":
        if (recorded[known] != given[known]).any():
            return None  # labels are not the targets, such as coarser classes
        given = np.where(known, given, recorded)
    n_outputs = gradients.dynamics_shape.n_outputs
    most = n_outputs if n_outputs > 1 else MOST_CLASSES
    if not 0 <= given.max(initial=-1) < min(most, MOST_CLASSES) or given.min() < -1:
        return None
    n_classes = max(min(n_outputs, MOST_CLASSES), int(given.max()) + 1)
    return Classes(given, labels_of(recorded, given, n_classes))


def labels_of(recorded: NDArray[Any] | None, given: I64, n_classes: int) -> NDArray[Any]:
    """Return the label of each class, shape (class,).

    Recorded names are the labels of classes if each class has a most frequent name of its own.
    Otherwise classes are called by their numbers.

    Args:
        recorded: labels of all training samples, or None.
        given: class of each sample, shape (sample,). -1: unknown.
        n_classes: number of classes.
    """
    numbers = np.arange(n_classes)
    if recorded is None or recorded.dtype != object:
        return numbers
    known = given >= 0
    counts: list[Counter[Any]] = [Counter() for _ in numbers]
    pairs = Counter(zip(given[known].tolist(), recorded[known].tolist(), strict=True))
    for (number, label), n in pairs.items():
        counts[number][label] = n
    found = [own.most_common(1)[0][0] if own else None for own in counts]
    named = [label for label in found if label is not None]
    if len(set(named)) < len(named):
        return numbers
    return np.array(
        [str(n) if x is None else x for n, x in zip(numbers, found, strict=True)], object
    )
