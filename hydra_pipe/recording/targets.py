"""A check of a batch's targets against the labels of its ids.

A batch in another order than its ids would give rows to the wrong samples.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import RecordError

# In a batch of this size or more, targets that are the labels in another order are no coincidence.
_ENOUGH = 4


class TargetCheck:
    """Checks the targets that training has seen against the labels of the samples.

    The labels need not be the targets: they may be true labels of noisy targets, or coarser
    classes. Labels are taken for the targets once a batch agrees with them. From then on each batch
    must agree. A batch that holds the right labels in another order is refused at once.

    Args:
        labels: labels of all training samples; if None, or not integers, nothing is checked.
    """

    def __init__(self, labels: object = None) -> None:
        values = None if labels is None else np.asarray(labels)
        self._labels: NDArray[np.int64] | None = None
        if values is not None and values.ndim == 1 and values.dtype.kind in "iu":
            self._labels = values.astype(np.int64)
        self._agreed = False

    @property
    def is_on(self) -> bool:
        """Tell whether there is something to check."""
        return self._labels is not None

    def check_all(
        self,
        ids: Sequence[NDArray[np.int64]],
        targets: Sequence[NDArray[np.int32]],
        n_classes: int,
    ) -> None:
        """Check several batches, as `check` does one after the other.

        Args:
            ids: sample ids of each batch, each of shape (batch,).
            targets: targets of each batch, each of shape (batch,); negative where the target of a
                sample is not known.
            n_classes: number of classes of the targets.

        Raises:
            RecordError: the targets of a batch are those of other samples.
        """
        # most batches agree, and several are compared at once
        if (
            self._agreed
            and self._labels is not None
            and np.array_equal(self._labels[np.concatenate(ids)], np.concatenate(targets))
        ):
            return
        for of_batch, own in zip(ids, targets, strict=True):
            seen = own >= 0
            self.check(of_batch[seen], own[seen].astype(np.int64), n_classes)

    def check(
        self, ids: NDArray[np.int64], targets: NDArray[np.int64], n_classes: int | None = None
    ) -> None:
        """Compare the targets of a batch with the labels of its ids.

        Args:
            ids: sample ids of the batch, shape (batch,).
            targets: targets of the batch, shape (batch,).
            n_classes: number of classes of the targets; None: not known.

        Raises:
            RecordError: the targets are those of other samples.
        """
        if self._labels is None or not len(ids):
            return
        labels = self._labels[ids]
        agree = labels == targets
        if agree.all():
            self._agreed = self._agreed or bool((labels != labels[0]).any())
            return
        is_permuted = (
            len(ids) >= _ENOUGH
            and bool((labels != labels[0]).any())
            and np.array_equal(np.sort(labels), np.sort(targets))
        )
        is_like = (
            n_classes is not None
            and self._labels.min() >= 0
            and self._labels.max() == n_classes - 1
        )
        is_strange = is_like and len(ids) >= _ENOUGH and agree.mean() < 0.5
        if self._agreed or is_permuted or is_strange:
            first = int(np.flatnonzero(~agree)[0])
            raise RecordError(
                f"the batch is not in the order of its ids: its target number {first} is "
                f"{targets[first]}, and the label of sample "
                f"{ids[first]} is {labels[first]}"
                + (
                    " (the batch holds the labels of its ids in another order: does a collate "
                    "function sort?)"
                    if is_permuted
                    else ""
                )
                + ". Give the ids in the order of the batch; if sample_labels are not the "
                "targets, give them by "
                "recorder.label_samples() after the last step"
            )
        self._labels = None  # the labels are not the targets: nothing can be checked
