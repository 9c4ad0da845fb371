"""Classes of the training targets: the class of each sample, and the label of each class."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.store import names
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.types import I64

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


def trained_classes(gradients: Gradients, n_samples: int) -> Classes | None:
    """Return the classes of a recording, or None if its targets are not known as classes.

    Integer labels count as classes where the recording does not know the targets.

    Raises:
        StoreError: damaged.
    """
    given: I64 = np.full(n_samples, -1, np.int64)
    for first in range(0, gradients.rows.n_rows, _ROWS):
        rows = slice(first, first + _ROWS)
        targets = gradients.row_dynamics(names.TARGET, rows).astype(np.int64)
        known = targets >= 0
        given[gradients.samples(rows)[known]] = targets[known]
    recorded = gradients.labels(names.TRAIN_LABELS)
    known = given >= 0
    if recorded is not None and recorded.dtype.kind in "iu":
        if (recorded[known] != given[known]).any():
            return None  # labels are not the targets, such as coarser classes
        given = np.where(known, given, recorded)
    if given.max(initial=-1) < 0 or given.min() < -1:
        return None
    n_classes = max(gradients.dynamics_shape.n_outputs, int(given.max()) + 1)
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
