"""Stored values to float32, times a weight for each row and run of columns, in as few passes over memory as NumPy allows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
# columns [first, last) and the weight of each row in them, or None for 1
Weighted = tuple[int, int, Floats | None]

# Values that are converted while they stay in the cache: 4 MiB of float32. With fewer, NumPy's own cost of each operation shows.
_TILE_VALUES = 2**20
# A float16's bits, moved to where float32 has exponent and fraction, say a number 2^112 times too small; subnormal ones too.
_FRACTION_BITS = 13
_SIGN_AND_VALUE = np.int32(-0x70000001)  # 0x8fffffff: without the copies of the sign that widening has put below it
_FLOAT16_UNIT = np.float32(2.0**112)
# Beyond this a weight times that unit is not a float32 any more.
_LARGEST_WEIGHT = np.float32(2.0**15)


def decode(stored: NDArray[Any], columns: Sequence[Weighted], out: Floats) -> None:
    """`out[:, first:last] = stored[:, first:last] * weight` for each run of columns, in float32.

    NumPy converts float16 one value at a time; integer operations on its bits are vectorised, and three times as fast.

    Args:
        stored: shape (row, column), float16, int8 or float32, each row contiguous, finite.
        columns: runs that do not overlap. Columns in none of them are left undefined.
        out: shape (row, column), float32, contiguous.
    """
    if not stored.size:
        return
    # not a number counts as too large, so that it comes out as such
    by_bits = stored.dtype == np.float16 and all(w is None or np.abs(w).max() < _LARGEST_WEIGHT for _, _, w in columns)
    unit = _FLOAT16_UNIT if by_bits else np.float32(1)
    for left, right, parts in _runs(columns):
        rows_at_once = max(1, _TILE_VALUES // (right - left))
        for low in range(0, len(stored), rows_at_once):
            rows = slice(low, low + rows_at_once)
            given, tile = stored[rows, left:right], out[rows, left:right]
            if by_bits:
                bits = tile.view(np.int32)
                np.copyto(bits, given.view(np.int16))
                np.left_shift(bits, _FRACTION_BITS, out=bits)
                np.bitwise_and(bits, _SIGN_AND_VALUE, out=bits)
            else:
                np.copyto(tile, given)
            for first, last, weight in parts:
                if weight is not None:
                    tile[:, first - left : last - left] *= (weight[rows] * unit)[:, None]
                elif by_bits:
                    tile[:, first - left : last - left] *= unit


def _runs(columns: Sequence[Weighted]) -> list[tuple[int, int, list[Weighted]]]:
    """Runs of neighbouring columns: first, last, and what they are made of."""
    runs: list[tuple[int, int, list[Weighted]]] = []
    for column in sorted(columns, key=lambda c: c[0]):
        first, last, _ = column
        if runs and runs[-1][1] == first:
            left, _, parts = runs[-1]
            runs[-1] = (left, last, [*parts, column])
        else:
            runs.append((first, last, [column]))
    return runs
