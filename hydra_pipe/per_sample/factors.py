"""Gradients as sums over positions of outer products: results of layer rules before any product.

Symbols: B samples in the batch, P positions a sample (pixels, tokens), O output and I input
channels or features.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hydra_pipe.maths import row_kernels
from hydra_pipe.maths.kron import Kron
from hydra_pipe.maths.row_kernels import Projection
from hydra_pipe.maths.scratch import Scratch
from hydra_pipe.per_sample.patches import Patches, norms, pieces

_SCRATCH = Scratch()


@dataclass(frozen=True)
class Factors:
    """Gradients of B samples as sums over positions of outer products.

    row_i = sum_p outer(left[i, p], right[i, p]).

    Args:
        left: gradient at the output, shape (B, P, O).
        given_right: right factor, shape (B, P, I), or the patches that it consists of. None stands
            for 1, as in a bias.
        beside: factors with the same `left`, so that the norms of `left` are taken once.
    """

    left: Tensor
    given_right: Tensor | Patches | None
    beside: "Factors | None" = None

    @cached_property
    def right(self) -> Tensor | None:
        """Right factor, written out, shape (B, P, I). None stands for 1."""
        if isinstance(self.given_right, Patches):
            return self.given_right.written_out(slice(0, len(self.left))).clone()
        return self.given_right

    def right_times(self, matrix: Tensor | None) -> Tensor:
        """Return `right` times the transpose of `matrix`, shape (B, P, k), or `right` itself.

        Args:
            matrix: matrix of shape (k, I). None: `right` itself is returned.
        """
        if matrix is None:
            assert self.right is not None
            return self.right
        if isinstance(self.given_right, Patches):
            return self.given_right.times(matrix)
        assert self.given_right is not None
        return self.given_right @ matrix.T

    def norms(self) -> Tensor:
        """Return an upper bound of each row's norm, shape (B,).

        It also bounds the rounding in a row whose terms cancel.
        |sum_p outer(l_p, r_p)| <= |l| |r| over all positions (Cauchy-Schwarz).
        """
        left, right = self._left_norms, self.given_right
        if right is None:
            return left.mul(self.n_positions**0.5)
        return left.mul(right.norms() if isinstance(right, Patches) else norms(right))

    @cached_property
    def _left_norms(self) -> Tensor:
        found: Tensor = norms(self.left) if self.beside is None else self.beside._left_norms
        return found

    @property
    def n_inputs(self) -> int:
        """I. It is 1 if `right` is None."""
        if self.given_right is None:
            return 1
        return (
            self.given_right.n_pixels
            if isinstance(self.given_right, Patches)
            else self.given_right.shape[-1]
        )

    @property
    def n_positions(self) -> int:
        return self.left.shape[1]

    @property
    def order(self) -> tuple[int, ...] | None:
        """Order of the weight's dimensions in `pieces`. None: the weight's own order."""
        return self.given_right.order if isinstance(self.given_right, Patches) else None

    def rows(self) -> Tensor:
        """Return the gradients written out, shape (B, O * I), or (B, O) if `right` is None."""
        right = self.given_right
        if right is None:
            return self.left.sum(1)
        found = self.by_loops()
        if found is not None:
            return found
        outputs = self.left.shape[2]
        rows = self.left.new_empty(len(self.left), outputs * self.n_inputs)
        for samples in self._samples():
            if isinstance(right, Patches) and right.order is not None:
                of_weight = right.in_weight_order(self._multiplied(samples), outputs)
                rows[samples].view(of_weight.shape).copy_(of_weight)
            else:
                self._multiply(samples, rows[samples])
        return rows

    def by_loops(self, into: Callable[[], Projection] | None = None) -> Tensor | None:
        """Return the rows, or their projection, by the compiled loops.

        Args:
            into: function that returns the projection; None: the rows themselves.

        Returns:
            Shape (B, O * I), or (B, k) with a projection. None if the loops do not take the
            factors, or torch is faster.
        """
        right = self.given_right
        if not isinstance(right, Patches) or not row_kernels.takes(self.left, right.pixels):
            return None
        projection = None if into is None else into()
        width = self.left.shape[2] * self.n_inputs if projection is None else projection.n_columns
        return right.multiply_all(self.left, self.left.new_empty(len(self.left), width), projection)

    def pieces(self) -> Iterator[Tensor]:
        """Yield the rows of a few samples after the other. `right` must not be None.

        A piece is good until the next piece is asked for. Its elements are the elements of the
        weight with its dimensions in `order`.
        """
        return map(self._multiplied, self._samples())

    def _samples(self) -> Iterator[slice]:
        row_bytes = self.left.shape[2] * self.n_inputs * self.left.element_size()
        right = self.given_right
        return (
            right.pieces_of_products(row_bytes)
            if isinstance(right, Patches)
            else pieces(self.left, row_bytes)
        )

    def _multiplied(self, samples: slice) -> Tensor:
        """Return the rows of some samples, as in `pieces`."""
        shape = (samples.stop - samples.start, self.left.shape[2] * self.n_inputs)
        rows = _SCRATCH.take("rows", shape, self.left)
        self._multiply(samples, rows)
        return rows

    def _multiply(self, samples: slice, out: Tensor) -> None:
        left, right = self.left[samples], self.given_right
        assert right is not None
        if isinstance(right, Patches):
            right.multiply(samples, left, out)
        else:
            torch.bmm(
                left.transpose(1, 2), right[samples], out=out.view(len(left), left.shape[2], -1)
            )


@dataclass(frozen=True, slots=True)
class Summed:
    """Gradients of B samples that are sums over positions, written out.

    Args:
        rows: gradients, shape (B, numel).
        bounds: upper bound of the summed norms of each row's terms, shape (B,). If the terms
            cancel, the row is their rounding.
    """

    rows: Tensor
    bounds: Tensor


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Gradients of a table of which each sample uses some lines, such as an embedding.

    Args:
        tokens: lines that each position of a sample uses, shape (B, P), int64.
        values: gradient at each position, shape (B, P, D). Positions of one line add up.
        n_lines: number of lines of the table, which has the shape (n_lines, D).
    """

    tokens: Tensor
    values: Tensor
    n_lines: int

    def rows(self) -> Tensor:
        """Return the gradients written out, shape (B, n_lines * D)."""
        batch, _, width = self.values.shape
        rows = self.values.new_zeros(batch * self.n_lines, width)
        places = self.tokens + self.n_lines * torch.arange(
            batch, device=self.tokens.device
        ).unsqueeze(1)
        rows.index_add_(0, places.flatten(), self.values.flatten(0, 1))
        return rows.reshape(batch, -1)

    def bounds(self) -> Tensor:
        """Return an upper bound of each row's norm, shape (B,).

        It is the sum of the norms of the sample's positions.
        """
        norms: Tensor = torch.linalg.vector_norm(self.values, dim=2)
        return norms.sum(1)

    def sum_times(self, vector: Tensor) -> Tensor:
        """Return the sum of all rows, as a table, times `vector`. Shape (n_lines,).

        Args:
            vector: vector of shape (D,).
        """
        return self.values.new_zeros(self.n_lines).index_add_(
            0, self.tokens.flatten(), (self.values @ vector).flatten()
        )


# Result of a rule for one parameter: factors, sums, lines of a table, or the rows themselves,
# shape (B, numel).
Contribution = Factors | Summed | TokenRows | Tensor


def rows_of(value: Contribution) -> Tensor:
    """Return the rows, written out, shape (B, numel)."""
    if isinstance(value, Factors | TokenRows):
        return value.rows()
    return value.rows if isinstance(value, Summed) else value


def bounds_of(value: Contribution) -> Tensor:
    """Return an upper bound of each row's norm, shape (B,).

    It also bounds the terms of the row, if they are known.
    """
    if isinstance(value, Factors):
        return value.norms()
    if isinstance(value, TokenRows):
        return value.bounds()
    return value.bounds if isinstance(value, Summed) else torch.linalg.vector_norm(value, dim=1)


def projected(value: Contribution, kron: Kron) -> Tensor:
    """Project the rows by `kron`, without writing out what are sums of products.

    Shape (B, k_out * k_in).
    """
    if isinstance(value, Factors) and value.given_right is not None:
        return kron.of_products(value.left, value.right_times)
    return kron(rows_of(value))
