"""The random projection for anything large: a balanced count sketch.

Every coordinate is given a random sign and one of k buckets. Bucket sizes differ by one at most.
For x, y in R^n and the sketch S, E[<S x, S y>] = <x, y> exactly, and
Var <= (q / k) (|x|^2 |y|^2 + <x, y>^2 - 2 sum x_i^2 y_i^2). Here q = k * max P(two coordinates
share a bucket), which is 1.02 at most. So the sketch is no worse than a Gaussian projection of the
same width (Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", 2009, for
independent buckets). It costs one pass over x.

The coordinates are put in a random order and dealt out to the buckets in turn. If x is long
enough, runs of r neighbours are put in order instead of single coordinates. Memory does this
several times as fast. Neighbours of a run never meet in a bucket. With r and k coprime, any other
two coordinates meet with the chance that two random places meet.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hydra_pipe.maths import row_kernels
from hydra_pipe.maths.row_kernels import SketchColumns
from hydra_pipe.maths.scratch import Scratch
from hydra_pipe.maths.sketch_runs import run_length

_SCRATCH = Scratch()


def philox_of(text: str) -> np.random.Philox:
    """Return the generator that is a function of `text` alone, on any machine.

    Raw Philox words are part of NumPy's compatibility promise. Numbers of Generator are not.
    """
    digest = hashlib.sha256(text.encode()).digest()
    return np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64))


def random_signs(philox: np.random.Philox, n: int) -> Tensor:
    """Return n random signs, the next bits of `philox`, shape (n,), int8. A bit of 1 is -1."""
    words = philox.random_raw(-(-n // 64)).astype("<u8")
    negative = np.unpackbits(words.view(np.uint8), count=n, bitorder="little").view(np.int8)
    return torch.from_numpy(negative).mul_(-2).add_(1)


class Sketch:
    """A projection R^n -> R^k that is a function of (seed, block name, shape, k) alone.

    It is the same in any process, on any machine. It keeps one byte an element and four bytes a
    run. It keeps twice as much once both whole rows and lines were projected.

    Args:
        seed: seed of the run.
        name: name of the block.
        shape: shape of the block; n is its number of elements.
        n_columns: k, at most n.
    """

    def __init__(self, seed: int, name: str, shape: tuple[int, ...], n_columns: int) -> None:
        numel = math.prod(map(int, shape))
        self.n_columns = n_columns
        self._shape = tuple(map(int, shape))
        self._run = run_length(numel, n_columns)
        philox = philox_of(f"{seed}\n{name}\n{tuple(map(int, shape))}")
        order = np.argsort(philox.random_raw(numel // self._run), kind="stable")
        self._order = torch.from_numpy(order.astype(np.int32 if numel < 2**31 else np.int64))
        # Signs in the block's own order, and in the sketch's order once it is needed.
        self._sign = random_signs(philox, numel)
        self._sign_in_order: Tensor | None = None
        self._first_columns: Tensor | None = None
        self._gathers: dict[tuple[int, ...], Tensor] = {}

    def _in_order(self, rows: Tensor) -> Tensor:
        in_runs = rows.reshape(len(rows), -1, self._run)
        return in_runs.index_select(1, self._order).flatten(1)

    def _signs_in_order(self) -> Tensor:
        if self._sign_in_order is None:
            self._sign_in_order = self._in_order(self._sign[None])
        return self._sign_in_order

    def __call__(self, rows: Tensor, order: tuple[int, ...] | None = None) -> Tensor:
        """Project rows of shape (B, n) to (B, k), in their dtype, on their device.

        Args:
            rows: rows to project, shape (B, n).
            order: order of the block's dimensions in the rows. None: the block's own order.
        """
        self._to(rows.device)
        if order is None and row_kernels.takes(rows):
            return row_kernels.sketched(rows.contiguous(), self.columns)
        n_runs = len(self._order)
        mixed = _SCRATCH.take("in order", (len(rows), n_runs, self._run), rows)
        if order is None:
            torch.index_select(
                rows.reshape(len(rows), n_runs, self._run), 1, self._order, out=mixed
            )
        else:
            torch.index_select(rows, 1, self._gather(order), out=mixed.view(len(rows), -1))
        mixed = mixed.flatten(1).mul_(self._signs_in_order())
        k = self.n_columns
        whole = mixed.shape[1] // k * k
        sums = mixed[:, :whole].reshape(len(mixed), -1, k).sum(1)
        rest = mixed[:, whole:]
        sums[:, : rest.shape[1]] += rest
        return sums

    @property
    def columns(self) -> SketchColumns:
        """Signs and columns of the elements, in the block's own order, on the processor."""
        self._to(torch.device("cpu"))
        return SketchColumns(self._columns_of_runs(), self._sign, self._run, self.n_columns)

    def lines(self, numbers: Tensor) -> "SketchedLines":
        """Return the sketch of some lines of the block. No other line is looked at.

        Args:
            numbers: numbers of the lines, shape (U,), int64, ascending.
        """
        self._to(numbers.device)
        return SketchedLines(self, numbers)

    def elements_of(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return columns and signs of the elements of some lines.

        Args:
            numbers: numbers of the lines, shape (U,), int64.

        Returns:
            Two tensors of shape (U, elements of a line), int64 and int8.
        """
        width = math.prod(self._shape[1:])
        columns = self._columns_of_runs()
        if self._run == 1:
            of_lines = columns.view(-1, width).index_select(0, numbers)
        else:
            # An element's run, and its place in the run, are those of the line's first element plus
            # an offset. The offset depends on the place of the first element alone. So one table of
            # runs and one table of places are enough.
            after_first = torch.arange(self._run, device=numbers.device)[:, None] + torch.arange(
                width, device=numbers.device
            )
            starts = numbers * width
            runs = starts.div(self._run, rounding_mode="floor")
            places = starts.sub_(runs * self._run)
            of_elements = (
                (after_first // self._run).int().index_select(0, places).add_(runs.int()[:, None])
            )
            of_lines = columns.index_select(0, of_elements.flatten()).view(of_elements.shape)
            of_lines.add_((after_first % self._run).int().index_select(0, places))
            of_lines.remainder_(self.n_columns)
        return of_lines.long(), self._sign.view(-1, width).index_select(0, numbers)

    def _columns_of_runs(self) -> Tensor:
        """Return the column of the first element of each run, in the block's own order, int32."""
        if self._first_columns is None:
            firsts = (
                torch.arange(len(self._order), device=self._order.device)
                * self._run
                % self.n_columns
            )
            self._first_columns = torch.empty_like(self._order, dtype=torch.int32)
            self._first_columns[self._order.long()] = firsts.int()
        return self._first_columns

    def _gather(self, order: tuple[int, ...]) -> Tensor:
        """Return the place of each element of the sketch's order in rows.

        The rows have their dimensions in `order`.
        """
        found = self._gathers.get(order)
        if found is None:
            numel = math.prod(self._shape)
            places = torch.arange(numel, dtype=torch.int32, device=self._order.device)
            in_own = places.view([self._shape[dim] for dim in order]).permute(
                [order.index(dim) for dim in range(len(order))]
            )
            found = self._gathers[order] = self._in_order(in_own.reshape(1, -1))[0]
        return found

    def _to(self, device: torch.device) -> None:
        if self._order.device != device:
            self._order, self._sign = self._order.to(device), self._sign.to(device)
            self._gathers.clear()
            self._sign_in_order = self._first_columns = None


@dataclass(frozen=True)
class SketchedLines:
    """Sketch of rows that are zero outside of some lines of a block.

    Args:
        sketch: sketch of the whole block.
        numbers: numbers of the lines, shape (U,), int64, ascending.
    """

    sketch: Sketch
    numbers: Tensor

    @cached_property
    def _elements(self) -> tuple[Tensor, Tensor]:
        return self.sketch.elements_of(self.numbers)

    def project(self, values: Tensor, tokens: Tensor) -> Tensor:
        """Project rows that are zero outside of these lines.

        Args:
            values: values to add up in the lines, shape (B, P, elements of a line).
            tokens: number of the line that each entry of `values` is added to, shape (B, P), int64.

        Returns:
            Shape (B, k).
        """
        if row_kernels.takes(values):
            return row_kernels.sketched_lines(tokens, values, self.sketch.columns)
        columns, signs = self._elements
        places = torch.searchsorted(self.numbers, tokens.contiguous()).flatten()
        signed = values.flatten(0, 1) * signs.index_select(0, places)
        of_rows = columns.index_select(0, places).view(len(values), -1)
        return values.new_zeros(len(values), self.sketch.n_columns).scatter_add_(
            1, of_rows, signed.view(len(values), -1)
        )

    def project_all(self, values: Tensor) -> Tensor:
        """Project one row that is zero outside of these lines to shape (k,).

        Args:
            values: values of the row in the lines, shape (U, elements of a line).
        """
        if row_kernels.takes(values):
            return row_kernels.sketched_lines(
                self.numbers[None], values[None], self.sketch.columns
            )[0]
        of_elements, signs = self._elements
        return values.new_zeros(self.sketch.n_columns).scatter_add_(
            0, of_elements.flatten(), (values * signs).flatten()
        )
