"""The steps of a recording in order or from the last to the first, read ahead."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import StoreError
from hydra_pipe.plan.rank_rows import ends_of
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.rows import ROWS_UNREADABLE
from hydra_pipe.streams import Stream
from hydra_pipe.types import F32


@dataclass(frozen=True)
class StepRows:
    """The rows of one step, of all processes.

    Args:
        step: number of the step.
        stored: rows as stored, shape (row, column).
        scale: scale of each block in each row, shape (row, block).
        sample: sample of each row, shape (row,), int64.
        count: number n of rows of the step in the row's process, shape (row,), float32. The
            curvature of the mean loss is the sum of n rho r r.T over the rows.
        rho: curvature weight of each row, shape (row,), float32. 1 where it is not known.
    """

    step: int
    stored: NDArray[Any]
    scale: F32
    sample: NDArray[np.int64]
    count: F32
    rho: F32


@dataclass(frozen=True)
class _Piece:
    """Some rows of one process in a row, and the per-row arrays beside them."""

    stored: NDArray[Any]
    scale: F32
    sample: NDArray[np.int64]
    curvature: F32


class _Part:
    """The rows of one process. Each piece is decoded once, and the next piece is read ahead.

    Args:
        store: the recording.
        first: first row of the process.
        last: one past its last row.
        pool: pool with the thread that reads ahead.
        direction: order of the pieces: 1 forward, -1 backward.
        rows_at_once: number of rows of a piece.
    """

    def __init__(
        self,
        store: Gradients,
        first: int,
        last: int,
        pool: ThreadPoolExecutor,
        direction: int,
        rows_at_once: int,
    ) -> None:
        self._store, self._first, self._last = store, first, last
        self._pool, self._direction, self._size = pool, direction, rows_at_once
        self._held: dict[int, _Piece] = {}
        self._coming: tuple[int, Future[_Piece]] | None = None

    def rows(self, first: int, last: int) -> Iterator[tuple[_Piece, slice]]:
        """Yield the rows [first, last) of the part, piece by piece.

        Later calls must ask for rows further on in the direction of the part.
        """
        size = self._size
        numbers = range(first // size, -(-last // size))
        self._held = {number: piece for number, piece in self._held.items() if number in numbers}
        for number in numbers[:: self._direction]:
            if number not in self._held:
                self._held[number] = self._taken(number)
        for number in numbers:
            low = number * size
            yield self._held[number], slice(max(first - low, 0), min(last - low, size))

    def _taken(self, number: int) -> _Piece:
        piece = (
            self._coming[1].result()
            if self._coming is not None and self._coming[0] == number
            else self._read(number)
        )
        following = number + self._direction
        there = 0 <= following < -(-(self._last - self._first) // self._size)
        self._coming = (following, self._pool.submit(self._read, following)) if there else None
        return piece

    def _read(self, number: int) -> _Piece:
        size = self._size
        own = slice(self._first + number * size, min(self._first + (number + 1) * size, self._last))
        return _Piece(
            self._store.rows.features(own, slice(0, self._store.layout.n_features)),
            self._store.rows.scales(own),
            self._store.samples(own),
            self._store.curvature(own),
        )


def backward(store: Gradients, n_steps: int, rows_at_once: int) -> Stream[StepRows]:
    """Stream the first `n_steps` steps, the last of them first. Close the stream after use.

    Memory holds two pieces of each process, or as many as a step spans, and one more that a thread
    reads ahead. A piece has `rows_at_once` rows. No later step overwrites the arrays of a step.

    Raises:
        StoreError: the recording is damaged.
    """
    return _in_order(store, range(n_steps - 1, -1, -1), -1, rows_at_once)


def forward(store: Gradients, n_steps: int, rows_at_once: int) -> Stream[StepRows]:
    """Stream the steps after the first `n_steps`, in order. Else the same as `backward`."""
    return _in_order(store, range(n_steps, store.n_steps), 1, rows_at_once)


def _in_order(
    store: Gradients, steps: range, direction: int, rows_at_once: int
) -> Stream[StepRows]:
    pool = ThreadPoolExecutor(1, "hydra-pipe reader")
    return Stream(
        _steps(store, steps, direction, rows_at_once, pool),
        partial(pool.shutdown, cancel_futures=True),
    )


def _steps(
    store: Gradients, steps: range, direction: int, rows_at_once: int, pool: ThreadPoolExecutor
) -> Iterator[StepRows]:
    counts = counted_rows(store)
    part_ends = ends_of(store.rows.part_rows)
    ends = np.cumsum(counts, axis=0)
    parts = [
        _Part(store, first, last, pool, direction, rows_at_once)
        for first, last in zip([0, *part_ends], part_ends, strict=False)
    ]
    for step in steps:
        pieces = [
            (piece, rows, int(counts[step, i]))
            for i, part in enumerate(parts)
            if counts[step, i]
            for piece, rows in part.rows(int(ends[step, i] - counts[step, i]), int(ends[step, i]))
        ]
        yield _joined(step, pieces) if pieces else _without_rows(step, store)


def counted_rows(store: Gradients) -> NDArray[np.int64]:
    """Return the number of rows of each step, by process, shape (step, rank).

    The rows of a process are in the order of its steps.

    Raises:
        StoreError: the steps count other rows than there are.
    """
    _, counts = store.rows_of_steps()
    if (counts < 0).any() or tuple(counts.sum(axis=0)) != tuple(store.rows.part_rows):
        raise StoreError(
            f"{store.path}: its steps count other rows than there are: {ROWS_UNREADABLE}"
        )
    return counts


def _without_rows(step: int, store: Gradients) -> StepRows:
    """Return a step without rows: momentum and decay alone moved the parameters."""
    none: F32 = np.empty(0, np.float32)
    stored = np.empty((0, store.layout.n_features), store.rows.dtype)
    return StepRows(
        step,
        stored,
        np.empty((0, len(store.layout.blocks)), np.float32),
        np.empty(0, np.int64),
        none,
        none,
    )


def _joined(step: int, pieces: list[tuple[_Piece, slice, int]]) -> StepRows:
    def one(arrays: list[NDArray[Any]]) -> NDArray[Any]:
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    rho = [
        np.where(np.isnan(piece.curvature[rows]), np.float32(1), piece.curvature[rows])
        for piece, rows, _ in pieces
    ]
    return StepRows(
        step,
        one([piece.stored[rows] for piece, rows, _ in pieces]),
        one([piece.scale[rows] for piece, rows, _ in pieces]),
        one([piece.sample[rows] for piece, rows, _ in pieces]),
        one([np.full(len(of), n, np.float32) for of, (_, _, n) in zip(rho, pieces, strict=True)]),
        one(rho).astype(np.float32),
    )
