"""Weighted rows summed by sample: the Hessian-free hypergradients of blocks that are not factored.

H(i) = - sum_t alpha(t) c(t) r(i, t), so that R(i, j) = <H(i), h_j>.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.plan.layout import ColumnRange
from hydra_pipe.reduction.column_groups import DenseSegment, overlap
from hydra_pipe.reduction.kernels import Workspace, fold
from hydra_pipe.reduction.scores import ReadWindow, weighted_columns
from hydra_pipe.types import F32


class Folder:
    """Sums of weighted rows by sample.

    Args:
        segments: segments to sum. Their columns follow one another in the sums.
        n_samples: number of samples in the sums.
        n_features: number of stored columns of a row.
        features_at_once: number of columns to read at a time.
    """

    def __init__(
        self,
        segments: Sequence[DenseSegment],
        n_samples: int,
        n_features: int,
        features_at_once: int,
    ) -> None:
        self._segments = segments
        self._n_features, self._features_at_once = n_features, features_at_once
        self._places = places_of(segments)
        self.sums: F32 = np.zeros((n_samples, self._places[-1][1] if segments else 0), np.float32)
        self._workspace = Workspace()

    def add(self, read: ReadWindow, weight: F32, places: NDArray[np.int64]) -> None:
        """Add weighted rows to the sums.

        Args:
            read: function that returns the stored columns [first, last) of the rows, shape
                (row, last - first).
            weight: the step's weight times the row's scale, shape (row, block), float32.
            places: place of each row's sample in the sums, shape (row,), int64. Rows with a
                negative place are left out.
        """
        for first in range(0, self._n_features, self._features_at_once):
            last = min(first + self._features_at_once, self._n_features)
            parts = [
                (s, p, overlap(s.columns, first, last))
                for s, p in zip(self._segments, self._places, strict=True)
            ]
            if all(part is None for _, _, part in parts):
                continue
            stored = read(first, last)
            for segment, place, part in parts:
                if part is not None:
                    low, high = part
                    target = self.sums[:, place[0] + low - segment.columns[0] :][:, : high - low]
                    weighted = weighted_columns([segment], low, high, weight)
                    fold(
                        stored[:, low - first : high - first],
                        weighted,
                        places,
                        target,
                        self._workspace,
                    )


def places_of(segments: Sequence[DenseSegment]) -> list[ColumnRange]:
    """Return the columns of each segment in the sums."""
    places, end = [], 0
    for segment in segments:
        places.append((end, end + segment.columns[1] - segment.columns[0]))
        end = places[-1][1]
    return places


def folded_columns(values: F32, segments: Sequence[DenseSegment]) -> F32:
    """Select the columns that are folded, in the order of the sums.

    Args:
        values: test gradients, shape (test, feature).
        segments: segments that are summed.
    """
    if len(segments) == 1:
        return values[:, slice(*segments[0].columns)]
    columns = [values[:, slice(*segment.columns)] for segment in segments]
    return np.concatenate(columns, axis=1) if columns else values[:, :0]
