"""Weighted inner products of stored rows with a block of test gradients, window by window."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.plan.layout import ColumnRange
from hydra_pipe.reduction.column_groups import (
    DenseSegment,
    FactoredSegment,
    Segment,
    has_part,
    overlap,
)
from hydra_pipe.reduction.kernels import Weighted, Workspace, add_products, decode
from hydra_pipe.store.data.preconditioner import Preconditioner
from hydra_pipe.types import F32

# function that returns the columns [first, last) of the present rows, as stored
ReadWindow = Callable[[int, int], NDArray[Any]]


def window_of(stored: NDArray[Any]) -> ReadWindow:
    """Return a function that returns columns of rows in memory, of shape (row, feature)."""
    return lambda first, last: stored[:, first:last]


@dataclass(frozen=True)
class TestBlock:
    """Test gradients, decoded so that each segment needs one product.

    Args:
        values: decoded columns, shape (test, feature), float32. Dense columns and input factors are
            multiplied by the scale of their block. Output factors are as stored.
        scale: scale of each block in each test gradient, shape (test, block), float32.
    """

    __test__ = False  # pytest would collect the class by its name

    values: F32
    scale: F32

    @property
    def n_tests(self) -> int:
        return len(self.values)


def decode_tests(
    stored: NDArray[Any],
    scale: F32,
    segments: Sequence[Segment],
    preconditioner: Preconditioner | None = None,
) -> TestBlock:
    """Decode stored test gradients into a test block.

    Args:
        stored: test gradients as stored, shape (test, feature).
        scale: scale of each block in each test gradient, shape (test, block), float32.
        segments: segments of the layout.
        preconditioner: D^(1/2). Test gradients are multiplied by D, so that rows need no factor.
    """
    values = np.empty(stored.shape, np.float32)
    decode(
        np.ascontiguousarray(stored), weighted_columns(segments, 0, stored.shape[1], scale), values
    )
    if preconditioner is not None:
        values *= np.square(preconditioner.columns)
        scale = scale * np.square(preconditioner.biases)
    return TestBlock(values, scale)


def weighted_columns(
    segments: Sequence[Segment], first: int, last: int, weight: F32
) -> list[Weighted]:
    """Return the runs of columns to decode in a window, with the weight of the rows in each run.

    The weight of a factored block goes to its input factor only, so that a product has it once.

    Args:
        segments: segments whose columns are decoded.
        first: first column of the window. Columns of the result count from it.
        last: one past the last column of the window.
        weight: weight of each block in each row or test gradient, shape (row, block).
    """
    found: list[Weighted] = []

    def add(columns: tuple[int, int], own: F32 | None) -> None:
        part = overlap(columns, first, last)
        if part is not None:
            found.append((part[0] - first, part[1] - first, own))

    for segment in segments:
        if isinstance(segment, DenseSegment):
            for block, columns in segment.blocks:
                add(columns, weight[:, block])
        else:
            add(segment.outputs, None)
            add(segment.inputs, weight[:, segment.weight])
    return found


class Scorer:
    """Products of rows with a test block. The buffers are reused from call to call.

    Args:
        tests: the test block.
        segments: segments of the layout that are scored. Other segments add nothing.
        n_features: number of stored columns.
        features_at_once: number of columns to read at a time.
    """

    def __init__(
        self, tests: TestBlock, segments: Sequence[Segment], n_features: int, features_at_once: int
    ) -> None:
        self._tests, self._segments = tests, segments
        self._n_features, self._features_at_once = n_features, features_at_once
        self._workspace = Workspace()

    def __call__(self, read: ReadWindow, weight: F32) -> F32:
        """Return sum_b weight_b * <r_b, h_b> for each row and test sample, with r_b as stored.

        Args:
            read: function that returns the stored columns [first, last) of the rows, shape
                (row, last - first).
            weight: the step's weight times the row's scale, shape (row, block), float32.

        Returns:
            Shape (row, test), float32.
        """
        scores: F32 = np.zeros((len(weight), self._tests.n_tests), np.float32)
        pending: dict[FactoredSegment, tuple[F32, F32]] = {}
        for first in range(0, self._n_features, self._features_at_once):
            last = min(first + self._features_at_once, self._n_features)
            met = [segment for segment in self._segments if has_part(segment, first, last)]
            if not met:
                continue
            window = _Stored(read(first, last), first, last, weight)
            for segment in met:
                if isinstance(segment, DenseSegment):
                    self._add_product(scores, segment, segment.columns, window)
                else:
                    self._add_factored(scores, segment, window, pending)
        return scores

    def _add_product(
        self, total: F32, segment: Segment, columns: ColumnRange, window: "_Stored"
    ) -> None:
        """Add the products over the part of a segment's `columns` that is in the window."""
        part = overlap(columns, window.first, window.last)
        if part is not None:
            low, high = part
            stored = window.values[:, low - window.first : high - window.first]
            weighted = weighted_columns([segment], low, high, window.weight)
            add_products(stored, weighted, self._tests.values[:, low:high], total, self._workspace)

    def _add_factored(
        self,
        scores: F32,
        segment: FactoredSegment,
        window: "_Stored",
        pending: dict[FactoredSegment, tuple[F32, F32]],
    ) -> None:
        if segment not in pending:
            pending[segment] = (np.zeros_like(scores), np.zeros_like(scores))
        of_outputs, of_inputs = pending[segment]
        self._add_product(of_outputs, segment, segment.outputs, window)
        self._add_product(of_inputs, segment, segment.inputs, window)
        if window.last < segment.last_column:
            return
        del pending[segment]
        if segment.bias is not None:
            of_inputs += (
                window.weight[:, segment.bias, None] * self._tests.scale[None, :, segment.bias]
            )
        of_outputs *= of_inputs
        scores += of_outputs


@dataclass(frozen=True)
class _Stored:
    """Columns [first, last) of some rows as stored, and the rows' weights, shape (row, block)."""

    values: NDArray[Any]
    first: int
    last: int
    weight: F32
