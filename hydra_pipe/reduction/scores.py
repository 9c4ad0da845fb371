"""Weighted inner products of stored rows with a block of test gradients, window by window."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.reduction.decoding import Weighted, decode
from hydra_pipe.reduction.segments import DenseSegment, FactoredSegment, Segment, overlap

Floats = NDArray[np.float32]
# columns [first, last) of the rows at hand, as stored
ReadWindow = Callable[[int, int], NDArray[Any]]


@dataclass(frozen=True)
class TestBlock:
    """Test gradients, decoded so that each segment needs one product.

    Args:
        values: shape (test, feature), float32. Dense columns and input factors are multiplied by their block's scale;
            output factors are as stored.
        scale: shape (test, block), float32.
    """

    __test__ = False  # not a test case, whatever pytest makes of the name

    values: Floats
    scale: Floats

    @property
    def n_tests(self) -> int:
        return len(self.values)


def decode_tests(stored: NDArray[Any], scale: Floats, segments: Sequence[Segment]) -> TestBlock:
    """A test block from what is stored: values of shape (test, feature), scales of shape (test, block)."""
    values = np.empty(stored.shape, np.float32)
    decode(np.ascontiguousarray(stored), weighted_columns(segments, 0, stored.shape[1], scale), values)
    return TestBlock(values, scale)


def weighted_columns(segments: Sequence[Segment], first: int, last: int, weight: Floats) -> list[Weighted]:
    """How to decode the columns [first, last) of rows or test gradients: each block's weight where it enters once.

    Args:
        segments: of which the columns in that window are decoded.
        first, last: columns; those of the result count from `first`.
        weight: shape (row, block).
    """
    found: list[Weighted] = []

    def add(columns: tuple[int, int], own: Floats | None) -> None:
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
    """Scores rows against a test block. Keeps its buffers from call to call.

    Args:
        tests: the test block.
        segments: of the layout, those to be scored; what other segments add is left out.
        n_features: columns in all.
        features_at_once: columns to read at a time.
    """

    def __init__(self, tests: TestBlock, segments: Sequence[Segment], n_features: int, features_at_once: int) -> None:
        self._tests, self._segments = tests, segments
        self._n_features, self._features_at_once = n_features, features_at_once
        self._buffer: Floats = np.empty(0, np.float32)

    def __call__(self, read: ReadWindow, weight: Floats) -> Floats:
        """sum_b weight_b * <r_b, h_b> for each row and test sample, r_b as stored.

        Args:
            read: gives the stored columns of the rows, shape (row, last - first).
            weight: shape (row, block), float32: the step's weight times the row's scale.

        Returns:
            Shape (row, test), float32.
        """
        scores: Floats = np.zeros((len(weight), self._tests.n_tests), np.float32)
        pending: dict[FactoredSegment, tuple[Floats, Floats]] = {}
        for first in range(0, self._n_features, self._features_at_once):
            last = min(first + self._features_at_once, self._n_features)
            columns = weighted_columns(self._segments, first, last, weight)
            if not columns:
                continue
            rows = self._rows(len(weight), last - first)
            decode(read(first, last), columns, rows)
            for segment in self._segments:
                if isinstance(segment, DenseSegment):
                    part = overlap(segment.columns, first, last)
                    if part is not None:
                        scores += self._product(rows, part, first)
                else:
                    self._add_factored(scores, segment, rows, (first, last), weight, pending)
        return scores

    def _rows(self, n: int, width: int) -> Floats:
        if self._buffer.size < n * width:
            self._buffer = np.empty(n * width, np.float32)
        return self._buffer[: n * width].reshape(n, width)

    def _product(self, rows: Floats, columns: tuple[int, int], first: int) -> Floats:
        low, high = columns
        product: Floats = rows[:, low - first : high - first] @ self._tests.values[:, low:high].T
        return product

    def _add_factored(
        self,
        scores: Floats,
        segment: FactoredSegment,
        rows: Floats,
        window: tuple[int, int],
        weight: Floats,
        pending: dict[FactoredSegment, tuple[Floats, Floats]],
    ) -> None:
        first, last = window
        outputs, inputs = overlap(segment.outputs, first, last), overlap(segment.inputs, first, last)
        if outputs is None and inputs is None:
            return
        output_product, input_product = pending.pop(segment, (None, None))
        if outputs is not None:
            product = self._product(rows, outputs, first)
            output_product = product if output_product is None else output_product + product
        if inputs is not None:
            product = self._product(rows, inputs, first)
            input_product = product if input_product is None else input_product + product
        if last < segment.last_column:
            zero = np.zeros_like(scores)
            pending[segment] = (
                zero if output_product is None else output_product,
                zero if input_product is None else input_product,
            )
            return
        assert output_product is not None
        assert input_product is not None
        if segment.bias is not None:
            input_product += weight[:, segment.bias, None] * self._tests.scale[None, :, segment.bias]
        output_product *= input_product
        scores += output_product
