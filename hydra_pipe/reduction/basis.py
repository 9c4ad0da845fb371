"""The basis of a sweep: principal directions of rows and test gradients, in nested boxes.

The *core* is the span of some principal directions of each part of a row. A sweep carries its
adjoints there. Larger *boxes* have more directions of the outer products. A *shell* is what a box
has beyond the box inside it; the last shell is all that the largest box leaves.

Directions are found from rows spread over the run and from test gradients, all of them at unit
norm, so that early rows, which are long, do not decide alone. Rows weigh as much as tests.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import Any, Self

import numpy as np

from hydra_pipe.maths.principal import chosen_sides, principal_directions
from hydra_pipe.plan.basis_sweep import BOXES, boxes_of
from hydra_pipe.reduction.parts import (
    Part,
    Sides,
    leading,
    outer,
    product,
    products,
    rotated,
    squared_norms,
)
from hydra_pipe.store.data.preconditioner import Preconditioner
from hydra_pipe.types import F32, F64, Floating

# directions of each side of each part that a box takes
_Box = tuple[tuple[int, ...], ...]
# function of the directions that a box takes, None for all, and of the place of a part
OfBox = Callable[[tuple[int, ...] | None, int], F32]


@dataclass(frozen=True)
class Basis:
    """Directions of the sides of parts, and how many of them each box takes.

    Args:
        parts: the parts of a row.
        directions: directions of each side of each part, times D^(1/2), shape (column, direction),
            float32. Without D^(1/2) they are orthonormal.
        squares: D of each side of each part, shape (column,), float32; None without D.
        boxes: directions of each side of each part, by box. The first box is the core.
    """

    parts: tuple[Part, ...]
    directions: tuple[tuple[F32, ...], ...]
    squares: tuple[tuple[F32, ...], ...] | None
    boxes: tuple[_Box, ...]

    @property
    def width(self) -> int:
        """Number of coordinates of the core."""
        return self.spans[-1][1] if self.spans else 0

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """First coordinate of each part in the core, one past its last, and its series."""
        sizes = [prod(taken) for taken in self.boxes[0]]
        return [
            (end - size, end, part.series)
            for part, size, end in zip(self.parts, sizes, accumulate(sizes), strict=True)
            if size
        ]

    @property
    def series_of_shells(self) -> list[int]:
        """The series of each shell, ascending."""
        return [number for number in self._series for _ in self.boxes]

    @property
    def _series(self) -> list[int]:
        return sorted({part.series for part in self.parts})

    def coordinates(self, rows: "Rotated", out: F32) -> None:
        """Fill `out`, shape (row, width), float32, with the coordinates of rows in the core."""
        for place, (first, last, _) in zip(self._in_core(), self.spans, strict=True):
            outer(leading(rows.along[place], self.boxes[0][place]), out[:, first:last])

    def _in_core(self) -> list[int]:
        return [place for place, taken in enumerate(self.boxes[0]) if any(taken)]

    def rotated(self, whole: Sequence[Sides]) -> "Rotated":
        """Return the coordinates of parts of rows along all directions, beside the parts."""
        return Rotated(
            whole, [rotated(sides, own) for sides, own in zip(whole, self.directions, strict=True)]
        )

    def multiplied(self, whole: Sequence[Sides]) -> list[Sides]:
        """Return parts of tests times D, so that products with rows need no D."""
        if self.squares is None:
            return list(whole)
        return [
            tuple(side * square for side, square in zip(sides, squares, strict=True))
            for sides, squares in zip(whole, self.squares, strict=True)
        ]

    def by_shell(self, of_box: OfBox) -> F32:
        """Return a quantity of each shell of each series, from that of nested boxes.

        Args:
            of_box: function of the directions that a box takes, None for the whole part, and of the
                part's place. It returns the quantity inside the box, an array of float32.

        Returns:
            Shape (shell, ...), float32: the shells of the first series, then of the next.
        """
        found: list[F32] = []
        for number in self._series:
            inside: list[Any] = [0] * (len(self.boxes) + 1)
            for place, part in enumerate(self.parts):
                if part.series != number:
                    continue
                value, held = None, None
                for box, taken in enumerate((*(box[place] for box in self.boxes), None)):
                    # boxes that take the same directions have the same value
                    if value is None or taken != held:
                        value, held = of_box(taken, place), taken
                    inside[box] = inside[box] + value
            found.extend(outer - inner for inner, outer in pairwise(inside))
        return np.stack(found)

    def scores(self, rows: "Rotated", tests: "Rotated") -> F32:
        """Return the products of rows and tests in each shell, shape (shell, row, test), float32.

        Args:
            rows: parts of rows.
            tests: parts of tests. The whole parts are `multiplied`.
        """
        return self.by_shell(lambda taken, i: _products(rows, tests, taken, i))

    def squared_norms(self, tests: "Rotated", whole: Sequence[Sides]) -> F32:
        """Return the squared norms of tests in each shell, shape (shell, test), float32.

        Args:
            tests: parts of tests. The whole parts are `multiplied`.
            whole: parts of tests, not multiplied.
        """

        def of_box(taken: tuple[int, ...] | None, i: int) -> F32:
            if taken is not None:
                return squared_norms(leading(tests.along[i], taken))
            sides = zip(whole[i], tests.whole[i], strict=True)
            return product([np.einsum("rc,rc->r", side, own) for side, own in sides])

        return np.maximum(self.by_shell(of_box), 0)

    # ------------------------------------------------------------------ kept on the disk

    def arrays(self) -> dict[str, Floating]:
        """Return the directions by name."""
        return {
            f"{place}/{side}": own
            for place, sides in enumerate(self.directions)
            for side, own in enumerate(sides)
        }

    @classmethod
    def of_state(
        cls,
        parts: Sequence[Part],
        preconditioner: Preconditioner | None,
        boxes: Any,
        arrays: Mapping[str, Floating],
    ) -> Self | None:
        """Return the basis that `boxes` and `arrays` were taken from; None if they do not fit."""
        try:
            directions = tuple(
                tuple(arrays[f"{place}/{side}"] for side in range(len(part.sides)))
                for place, part in enumerate(parts)
            )
            of_boxes = tuple(tuple(tuple(map(int, taken)) for taken in box) for box in boxes)
            most = tuple(tuple(own.shape[1] for own in sides) for sides in directions)
        except (KeyError, TypeError, ValueError, IndexError):
            return None
        widths = tuple(tuple(len(own) for own in sides) for sides in directions)
        if widths != tuple(part.widths for part in parts) or of_boxes[-1:] != (most,):
            return None
        return cls(tuple(parts), directions, _squares(parts, preconditioner), of_boxes)


@dataclass(frozen=True)
class Rotated:
    """Parts of rows or tests.

    Args:
        whole: sides of each part.
        along: coordinates of each side of each part along its directions.
    """

    whole: Sequence[Sides]
    along: Sequence[Sides]


def _products(rows: Rotated, tests: Rotated, taken: tuple[int, ...] | None, place: int) -> F32:
    if taken is None:
        return products(rows.whole[place], tests.whole[place])
    return products(leading(rows.along[place], taken), leading(tests.along[place], taken))


def fitted(
    parts: Sequence[Part],
    preconditioner: Preconditioner | None,
    groups: Sequence[Sequence[Sides]],
    rank: int,
) -> Basis:
    """Return the basis of rows and test gradients.

    Args:
        parts: the parts of a row.
        preconditioner: D^(1/2) of the columns. None: none.
        groups: parts of some rows, and parts of tests, without D^(1/2). Each group weighs the same.
        rank: number of columns of the core.
    """
    roots = None if preconditioner is None else [part.root(preconditioner) for part in parts]
    usable = [_usable(_times(whole, roots)) for whole in groups]
    found = [
        tuple(
            principal_directions(
                np.concatenate([_side(whole[i], side, share) for whole, share in usable]),
                # a vector is in no box but the core
                rank if len(part.sides) == 1 else rank * BOXES[-1],
            )
            for side in range(len(part.sides))
        )
        for i, part in enumerate(parts)
    ]
    budgets = [rank * times for times in boxes_of(len({part.series for part in parts}))]
    core, *larger = chosen_sides(
        [tuple(energies for energies, _ in sides) for sides in found], budgets
    )
    # The vectors outside of the core are one shell: their coordinates would cost more than a sweep.
    boxes = [
        tuple(
            of_core if len(of_core) == 1 else taken
            for of_core, taken in zip(core, box, strict=True)
        )
        for box in (core, *larger)
    ]
    directions = tuple(
        tuple(
            _scaled(own[:, :n], None if roots is None else roots[i][side])
            for side, ((_, own), n) in enumerate(zip(sides, boxes[-1][i], strict=True))
        )
        for i, sides in enumerate(found)
    )
    return Basis(tuple(parts), directions, _squares(parts, preconditioner), tuple(boxes))


def _times(whole: Sequence[Sides], roots: Sequence[Sides] | None) -> Sequence[Sides]:
    if roots is None:
        return whole
    return [
        tuple(side * root for side, root in zip(sides, own, strict=True))
        for sides, own in zip(whole, roots, strict=True)
    ]


def _usable(whole: Sequence[Sides]) -> tuple[list[Sides], F64]:
    """Return the rows that have a direction, and the factor of the squared norm of each.

    The factor gives every row the same squared norm, and all rows together 1. Rows without a
    gradient, and rows that are not finite, have no direction.
    """
    squares: F64 = np.sum([squared_norms(sides) for sides in whole], axis=0, dtype=np.float64)
    usable = np.isfinite(squares) & (squares > 0)
    rows = [tuple(side[usable] for side in sides) for sides in whole]
    return rows, 1 / squares[usable] / max(1, int(usable.sum()))


def _side(sides: Sides, side: int, share: F64) -> F32:
    """Return a side of each row, as long as its row's part is."""
    others: list[F64] = [share]
    others += [np.einsum("rc,rc->r", o, o) for i, o in enumerate(sides) if i != side]
    return (sides[side] * np.sqrt(product(others))[:, None]).astype(np.float32)


def _scaled(directions: F32, root: F32 | None) -> F32:
    return np.ascontiguousarray(directions if root is None else root[:, None] * directions)


def _squares(
    parts: Sequence[Part], preconditioner: Preconditioner | None
) -> tuple[Sides, ...] | None:
    if preconditioner is None:
        return None
    return tuple(tuple(np.square(root) for root in part.root(preconditioner)) for part in parts)
