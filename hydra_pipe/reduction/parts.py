"""Parts of a row that a basis takes directions of: outer products, and vectors.

A factored weight is an outer product of two sides, its output factor and its input factor. All
other blocks of a series, and the biases that share output factors, are one vector: one side. Inner
products and squared norms of parts are products over their sides. So no part is multiplied out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.plan.layout import ColumnRange, Layout
from hydra_pipe.reduction.column_groups import FactoredSegment, segments_of
from hydra_pipe.reduction.kernels import decode
from hydra_pipe.store.data.preconditioner import Preconditioner
from hydra_pipe.types import F32, F64, I64

# values of each side of a part, shape (row, column)
Sides = tuple[F32, ...]
A = TypeVar("A", F32, F64)


@dataclass(frozen=True)
class _Run:
    """Stored columns of a side, and the block whose scale multiplies them; None for 1."""

    columns: ColumnRange
    block: int | None

    @property
    def width(self) -> int:
        return self.columns[1] - self.columns[0]


@dataclass(frozen=True)
class Part:
    """A part of a row: the outer product of its sides.

    Args:
        series: index of the series that the part's blocks follow.
        sides: runs of stored columns of each side, in order.
    """

    series: int
    sides: tuple[tuple[_Run, ...], ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of columns of each side."""
        return tuple(sum(run.width for run in side) for side in self.sides)

    def of(self, stored: NDArray[Any], weight: F32) -> Sides:
        """Return the part of rows.

        Args:
            stored: rows as stored, shape (row, feature), each row contiguous.
            weight: weight of each block in each row, shape (row, block), float32.
        """
        found = []
        for side, width in zip(self.sides, self.widths, strict=True):
            values, first = np.empty((len(stored), width), np.float32), 0
            for run in side:
                own = values[:, first : first + run.width]
                whole = (0, run.width, None if run.block is None else weight[:, run.block])
                decode(stored[:, slice(*run.columns)], [whole], own)
                first += run.width
            found.append(values)
        return tuple(found)

    def root(self, preconditioner: Preconditioner) -> tuple[F32, ...]:
        """Return D^(1/2) of the columns of each side. An outer product has the nearest such one."""
        alone = len(self.sides) == 1
        return tuple(
            np.concatenate([_root(preconditioner, run, alone=alone) for run in side])
            for side in self.sides
        )


def _root(preconditioner: Preconditioner, run: _Run, *, alone: bool) -> F32:
    columns = preconditioner.columns[slice(*run.columns)]
    # a bias has a factor of its own beside that of the columns which it shares
    return columns if run.block is None or not alone else columns * preconditioner.biases[run.block]


def parts_of(layout: Layout, series: I64) -> list[Part]:
    """Return the parts that hold every block of a layout once.

    Args:
        layout: layout of the stored columns.
        series: index of the series of each block, shape (block,), int64.
    """
    found, vectors = [], dict[int, list[_Run]]()

    def add(block: int, columns: ColumnRange) -> None:
        vectors.setdefault(int(series[block]), []).append(_Run(columns, block))

    for segment in segments_of(layout):
        if isinstance(segment, FactoredSegment):
            sides = ((_Run(segment.outputs, segment.weight),), (_Run(segment.inputs, None),))
            found.append(Part(int(series[segment.weight]), sides))
            if segment.bias is not None:
                add(segment.bias, segment.outputs)
        else:
            for block, columns in segment.blocks:
                add(block, columns)
    return found + [Part(number, (tuple(runs),)) for number, runs in vectors.items()]


def squared_norms(sides: Sides) -> F32:
    """Return the squared norm of a part of each row, shape (row,), float32."""
    return product([np.einsum("rc,rc->r", side, side) for side in sides])


def product(of_sides: Sequence[A]) -> A:
    """Return the product of a quantity of each side, shape (row,), in the dtype of the first."""
    found = np.ones_like(of_sides[0])
    for own in of_sides:
        found *= own
    return found


def products(rows: Sides, tests: Sides) -> F32:
    """Return the inner products of a part of rows and of tests, shape (row, test), float32."""
    first, *others = (row @ test.T for row, test in zip(rows, tests, strict=True))
    for other in others:
        first *= other
    return first


def outer(sides: Sides, out: F32) -> None:
    """Fill `out`, shape (row, coordinate), with the outer products of the sides."""
    first, *others = sides
    if not others:
        np.copyto(out, first)
        return
    shape = (len(first), first.shape[1], others[0].shape[1])
    np.multiply(first[:, :, None], others[0][:, None, :], out=out.reshape(shape, copy=False))


def rotated(sides: Sides, directions: Sequence[F32]) -> Sides:
    """Return the coordinates of each side along its directions, shape (row, direction)."""
    return tuple(side @ own for side, own in zip(sides, directions, strict=True))


def leading(sides: Sides, taken: Sequence[int]) -> Sides:
    """Return the first coordinates of each side, as many as are taken."""
    return tuple(side[:, :n] for side, n in zip(sides, taken, strict=True))
