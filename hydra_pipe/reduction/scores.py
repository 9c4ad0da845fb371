"""Weighted inner products of stored rows with a block of test gradients, window by window."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.reduction.segments import DenseSegment, FactoredSegment, Segment

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
    values = stored.astype(np.float32)
    for segment in segments:
        if isinstance(segment, DenseSegment):
            for block, (first, last) in segment.blocks:
                values[:, first:last] *= scale[:, block, None]
        else:
            values[:, slice(*segment.inputs)] *= scale[:, segment.weight, None]
    return TestBlock(values, scale)


def score_rows(
    read: ReadWindow,
    weight: Floats,
    tests: TestBlock,
    segments: Sequence[Segment],
    n_features: int,
    features_at_once: int,
) -> Floats:
    """sum_b weight_b * <r_b, h_b> for each row and test sample, r_b as stored.

    Args:
        read: gives the stored columns of the rows, shape (row, last - first).
        weight: shape (row, block), float32: the step's weight times the row's scale.
        tests: the test block.
        segments: of the layout.
        n_features: columns in all.
        features_at_once: columns to read at a time.

    Returns:
        Shape (row, test), float32.
    """
    scores: Floats = np.zeros((len(weight), tests.n_tests), np.float32)
    pending: dict[FactoredSegment, tuple[Floats, Floats]] = {}
    for first in range(0, n_features, features_at_once):
        last = min(first + features_at_once, n_features)
        stored = read(first, last)
        for segment in segments:
            if isinstance(segment, DenseSegment):
                _add_dense(scores, segment, stored, first, weight, tests)
            else:
                _add_factored(scores, segment, stored, first, weight, tests, pending)
    return scores


def _weighted(stored: NDArray[Any], weight: Floats, out: Floats | None = None) -> Floats:
    """Rows in float32 times their weights: decoded and scaled in one pass over memory."""
    result: Floats = np.multiply(stored, weight[:, None], out=out, dtype=np.float32)
    return result


def _overlap(columns: tuple[int, int], first: int, width: int) -> tuple[int, int] | None:
    low, high = max(columns[0], first), min(columns[1], first + width)
    return (low, high) if low < high else None


def _add_dense(scores: Floats, segment: DenseSegment, stored: NDArray[Any], first: int, weight: Floats, tests: TestBlock) -> None:
    overlap = _overlap(segment.columns, first, stored.shape[1])
    if overlap is None:
        return
    low, high = overlap
    rows: Floats = np.empty((len(stored), high - low), np.float32)
    for block, columns in segment.blocks:
        part = _overlap(columns, low, high - low)
        if part is not None:
            a, b = part
            _weighted(stored[:, a - first : b - first], weight[:, block], rows[:, a - low : b - low])
    scores += rows @ tests.values[:, low:high].T


def _add_factored(
    scores: Floats,
    segment: FactoredSegment,
    stored: NDArray[Any],
    first: int,
    weight: Floats,
    tests: TestBlock,
    pending: dict[FactoredSegment, tuple[Floats, Floats]],
) -> None:
    last = first + stored.shape[1]
    outputs = _overlap(segment.outputs, first, stored.shape[1])
    inputs = _overlap(segment.inputs, first, stored.shape[1])
    if outputs is None and inputs is None:
        return
    output_product, input_product = pending.pop(segment, (None, None))
    if outputs is not None:
        low, high = outputs
        product = stored[:, low - first : high - first].astype(np.float32) @ tests.values[:, low:high].T
        output_product = product if output_product is None else output_product + product
    if inputs is not None:
        low, high = inputs
        product = _weighted(stored[:, low - first : high - first], weight[:, segment.weight]) @ tests.values[:, low:high].T
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
        input_product += weight[:, segment.bias, None] * tests.scale[None, :, segment.bias]
    output_product *= input_product
    scores += output_product
