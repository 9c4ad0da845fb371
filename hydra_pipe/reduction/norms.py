"""Squared norms of stored rows, window by window, without multiplying factors out."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.reduction.column_groups import DenseSegment, FactoredSegment, Segment, overlap
from hydra_pipe.reduction.kernels import Workspace, decode
from hydra_pipe.reduction.scores import ReadWindow
from hydra_pipe.store.data.preconditioner import Preconditioner
from hydra_pipe.types import F32, F64


class SquaredNorms:
    """Squared norms of rows of one layout. The buffer is reused from call to call.

    Args:
        segments: segments of the layout.
        n_features: number of stored columns.
        features_at_once: number of columns to read at a time.
        preconditioner: factors D^(1/2) of the rows. None: none.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        n_features: int,
        features_at_once: int,
        preconditioner: Preconditioner | None = None,
    ) -> None:
        self._segments, self._n_features, self._features_at_once = (
            segments,
            n_features,
            features_at_once,
        )
        self._preconditioner = preconditioner
        self._workspace = Workspace()

    def __call__(self, read: ReadWindow, weight: NDArray[np.floating]) -> F64:
        """Return sum_b weight_b |r_b|^2 for each row, with r_b as stored.

        |r_b|^2 of a factored block is |outputs|^2 |inputs|^2.

        Args:
            read: function that returns the stored columns [first, last) of the rows, shape
                (row, last - first).
            weight: weight of each block in each row, with the square of its scale in it, shape
                (row, block).

        Returns:
            Shape (row,), float64.
        """
        total = np.zeros(len(weight))
        # squares of outputs and of inputs, summed up because each may span several windows
        factors = {
            segment: np.zeros((2, len(weight)))
            for segment in self._segments
            if isinstance(segment, FactoredSegment)
        }
        for first in range(0, self._n_features, self._features_at_once):
            last = min(first + self._features_at_once, self._n_features)
            stored = read(first, last)
            values = self._workspace.matrix(*stored.shape)
            decode(stored, [(0, last - first, None)], values)
            if self._preconditioner is not None:
                values *= self._preconditioner.columns[first:last]
            for segment in self._segments:
                if isinstance(segment, DenseSegment):
                    for block, columns in segment.blocks:
                        total += weight[:, block] * _squares(values, columns, first, last)
                else:
                    factors[segment][0] += _squares(values, segment.outputs, first, last)
                    factors[segment][1] += _squares(values, segment.inputs, first, last)
        for segment, (outputs, inputs) in factors.items():
            total += weight[:, segment.weight] * outputs * inputs
            if segment.bias is not None:
                total += weight[:, segment.bias] * outputs * self._factor_of(segment.bias)
        return total

    def _factor_of(self, bias: int) -> float:
        """Return the square of the factor that a factored bias has beside its columns."""
        root = 1.0 if self._preconditioner is None else float(self._preconditioner.biases[bias])
        return root**2


def _squares(values: F32, columns: tuple[int, int], first: int, last: int) -> F64:
    """Return for each row the sum of squares over the part of `columns` inside the window."""
    part = overlap(columns, first, last)
    if part is None:
        return np.zeros(len(values))
    own = values[:, part[0] - first : part[1] - first]
    squares: F64 = np.einsum("ij,ij->i", own, own).astype(np.float64)
    return squares


def inverse_norms(squares: F64) -> F32:
    """Return 1 / |r| of each row, shape (row,), float32. 0 where r is 0."""
    return np.where(squares > 0, 1 / np.sqrt(np.where(squares > 0, squares, 1)), 0).astype(
        np.float32
    )
