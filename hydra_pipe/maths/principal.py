"""Principal directions of rows, and how many of them to take of each part of a row.

Symbols: X rows of a part, shape (row, column); lambda_k and u_k the eigenvalues and eigenvectors of
X.T X, the largest first: the energies and the principal directions.

A part of a row is a vector, or the outer product of two vectors, its sides. With k_1 directions of
one side and k_2 of the other, the part has k_1 k_2 coordinates. They hold the energy
E = sum_i lambda_i sum_j lambda_j / sum lambda if both sides have the same sum of energies.
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from math import prod

import numpy as np

from hydra_pipe.types import F32, F64

# Energies below this share of the largest are rounding of float32.
_ROUNDING = 1e-7


def principal_directions(rows: F32, most: int) -> tuple[F64, F32]:
    """Return the energies and the principal directions of rows, the largest first.

    Args:
        rows: X, shape (row, column), float32.
        most: largest number of directions to return.

    Returns:
        The energies, shape (direction,), float64, and the directions, shape (column, direction),
        float32, orthonormal. There are at most as many as rows, and none without energy.
    """
    n_rows, width = rows.shape
    wide = width > n_rows
    values, vectors = np.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    energies = values[::-1].astype(np.float64)
    # A product of float32 has rounding errors of the largest energy.
    alive = int((energies > _ROUNDING * max(energies[0], 0.0)).sum()) if energies.size else 0
    n = min(alive, most)
    found = vectors[:, ::-1][:, :n]
    if wide:
        found, _ = np.linalg.qr(rows.T @ found)
    return energies[:n], np.ascontiguousarray(found, np.float32)


def chosen_sides(
    energies: Sequence[Sequence[F64]], budgets: Sequence[int]
) -> list[list[tuple[int, ...]]]:
    """Return how many directions of each side of each part to take, for several numbers of columns.

    Directions are taken one by one: the one that adds the most energy for each column that it adds.
    So a larger budget takes the directions of a smaller one, and more.

    Args:
        energies: energies of each side of each part, the largest first; one or two sides a part.
        budgets: numbers of columns, ascending.

    Returns:
        For each budget the number of directions of each side, by part. All are 0 for a part that
        gets no column.
    """
    parts = [_Part(sides) for sides in energies]
    steps = [(-gain, index) for index, part in enumerate(parts) if (gain := part.gain()) > 0]
    heapify(steps)
    found, used = [], 0
    for budget in budgets:
        while steps:
            index = steps[0][1]
            if used + parts[index].columns > budget:
                break
            heappop(steps)
            used += parts[index].columns
            parts[index].take()
            gain = parts[index].gain()
            if gain > 0:
                heappush(steps, (-gain, index))
        found.append([tuple(part.taken) for part in parts])
    return found


class _Part:
    """Directions of a part that are taken so far, and the next one.

    Args:
        energies: energies of each side.
    """

    def __init__(self, energies: Sequence[F64]) -> None:
        self._energies = energies
        self._sums = [np.concatenate([[0.0], np.cumsum(side)]) for side in energies]
        self._total = max(self._sums[0][-1], np.finfo(np.float64).tiny)
        self.taken = [0] * len(energies)
        self._next = tuple(self.taken)
        self.columns = 0  # columns that the next direction adds

    def gain(self) -> float:
        """Choose the next direction. Return its energy a column; 0 if none is left."""
        now, best = prod(self.taken), 0.0
        held = self._energy(self.taken)
        for following in self._following():
            columns = prod(following) - now
            gain = (self._energy(following) - held) / columns
            if gain > best:
                best, self._next, self.columns = gain, following, columns
        return best

    def take(self) -> None:
        """Take the direction that `gain` has chosen."""
        self.taken = list(self._next)

    def _following(self) -> list[tuple[int, ...]]:
        if not any(self.taken):
            whole = all(side.size for side in self._energies)
            return [(1,) * len(self.taken)] if whole else []
        return [
            tuple(n + (i == side) for i, n in enumerate(self.taken))
            for side, energies in enumerate(self._energies)
            if self.taken[side] < len(energies)
        ]

    def _energy(self, taken: Sequence[int]) -> float:
        of_sides = [float(sums[n]) for sums, n in zip(self._sums, taken, strict=True)]
        return float(prod(of_sides) / self._total ** (len(of_sides) - 1))
