"""Weighted rows summed by sample: the Hessian-free hypergradients, as far as blocks are not factored.

H(i) = - sum_t alpha(t) c(t) r(i, t), so that R(i, j) = <H(i), h_j>.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.maths.relevance import add_by_sample
from hydra_pipe.plan.layout import Columns
from hydra_pipe.reduction.decoding import decode
from hydra_pipe.reduction.scores import ReadWindow, weighted_columns
from hydra_pipe.reduction.segments import DenseSegment, overlap

Floats = NDArray[np.float32]

# Decoded and added while it stays in the cache: 2 MiB of float32.
_TILE_VALUES = 2**19


class Folder:
    """Adds rows to the sums of their samples.

    Args:
        segments: what is folded; their columns follow one another in the sums.
        n_samples: that are summed.
        n_features: columns of a row in all.
        features_at_once: columns to read at a time.
    """

    def __init__(self, segments: Sequence[DenseSegment], n_samples: int, n_features: int, features_at_once: int) -> None:
        self._segments = segments
        self._n_features, self._features_at_once = n_features, features_at_once
        self._places = places_of(segments)
        self.sums: Floats = np.zeros((n_samples, self._places[-1][1] if segments else 0), np.float32)
        self._tile: Floats = np.empty(0, np.float32)

    def add(self, read: ReadWindow, weight: Floats, samples: NDArray[np.int64], wanted: NDArray[np.bool_]) -> None:
        """Add weighted rows to the sums.

        Args:
            read: gives the stored columns of the rows, shape (row, last - first).
            weight: shape (row, block), float32: the step's weight times the row's scale.
            samples: shape (row,), places in the sums.
            wanted: shape (row,): the rows to add; of the others `samples` is not looked at.
        """
        everything = bool(wanted.all())
        if not everything:
            weight, samples = weight[wanted], samples[wanted]
        for first in range(0, self._n_features, self._features_at_once):
            last = min(first + self._features_at_once, self._n_features)
            parts = [(s, p, overlap(s.columns, first, last)) for s, p in zip(self._segments, self._places, strict=True)]
            if all(part is None for _, _, part in parts):
                continue
            stored = read(first, last)
            if not everything:
                stored = stored[wanted]
            for segment, place, part in parts:
                if part is not None:
                    self._add_segment(segment, place, part, stored, first, weight, samples)

    def _add_segment(
        self,
        segment: DenseSegment,
        place: Columns,
        part: Columns,
        stored: NDArray[np.generic],
        first: int,
        weight: Floats,
        samples: NDArray[np.int64],
    ) -> None:
        low, high = part
        width = high - low
        target = self.sums[:, place[0] + low - segment.columns[0] :][:, :width]
        at_once = max(1, _TILE_VALUES // width)
        if self._tile.size < at_once * width:
            self._tile = np.empty(at_once * width, np.float32)
        for start in range(0, len(stored), at_once):
            rows = slice(start, start + at_once)
            piece = stored[rows, low - first : high - first]
            tile = self._tile[: len(piece) * width].reshape(len(piece), width)
            decode(piece, weighted_columns([segment], low, high, weight[rows]), tile)
            add_by_sample(target, samples[rows], tile)


def places_of(segments: Sequence[DenseSegment]) -> list[Columns]:
    """Where the columns of each segment are in the sums."""
    places, end = [], 0
    for segment in segments:
        places.append((end, end + segment.columns[1] - segment.columns[0]))
        end = places[-1][1]
    return places


def folded_columns(values: Floats, segments: Sequence[DenseSegment]) -> Floats:
    """Of test gradients, shape (test, feature), the columns that are folded, in the order of the sums."""
    if len(segments) == 1:
        return values[:, slice(*segments[0].columns)]
    columns = [values[:, slice(*segment.columns)] for segment in segments]
    return np.concatenate(columns, axis=1) if columns else values[:, :0]
