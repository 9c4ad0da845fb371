"""The rows of one step, in blocks of bounded size."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hydra_pipe.plan.rank_rows import ends_of
from hydra_pipe.reduction.steps import counted_rows
from hydra_pipe.reduction.weights import StepWeights
from hydra_pipe.rewinding.products import RowBlock, at_once
from hydra_pipe.store import names
from hydra_pipe.store.data import rankings
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.recording import SoFar
from hydra_pipe.store.data.rows import check_within


class StepIndex:
    """The places of the rows of each step.

    Args:
        store: the recording.

    Raises:
        StoreError: damaged.
    """

    def __init__(self, store: Gradients) -> None:
        self._counts = counted_rows(store)
        starts = np.array([0, *ends_of(store.rows.part_rows)][:-1])
        self._ends = np.cumsum(self._counts, axis=0) + starts

    def rows(self, step: int) -> list[slice]:
        """Return the rows of a step, a slice for each process that has some."""
        ends = self._ends[step].tolist()
        return [
            slice(end - n, end)
            for end, n in zip(ends, self._counts[step].tolist(), strict=True)
            if n
        ]


def joined_column(read: Callable[[slice], NDArray[Any]], rows: list[slice]) -> NDArray[Any]:
    """Return a column of the rows of a step, in order."""
    return np.concatenate([read(own) for own in rows]) if rows else read(slice(0, 0))


def samples_of(store: Gradients, rows: list[slice], n_samples: int) -> NDArray[np.int64]:
    """Return the sample of each row. Raises: StoreError: damaged."""
    found: NDArray[np.int64] = joined_column(store.samples, rows)
    check_within(found, n_samples, f"samples of {store.path}")
    return found


class StepRows:
    """The rows of one step, to be weighed in more than one way.

    Args:
        store: the recording.
        step: number of the step.
        rows: its rows.
    """

    def __init__(self, store: Gradients, step: int, rows: list[slice]) -> None:
        self._store, self._step = store, step
        height = at_once(store.layout)
        self._pieces = [
            slice(low, min(low + height, own.stop))
            for own in rows
            for low in range(own.start, own.stop, height)
        ]
        # A step of one block is read once. More blocks are read again whenever they are needed.
        self._read = cache(self._stored) if len(self._pieces) == 1 else self._stored

    def _stored(self, low: int, high: int) -> NDArray[Any]:
        return self._store.rows.features(slice(low, high), slice(0, self._store.layout.n_features))

    def weighed(self, weights: StepWeights) -> list[RowBlock]:
        """Return the rows in blocks, with the step's weight times their scales.

        Raises:
            StoreError: damaged.
        """
        steps = np.array([self._step])
        return [
            RowBlock(
                partial(self._read, piece.start, piece.stop),
                weights.of_rows(
                    np.repeat(steps, piece.stop - piece.start), self._store.rows.scales(piece)
                ),
            )
            for piece in self._pieces
        ]


def labels_column(
    recording: SoFar, ids: NDArray[np.int64], targets: NDArray[np.integer[Any]]
) -> pa.Array:
    """Return the label of training samples as a column of a table.

    Args:
        recording: the recording.
        ids: the samples, shape (sample,).
        targets: class that the loss compared each of them with, shape (sample,). It is the label
            where the recorded labels are not known.
    """
    labels = recording.gradients.labels(names.TRAIN_LABELS)
    if labels is None or len(labels) != recording.n_samples:
        return class_column(targets)
    return rankings.label_column(labels, ids, rankings.label_type(labels))


def class_column(classes: NDArray[np.integer[Any]]) -> pa.Array:
    """Return numbers of classes as a column of a table. A negative number is null."""
    return pa.array(classes.astype(np.int64), pa.int64(), mask=classes < 0)
