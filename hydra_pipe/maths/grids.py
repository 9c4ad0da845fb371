"""Random coordinates of large blocks, in small grids, for rows that a preconditioner makes alike.

Symbols: X and Y gradients of shape (O, I), n = O I elements; a grid has g_o outputs and g_i inputs,
g = g_o g_i elements, all of them drawn; m grids make k = m g columns.

G X has the elements X[o, i] sqrt(n / k) of each grid. An element is in a grid with chance g / n, so
E<G X, G Y> = <X, Y> exactly. With z = x_oi y_oi, S = sum z^2, R the sum of squares of its row sums,
C of its column sums, and A = (sum z)^2, a grid's estimate T has

    E[T^2] = (n/g)^2 (p_11 S + p_12 (R - S) + p_21 (C - S) + p_22 (A - R - C + S)),
    p_11 = g / n,  p_12 = p_11 (g_i - 1)/(I - 1),  p_21 = p_11 (g_o - 1)/(O - 1),
    p_22 = p_11 (g_i - 1)(g_o - 1)/((I - 1)(O - 1)),

and Var<G X, G Y> = (E[T^2] - A) / m.

No row is formed: if X = sum_p l_p r_p', a grid needs g_o elements of l_p and g_i elements of r_p.
Adam's preconditioner makes the elements of a row alike in size, so that a drawn element stands for
the others. It is known at the elements, so rows are stored without it. Rows of other optimisers
have few large elements: there a sketch is nearer (benchmarks/RESULTS.md).
"""

import math

import numpy as np
import torch
from torch import Tensor

from hydra_pipe.maths import row_kernels
from hydra_pipe.maths.row_kernels import GridElements
from hydra_pipe.maths.sketch import philox_of
from hydra_pipe.types import I64

# The most elements of factors that are taken at once.
_MOST_TAKEN = 2**22


class Grids:
    """A projection R^(O I) -> R^k that is a function of (seed, block name, sides, k) alone.

    Args:
        seed: seed of the run.
        name: name of the block.
        sides: (O, I).
        grid: (g_o, g_i), at most the sides.
        n_columns: k, a multiple of g_o g_i.

    Raises:
        ValueError: a grid does not fit the sides, or k is no multiple of its size.
    """

    def __init__(
        self, seed: int, name: str, sides: tuple[int, int], grid: tuple[int, int], n_columns: int
    ) -> None:
        n_grids, rest = divmod(n_columns, grid[0] * grid[1])
        if rest or not n_grids or not all(1 <= g <= s for g, s in zip(grid, sides, strict=True)):
            raise ValueError(
                f"{name}: {n_columns} columns are no number of grids {grid} of {sides}"
            )
        self.sides, self._grid = sides, grid
        philox = philox_of(f"{seed}\n{name}\n{tuple(sides)}\n{tuple(grid)}")
        outputs, inputs = (
            torch.from_numpy(_distinct(philox, n_grids, size, of))
            for size, of in zip(grid, sides, strict=True)
        )
        # in the order of the columns: grid, output, input
        self._elements = (outputs[:, :, None] * sides[1] + inputs[:, None]).flatten()
        self._outputs, self._inputs = outputs.flatten(), inputs.flatten()
        self._scale = math.sqrt(sides[0] * sides[1] / n_columns)

    @property
    def elements(self) -> Tensor:
        """Number of each column's element in the flattened block, shape (k,), int64."""
        return self._elements

    @property
    def columns(self) -> GridElements:
        """Outputs and inputs of the grids, in the order of the columns, on the processor."""
        self._to(torch.device("cpu"))
        return GridElements(self._outputs, self._inputs, self._grid, self._scale)

    def __call__(self, rows: Tensor, elements: Tensor | None = None) -> Tensor:
        """Project rows of shape (B, n) to (B, k), in their dtype, on their device.

        Args:
            rows: rows to project, shape (B, n).
            elements: place of each column's element in the rows, from `elements_in`. None: rows
                are in the block's own order.
        """
        self._to(rows.device)
        own = self._elements if elements is None else elements
        return rows.index_select(1, own).mul_(self._scale)

    def elements_in(self, shape: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
        """Return the place of each column's element in rows with another order of dimensions.

        Args:
            shape: shape of the block.
            order: order of the block's dimensions in the rows.
        """
        places = torch.empty(math.prod(shape), dtype=torch.int64)
        own = torch.arange(len(places)).view(shape).permute(order).flatten()
        places[own] = torch.arange(len(places))
        return places[self._elements.cpu()].to(self._elements.device)

    def of_factors(self, left: Tensor, right: Tensor) -> Tensor:
        """Project sum_p outer(left[:, p], right[:, p]), a few samples at a time.

        Args:
            left: shape (B, P, O).
            right: shape (B, P, I).

        Returns:
            Shape (B, k), in the dtype of `left`.
        """
        self._to(left.device)
        if row_kernels.takes(left, right):
            return row_kernels.elements(left, right, self.columns)
        (batch, n_positions, _), k = left.shape, len(self._elements)
        taken = n_positions * (len(self._outputs) + len(self._inputs))
        at_once = max(1, _MOST_TAKEN // taken)
        found = left.new_empty(batch, k)
        for low in range(0, batch, at_once):
            own = slice(low, low + at_once)
            # positions last: a grid's products are then of neighbours in memory
            outputs, inputs = (
                values[own].transpose(1, 2).contiguous().index_select(1, numbers)
                for values, numbers in ((left, self._outputs), (right, self._inputs))
            )
            n_out, n_in = self._grid
            torch.bmm(
                outputs.view(-1, n_out, n_positions),
                inputs.view(-1, n_in, n_positions).transpose(1, 2),
                out=found[own].view(-1, n_out, n_in),
            )
        return found.mul_(self._scale)

    def _to(self, device: torch.device) -> None:
        if self._elements.device != device:
            self._elements, self._outputs, self._inputs = (
                values.to(device) for values in (self._elements, self._outputs, self._inputs)
            )


def _distinct(philox: np.random.Philox, n_grids: int, size: int, of: int) -> I64:
    """Return `size` different numbers below `of` for each grid, shape (grid, size), int64.

    Number j is drawn among the of - j numbers that are left: a word modulo of - j counts the
    numbers that were not drawn.
    """
    found = np.empty((n_grids, size), np.int64)
    for j in range(size):
        words = philox.random_raw(n_grids)
        drawn = (words % np.uint64(of - j)).astype(np.int64)
        for earlier in np.sort(found[:, :j], axis=1).T:
            drawn += drawn >= earlier
        found[:, j] = drawn
    return found
