"""The inner loops over stored rows: decode, weigh, multiply with test gradients, sum by sample.

Stored values become float32, times a weight for each row and run of columns. The compiled loops
(`_kernels.c`) read each value once and use it while it is in a register. Without them NumPy does
the same, in as few passes over memory as it allows.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.maths.relevance import add_by_sample
from hydra_pipe.types import F32

compiled: ModuleType | None
WHY_NOT: str
try:
    from hydra_pipe.reduction import _kernels

    compiled, WHY_NOT = _kernels, ""
except ImportError as error:
    compiled, WHY_NOT = (
        None,
        f"they need a C compiler at installation, and x86-64 with AVX2 ({error})",
    )

# columns [first, last) and the weight of each row in them, or None for 1
Weighted = tuple[int, int, F32 | None]

# With more test samples, decoding rows first and a matrix product of BLAS are faster than the
# compiled products of stored values.
FEW_TESTS = 16
# Values converted at a time, so that they stay in the cache: 4 MiB of float32. With fewer values
# NumPy's own cost of each operation shows.
_TILE_VALUES = 2**20
# The bits of a float16 are moved to the place of exponent and fraction in a float32. The result is
# 2^112 times too small, for subnormal numbers too.
_FRACTION_BITS = 13
# 0x8fffffff: clears the copies of the sign bit that widening has put below the sign
_SIGN_AND_VALUE = np.int32(-0x70000001)
_FLOAT16_UNIT = np.float32(2.0**112)
# A larger weight times that unit would overflow float32.
_LARGEST_WEIGHT = np.float32(2.0**15)


class Workspace:
    """Memory for decoded rows, reused from call to call."""

    def __init__(self) -> None:
        self._buffer: F32 = np.empty(0, np.float32)

    def matrix(self, rows: int, columns: int) -> F32:
        """Return an uninitialised float32 matrix. The next call reuses the same memory."""
        if self._buffer.size < rows * columns:
            self._buffer = np.empty(rows * columns, np.float32)
        return self._buffer[: rows * columns].reshape(rows, columns)


def decode(stored: NDArray[Any], columns: Sequence[Weighted], out: F32) -> None:
    """Do `out[:, first:last] = stored[:, first:last] * weight` for each run of columns, in float32.

    Args:
        stored: stored rows, shape (row, column), float16, int8 or float32, finite, each row
            contiguous.
        columns: runs of columns that do not overlap. Columns outside all runs stay undefined.
        out: array to fill, shape (row, column), float32, contiguous.
    """
    if compiled is None:
        _decode_by_numpy(stored, columns, out)
        return
    for first, last, weight in columns:
        compiled.decode(stored[:, first:last], weight, out[:, first:last])


def add_products(
    stored: NDArray[Any], columns: Sequence[Weighted], tests: F32, scores: F32, workspace: Workspace
) -> None:
    """Do `scores += (stored * weight) @ tests.T`, in float32.

    Args:
        stored: stored rows, shape (row, column), as in `decode`.
        columns: runs of columns that do not overlap and cover every column.
        tests: test gradients, shape (test, column), each row contiguous.
        scores: sums to add to, shape (row, test), contiguous.
        workspace: memory for decoded rows.
    """
    if compiled is not None and len(tests) <= FEW_TESTS:
        for first, last, weight in columns:
            compiled.dots(stored[:, first:last], weight, tests[:, first:last], scores)
        return
    rows = workspace.matrix(*stored.shape)
    decode(stored, columns, rows)
    scores += rows @ tests.T


def add_rows(rows: F32, places: NDArray[np.int64], sums: F32) -> None:
    """Do `sums[places[k]] += rows[k]` for every k. Places may repeat.

    Args:
        rows: rows to add, shape (row, column), each row contiguous.
        places: place of each row in the sums, shape (row,), int64. Rows with a negative place are
            left out.
        sums: sums to add to, shape (sample, column), each row contiguous, changed in place.

    Raises:
        IndexError: a place is beyond the sums.
    """
    if compiled is not None:
        compiled.fold(rows, None, places, sums)
        return
    wanted = places >= 0
    if not wanted.all():
        rows, places = rows[wanted], places[wanted]
    add_by_sample(sums, places, rows)


def fold(
    stored: NDArray[Any],
    columns: Sequence[Weighted],
    places: NDArray[np.int64],
    sums: F32,
    workspace: Workspace,
) -> None:
    """Do `sums[places[k]] += stored[k] * weight[k]` for every k, in float32. Places may repeat.

    Args:
        stored: stored rows, shape (row, column), as in `decode`.
        columns: runs of columns that do not overlap and cover every column.
        places: place of each row in the sums, shape (row,), int64. Rows with a negative place are
            left out.
        sums: sums to add to, shape (sample, column), each row contiguous, changed in place.
        workspace: memory for decoded rows.

    Raises:
        IndexError: a place is beyond the sums.
    """
    if compiled is not None:
        for first, last, weight in columns:
            compiled.fold(stored[:, first:last], weight, places, sums[:, first:last])
        return
    at_once = max(1, _TILE_VALUES // max(1, stored.shape[1]))
    for start in range(0, len(stored), at_once):
        rows = slice(start, start + at_once)
        piece = stored[rows]
        tile = workspace.matrix(*piece.shape)
        decode(
            piece,
            [(first, last, None if w is None else w[rows]) for first, last, w in columns],
            tile,
        )
        add_rows(tile, places[rows], sums)


def _decode_by_numpy(stored: NDArray[Any], columns: Sequence[Weighted], out: F32) -> None:
    """Decode without the compiled loops.

    NumPy converts float16 one value at a time. Integer operations on its bits are vectorised, and
    three times as fast.
    """
    if not stored.size:
        return
    # NaN counts as too large: the comparison is false, and the plain conversion keeps it NaN
    by_bits = stored.dtype == np.float16 and all(
        w is None or np.abs(w).max() < _LARGEST_WEIGHT for _, _, w in columns
    )
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
    """Join neighbouring columns. Return each run's first column, one past its last, its parts."""
    runs: list[tuple[int, int, list[Weighted]]] = []
    for column in sorted(columns, key=lambda c: c[0]):
        first, last, _ = column
        if runs and runs[-1][1] == first:
            left, _, parts = runs[-1]
            runs[-1] = (left, last, [*parts, column])
        else:
            runs.append((first, last, [column]))
    return runs
