"""Gradients as sums over positions of outer products: what layer rules yield before anything is multiplied.

Symbols: B samples in the batch, P positions a sample (pixels, tokens), O output and I input channels or features.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hydra_pipe.maths.kron import Kron
from hydra_pipe.maths.scratch import Scratch
from hydra_pipe.per_sample.patches import Patches, norms, pieces

_SCRATCH = Scratch()


@dataclass(frozen=True)
class Factors:
    """Gradients of B samples as sums over positions of outer products: row_i = sum_p outer(left[i, p], right[i, p]).

    Args:
        left: gradient at the output, shape (B, P, O).
        given_right: what it is multiplied by, shape (B, P, I), or the patches that it consists of; None stands for 1, as in a bias.
        beside: factors with the same `left`, so that its norms are taken once.
    """

    left: Tensor
    given_right: Tensor | Patches | None
    beside: "Factors | None" = None

    @cached_property
    def right(self) -> Tensor | None:
        """What `left` is multiplied by, written out."""
        if isinstance(self.given_right, Patches):
            return self.given_right.written_out(slice(0, len(self.left))).clone()
        return self.given_right

    def right_times(self, matrix: Tensor | None) -> Tensor:
        """`right` times the transpose of `matrix`, which has the shape (k, I), or `right` itself; shape (B, P, k)."""
        if matrix is None:
            assert self.right is not None
            return self.right
        if isinstance(self.given_right, Patches):
            return self.given_right.times(matrix)
        assert self.given_right is not None
        return self.given_right @ matrix.T

    def norms(self) -> Tensor:
        """Upper bound of each row's norm, and of the rounding in it where its terms cancel, shape (B,).

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
        """I; 1 where `right` is None."""
        if self.given_right is None:
            return 1
        return self.given_right.n_pixels if isinstance(self.given_right, Patches) else self.given_right.shape[-1]

    @property
    def n_positions(self) -> int:
        return self.left.shape[1]

    @property
    def order(self) -> tuple[int, ...] | None:
        """The dimensions of the weight in the order that `pieces` has them in; None: their own."""
        return self.given_right.order if isinstance(self.given_right, Patches) else None

    def rows(self) -> Tensor:
        """The gradients written out, shape (B, O * I), or (B, O) where `right` is None."""
        right = self.given_right
        if right is None:
            return self.left.sum(1)
        outputs = self.left.shape[2]
        rows = self.left.new_empty(len(self.left), outputs * self.n_inputs)
        for samples in self._samples():
            if isinstance(right, Patches) and right.order is not None:
                of_weight = right.in_weight_order(self._multiplied(samples), outputs)
                rows[samples].view(of_weight.shape).copy_(of_weight)
            else:
                self._multiply(samples, rows[samples])
        return rows

    def pieces(self) -> Iterator[Tensor]:
        """The rows of a few samples after the other, where `right` is not None. Each is good until the next is asked for.

        Their elements are those of the weight with its dimensions in `order`.
        """
        return map(self._multiplied, self._samples())

    def _samples(self) -> Iterator[slice]:
        row_bytes = self.left.shape[2] * self.n_inputs * self.left.element_size()
        right = self.given_right
        return right.pieces_of_products(row_bytes) if isinstance(right, Patches) else pieces(len(self.left), row_bytes)

    def _multiplied(self, samples: slice) -> Tensor:
        """Rows of some samples as `pieces` has them."""
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
            torch.bmm(left.transpose(1, 2), right[samples], out=out.view(len(left), left.shape[2], -1))


@dataclass(frozen=True, slots=True)
class Summed:
    """Gradients of B samples that are sums over positions, written out.

    Args:
        rows: shape (B, numel).
        bounds: upper bound of the summed norms of each row's terms, shape (B,). Where the terms cancel, the row is their rounding.
    """

    rows: Tensor
    bounds: Tensor


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Gradients of a table of which each sample uses some lines: an embedding's.

    Args:
        tokens: lines that each position of a sample uses, shape (B, P), int64.
        values: gradient at each position, shape (B, P, D); positions of one line add up.
        n_lines: of the table, shape (n_lines, D).
    """

    tokens: Tensor
    values: Tensor
    n_lines: int

    def rows(self) -> Tensor:
        """The gradients written out, shape (B, n_lines * D)."""
        batch, _, width = self.values.shape
        rows = self.values.new_zeros(batch * self.n_lines, width)
        places = self.tokens + self.n_lines * torch.arange(batch, device=self.tokens.device).unsqueeze(1)
        rows.index_add_(0, places.flatten(), self.values.flatten(0, 1))
        return rows.reshape(batch, -1)

    def bounds(self) -> Tensor:
        """Upper bound of each row's norm, shape (B,): the norms of its positions, added up."""
        norms: Tensor = torch.linalg.vector_norm(self.values, dim=2)
        return norms.sum(1)

    def sum_times(self, vector: Tensor) -> Tensor:
        """The sum of all rows, as a table, times `vector` of shape (D,); shape (n_lines,)."""
        return self.values.new_zeros(self.n_lines).index_add_(0, self.tokens.flatten(), (self.values @ vector).flatten())


# What a rule yields for one parameter: factors, sums, lines of a table, or the rows themselves, shape (B, numel).
Contribution = Factors | Summed | TokenRows | Tensor


def rows_of(value: Contribution) -> Tensor:
    """The rows, written out, shape (B, numel)."""
    if isinstance(value, Factors | TokenRows):
        return value.rows()
    return value.rows if isinstance(value, Summed) else value


def bounds_of(value: Contribution) -> Tensor:
    """Upper bound of each row's norm, and of what the row is a sum of, as far as it is known; shape (B,)."""
    if isinstance(value, Factors):
        return value.norms()
    if isinstance(value, TokenRows):
        return value.bounds()
    return value.bounds if isinstance(value, Summed) else torch.linalg.vector_norm(value, dim=1)


def projected(value: Factors | Tensor, kron: Kron) -> Tensor:
    """Project factors, or rows of shape (B, O * I), by `kron`; shape (B, k_out * k_in)."""
    if not isinstance(value, Factors):
        return kron(value)
    if value.given_right is None:
        return kron(value.rows())
    return kron.of_products(value.left, value.right_times)
