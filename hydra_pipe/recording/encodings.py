"""Encodings of a block, one class each: columns of rows, and both sides of the gradient's check.

The check compares the sum of a step's rows with the gradient that the optimiser uses. The encoding
chooses the form of both sides. If rows are stored as they are, the sides are compared as columns.
If rows are preconditioned or factored, both sides are multiplied by a random vector u, the *probe*
(`hydra_pipe.maths.gradient_check`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from hydra_pipe.errors import LayerError
from hydra_pipe.maths.kron import Kron
from hydra_pipe.maths.sketch import Sketch, SketchedLines
from hydra_pipe.per_sample.factors import (
    Contribution,
    Factors,
    Summed,
    TokenRows,
    bounds_of,
    projected,
    rows_of,
)
from hydra_pipe.plan.layout import Block, Encoding


@dataclass(slots=True)  # not frozen: a step makes several, and frozen ones are slow to make
class Given:
    """A contribution and its place in the batch.

    Args:
        value: contribution of some samples of the batch.
        first: place of the first of these samples in the batch.
    """

    value: Contribution
    first: int


@dataclass(slots=True)
class Reduced(Given):
    """A contribution in the least memory: columns of its block, or factors of a factored block.

    Args:
        norm: upper bound of the summed norms of the rows and of their terms, a scalar; None if the
            rows give it.
        expected: sum of the rows before preconditioning, in the form of the check; None if the rows
            are not preconditioned.
        lines: numbers of the lines of a table that may be nonzero; None if any line may be.
    """

    norm: Tensor | None = None
    expected: Tensor | None = None
    lines: Tensor | None = None


class BlockEncoding(ABC):
    """An encoding of one block.

    Args:
        block: entry of the block directory.
        seed: seed of the run's random projections.
        preconditioned: True if rows are multiplied by the root of a preconditioner.
    """

    #: True if the columns are factors of the rows
    is_factored = False

    def __init__(self, block: Block, seed: int, *, preconditioned: bool) -> None:
        self.block, self._preconditioned = block, preconditioned
        self._columns = slice(*block.columns)
        self._probe = (
            _probe(seed, prod(block.shape[1:])) if preconditioned and len(block.shape) > 1 else None
        )

    @property
    def check_width(self) -> int:
        """Number of values on each side of the check."""
        if not self._preconditioned:
            return self._columns.stop - self._columns.start
        return self.block.numel if self._probe is None else self.block.shape[0]

    def takes_lines(self, given: Sequence[Given]) -> bool:
        """Tell whether `reduce` looks only at the lines of a table that the contributions use."""
        return False

    @abstractmethod
    def reduce(
        self, given: Given, root: Tensor | None = None, lines: Tensor | None = None
    ) -> Reduced:
        """Return the contribution in the block's columns, times `root` if it is given.

        Args:
            given: the contribution.
            root: root of the preconditioner, of the block's shape or of `lines` only; None if rows
                are not preconditioned.
            lines: sorted numbers of the lines in `root`; None if `root` has all lines.
        """

    @abstractmethod
    def project_gradient(self, gradient: Tensor, given: Sequence[Reduced]) -> Tensor:
        """Return the gradient in the columns of its rows, if rows are stored as they are.

        Args:
            gradient: whole gradient of the block.
            given: contributions whose sum should be the gradient.

        Returns:
            The columns, one dimension.
        """

    def write_gradient(
        self, gradient: Tensor, given: Sequence[Reduced], out: Tensor
    ) -> Tensor | None:
        """Write the gradient's side of the check to `out`, or return it for the caller to copy."""
        if self._probe is None:
            return (
                gradient.reshape(-1)
                if self._preconditioned
                else self.project_gradient(gradient, given)
            )
        matrix = gradient if gradient.dim() == 2 else gradient.reshape(out.shape[0], -1)
        torch.mv(
            matrix if matrix.dtype == out.dtype else matrix.to(out.dtype),
            self._probe_like(out),
            out=out,
        )
        return None

    def sum_rows(self, rows: Tensor, out: Tensor) -> None:
        """Write the rows' side of the check to `out`, if rows are stored as they are.

        Args:
            rows: rows of some steps in their columns, shape (step, sample, feature).
            out: output, shape (step, `check_width`).
        """
        torch.sum(rows[:, :, self._columns], 1, out=out)

    def _reduce_rows(
        self,
        given: Given,
        root: Tensor | None,
        pieces: Iterable[Tensor],
        project: Callable[[Tensor], Tensor],
    ) -> Reduced:
        """Reduce a contribution by way of written-out rows, a few samples at a time.

        Args:
            given: the contribution.
            root: root of the preconditioner; None if rows are not preconditioned.
            pieces: rows of a few samples each, in the order of the samples.
            project: function that turns rows into columns.
        """
        norm = _known_norm(given.value)
        columns, norms, sums = [], [], []
        factors = self._factors_of_sum(given.value) if root is not None else None
        for rows in pieces:
            columns.append(project(rows))
            if root is not None and norm is None:
                norms.append(torch.linalg.vector_norm(rows, dim=1).sum())
            if root is not None and factors is None:
                sums.append(self._sum_for_check(rows))
        in_columns = columns[0] if len(columns) == 1 else torch.cat(columns)
        if root is None:
            return Reduced(in_columns, given.first, norm)
        expected = _sum(sums) if factors is None else self._sum_of_factors(factors)
        return Reduced(in_columns, given.first, _sum(norms) if norms else norm, expected)

    def _factors_of_sum(self, value: Contribution) -> Factors | None:
        """Return factors whose sum times the probe needs no rows; None if rows must be summed."""
        if self._probe is None or not isinstance(value, Factors) or value.given_right is None:
            return None
        return value if value.left.shape[-1] == self.block.shape[0] else None

    def _sum_of_factors(self, factors: Factors) -> Tensor:
        """Return sum_bp l_bp (r_bp . u), the sum of the rows times the probe u."""
        return (
            factors.left.flatten(0, 1).T
            @ factors.right_times(self._probe_like(factors.left)[None]).flatten()
        )

    def _sum_for_check(self, rows: Tensor) -> Tensor:
        total = rows.sum(0)
        return (
            total
            if self._probe is None
            else total.reshape(self.block.shape[0], -1) @ self._probe_like(rows)
        )

    def _probe_like(self, like: Tensor) -> Tensor:
        assert self._probe is not None
        if self._probe.device != like.device or self._probe.dtype != like.dtype:
            self._probe = self._probe.to(like)
        return self._probe


class Dense(BlockEncoding):
    """Encoding whose columns are the row itself."""

    def reduce(
        self, given: Given, root: Tensor | None = None, lines: Tensor | None = None
    ) -> Reduced:
        """See the base class."""
        whole = rows_of(given.value)
        return self._reduce_rows(
            given, root, (whole,), lambda rows: rows if root is None else rows * root.flatten()
        )

    def project_gradient(self, gradient: Tensor, given: Sequence[Reduced]) -> Tensor:
        """See the base class."""
        return gradient.reshape(-1)


class Sketched(BlockEncoding):
    """Encoding whose columns are a balanced count sketch of the row (`hydra_pipe.maths.sketch`)."""

    def __init__(self, block: Block, seed: int, *, preconditioned: bool) -> None:
        super().__init__(block, seed, preconditioned=preconditioned)
        self._sketch = Sketch(
            seed, block.name, block.shape, self._columns.stop - self._columns.start
        )
        # last lines of a table: the books come next and need the same lines
        self._last_lines: SketchedLines | None = None

    def takes_lines(self, given: Sequence[Given]) -> bool:
        """See the base class."""
        return all(isinstance(g.value, TokenRows) for g in given)

    def reduce(
        self, given: Given, root: Tensor | None = None, lines: Tensor | None = None
    ) -> Reduced:
        """See the base class."""
        if isinstance(given.value, TokenRows):
            return self._reduce_lines(given.value, given.first, root, lines)
        signs = None if root is None else self._sketch.signs(root)
        value = given.value
        if isinstance(value, Factors) and value.given_right is not None:
            order = value.order
            return self._reduce_rows(
                given, root, value.pieces(), lambda rows: self._sketch(rows, signs, order)
            )
        return self._reduce_rows(
            given, root, (rows_of(value),), lambda rows: self._sketch(rows, signs)
        )

    def project_gradient(self, gradient: Tensor, given: Sequence[Reduced]) -> Tensor:
        """See the base class."""
        lines = self._lines_of(given)
        of_lines = None if lines is None else _project_lines(lines, gradient)
        return self._sketch(gradient.reshape(1, -1))[0] if of_lines is None else of_lines

    def _reduce_lines(
        self, value: TokenRows, first: int, root: Tensor | None, lines: Tensor | None
    ) -> Reduced:
        values, width = value.values, value.values.shape[2]
        numbers, at = torch.unique(value.tokens, return_inverse=True)
        if root is not None:
            of_lines = numbers if lines is None else torch.searchsorted(lines, numbers)
            values = values * root.reshape(-1, width)[of_lines][at]
        sketched = self._sketch.lines(numbers)
        expected = None
        if root is None:
            self._last_lines = sketched
        else:
            expected = value.sum_times(self._probe_like(value.values))
        return Reduced(sketched.project(values, at), first, value.bounds().sum(), expected, numbers)

    def _lines_of(self, given: Sequence[Reduced]) -> SketchedLines | None:
        """Return the lines of a table that the contributions use; None if one is not of lines."""
        numbers = [r.lines for r in given if r.lines is not None]
        if not numbers or len(numbers) < len(given):
            return None
        if (
            len(numbers) == 1
            and self._last_lines is not None
            and self._last_lines.numbers is numbers[0]
        ):
            return self._last_lines
        return self._sketch.lines(torch.unique(torch.cat(numbers)))


class KronProjected(BlockEncoding):
    """Encoding whose columns are the row projected on both sides (`hydra_pipe.maths.kron`).

    Rows of this encoding are never preconditioned.
    """

    def __init__(self, block: Block, seed: int, *, preconditioned: bool) -> None:
        super().__init__(block, seed, preconditioned=preconditioned)
        assert block.kron is not None
        outputs, inputs, k_out, k_in = block.kron
        self._kron = Kron(seed, block.name, block.shape, k_out, k_in, (outputs, inputs))

    def reduce(
        self, given: Given, root: Tensor | None = None, lines: Tensor | None = None
    ) -> Reduced:
        """See the base class."""
        return Reduced(
            projected(given.value, self._kron), given.first, bounds_of(given.value).sum()
        )

    def project_gradient(self, gradient: Tensor, given: Sequence[Reduced]) -> Tensor:
        """See the base class."""
        return self._kron(gradient.reshape(1, -1))[0]


class Factored(BlockEncoding):
    """Encoding whose columns are the two factors of an outer product.

    Rows of this encoding are never preconditioned. The check does not multiply the factors out: the
    row of a weight is multiplied by a probe. A bias shares the columns of its weight.
    """

    is_factored = True

    def __init__(self, block: Block, seed: int, *, preconditioned: bool) -> None:
        super().__init__(block, seed, preconditioned=preconditioned)
        if block.inputs is not None:
            self._inputs = slice(*block.inputs)
            self._probe = _probe(seed, self._inputs.stop - self._inputs.start)

    def reduce(
        self, given: Given, root: Tensor | None = None, lines: Tensor | None = None
    ) -> Reduced:
        """Return the contribution unchanged."""
        return Reduced(given.value, given.first)

    def factors(self, given: Sequence[Reduced]) -> list[Factors]:
        """Return the factors of contributions.

        Raises:
            LayerError: a sample's gradient is no longer one outer product.
        """
        value = given[0].value
        if len(given) == 1 and isinstance(value, Factors) and value.n_positions == 1:
            return [value]
        factors = outer_products(given)
        if not factors:
            raise LayerError(
                f"{self.block.name} was recorded as factored because a sample met it once in the "
                f"first step. Now it is used {len(given)} times or at several positions: record "
                "with --encoding projected"
            )
        return factors

    def project_gradient(self, gradient: Tensor, given: Sequence[Reduced]) -> Tensor:
        """See the base class."""
        return gradient.reshape(-1)

    def sum_rows(self, rows: Tensor, out: Tensor) -> None:
        """See the base class."""
        if self._probe is None:
            super().sum_rows(rows, out)
        else:
            weights = rows[:, :, self._inputs] @ self._probe_like(rows)
            out[:] = torch.bmm(weights[:, None], rows[:, :, self._columns])[:, 0]


#: class of each encoding
ENCODINGS: dict[Encoding, type[BlockEncoding]] = {
    "dense": Dense,
    "factored": Factored,
    "kron": KronProjected,
    "sketch": Sketched,
}


def outer_products(given: Sequence[Given]) -> list[Factors]:
    """Return the factors if each sample's gradient is one outer product, else an empty list."""
    factors = [g.value for g in given if isinstance(g.value, Factors) and g.value.n_positions == 1]
    alone = len({g.first for g in given}) == len(given)
    return factors if alone and len(factors) == len(given) else []


def _known_norm(value: Contribution) -> Tensor | None:
    """Return a bound of the summed norms of the terms, if rows are sums of terms that may cancel.

    Terms cancel in a bias before a normalisation, for example. The sum is then only rounding.

    Returns:
        None if the norms of the rows serve as they are.
    """
    sums_up = isinstance(value, Summed) or (isinstance(value, Factors) and value.n_positions > 1)
    return bounds_of(value).sum() if sums_up else None


def _project_lines(lines: SketchedLines, gradient: Tensor) -> Tensor | None:
    """Return the sketch of a table's gradient, if only `lines` of the gradient are nonzero.

    Returns:
        None if other lines are nonzero, or if a look at the other lines costs more.
    """
    if gradient.device.type != "cpu":  # the look at other lines would make the device wait
        return None
    own = gradient.reshape(len(gradient), -1).index_select(0, lines.numbers)
    whole, part = (
        torch.linalg.vector_norm(gradient).double(),
        torch.linalg.vector_norm(own).double(),
    )
    if not bool((whole - part).abs() <= 1e-5 * whole):
        return None
    return lines.project_all(own)


def _sum(values: list[Tensor]) -> Tensor:
    # a single value needs no operation
    return values[0] if len(values) == 1 else torch.stack(values).sum(0)


def _probe(seed: int, width: int) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))
