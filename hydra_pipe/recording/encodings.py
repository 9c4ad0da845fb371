"""Encodings of a block, one class each: columns of rows, and both sides of the gradient's check.

The check compares the sum of a step's rows with the gradient that the optimiser uses. The encoding
chooses the form of both sides. The sides are compared as columns. If rows are factored, both sides
are multiplied by a random vector u, the *probe* (`hydra_pipe.maths.gradient_check`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hydra_pipe.errors import LayerError
from hydra_pipe.maths.adam import scalar_root
from hydra_pipe.maths.grids import Grids
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
        lines: numbers of the lines of a table that may be nonzero; None if any line may be.
    """

    norm: Tensor | None = None
    lines: Tensor | None = None


class BlockEncoding(ABC):
    """An encoding of one block.

    Args:
        block: entry of the block directory.
        seed: seed of the run's random projections.
    """

    #: True if the columns are factors of the rows
    is_factored = False

    def __init__(self, block: Block, seed: int) -> None:
        self.block, self._columns = block, slice(*block.columns)

    @property
    def check_width(self) -> int:
        """Number of values on each side of the check."""
        return self._columns.stop - self._columns.start

    @abstractmethod
    def reduce(self, given: Given) -> Reduced:
        """Return the contribution in the block's columns."""

    @abstractmethod
    def project_gradient(self, gradient: Tensor, given: Sequence[Reduced]) -> Tensor:
        """Return the gradient in the columns of its rows.

        Args:
            gradient: whole gradient of the block.
            given: contributions whose sum should be the gradient.

        Returns:
            The columns, one dimension.
        """

    def root(self, root: Tensor) -> Tensor:
        """Return the root of a preconditioner at the features of the rows.

        Features are columns; those of a factored weight are its elements. A projection that mixes
        the elements gets one number for all, the one nearest to the root.

        Args:
            root: D^(1/2), of the block's shape.
        """
        width = self._columns.stop - self._columns.start
        return root.new_full((width,), scalar_root(root), dtype=torch.float32)

    def write_gradient(
        self, gradient: Tensor, given: Sequence[Reduced], out: Tensor
    ) -> Tensor | None:
        """Write the gradient's side of the check to `out`, or return it for the caller to copy."""
        return self.project_gradient(gradient, given)

    def sum_rows(self, rows: Tensor, out: Tensor) -> None:
        """Write the rows' side of the check to `out`.

        Args:
            rows: rows of some steps in their columns, shape (step, sample, feature).
            out: output, shape (step, `check_width`).
        """
        torch.sum(rows[:, :, self._columns], 1, out=out)


class Dense(BlockEncoding):
    """Encoding whose columns are the row itself."""

    def reduce(self, given: Given) -> Reduced:
        """See the base class."""
        return Reduced(rows_of(given.value), given.first, _known_norm(given.value))

    def project_gradient(self, gradient: Tensor, given: Sequence[Reduced]) -> Tensor:
        """See the base class."""
        return gradient.reshape(-1)

    def root(self, root: Tensor) -> Tensor:
        """See the base class."""
        return root.flatten()


class Sketched(BlockEncoding):
    """Encoding whose columns are a balanced count sketch of the row (`hydra_pipe.maths.sketch`)."""

    def __init__(self, block: Block, seed: int) -> None:
        super().__init__(block, seed)
        self._sketch = Sketch(
            seed, block.name, block.shape, self._columns.stop - self._columns.start
        )
        # last lines of a table: the books come next and need the same lines
        self._last_lines: SketchedLines | None = None

    def reduce(self, given: Given) -> Reduced:
        """See the base class."""
        value = given.value
        if isinstance(value, TokenRows):
            return self._reduce_lines(value, given.first)
        columns = self._project(value)
        return Reduced(columns, given.first, _known_norm(value))

    def project_gradient(self, gradient: Tensor, given: Sequence[Reduced]) -> Tensor:
        """See the base class."""
        lines = self._lines_of(given)
        of_lines = None if lines is None else _project_lines(lines, gradient)
        return self._sketch(gradient.reshape(1, -1))[0] if of_lines is None else of_lines

    def _project(self, value: Contribution) -> Tensor:
        if not isinstance(value, Factors) or value.given_right is None:
            return self._sketch(rows_of(value))
        found = value.by_loops(lambda: self._sketch.columns)
        if found is not None:
            return found
        return joined([self._sketch(rows, value.order) for rows in value.pieces()])

    def _reduce_lines(self, value: TokenRows, first: int) -> Reduced:
        numbers = torch.unique(value.tokens)
        self._last_lines = self._sketch.lines(numbers)
        columns = self._last_lines.project(value.values, value.tokens)
        return Reduced(columns, first, value.bounds().sum(), numbers)

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


class GridsOfElements(BlockEncoding):
    """Encoding whose columns are elements of the row, in grids (`hydra_pipe.maths.grids`)."""

    def __init__(self, block: Block, seed: int) -> None:
        super().__init__(block, seed)
        assert block.grids is not None
        outputs, inputs, n_out, n_in = block.grids
        self._grids = Grids(
            seed,
            block.name,
            (outputs, inputs),
            (n_out, n_in),
            self._columns.stop - self._columns.start,
        )
        # places of the elements in rows with another order of dimensions
        self._in_order: dict[tuple[int, ...], Tensor] = {}

    def reduce(self, given: Given) -> Reduced:
        """See the base class."""
        return Reduced(self._project(given.value), given.first, bounds_of(given.value).sum())

    def project_gradient(self, gradient: Tensor, given: Sequence[Reduced]) -> Tensor:
        """See the base class."""
        return self._grids(gradient.reshape(1, -1))[0]

    def root(self, root: Tensor) -> Tensor:
        """See the base class."""
        return root.flatten()[self._grids.elements.to(root.device)]

    def _project(self, value: Contribution) -> Tensor:
        if not isinstance(value, Factors) or value.given_right is None:
            return self._grids(rows_of(value))
        if not isinstance(value.given_right, Tensor):
            found = value.by_loops(lambda: self._grids.columns)
            if found is not None:
                return found
            elements = None if value.order is None else self._elements_in(value.order)
            return joined([self._grids(rows, elements) for rows in value.pieces()])
        if (value.left.shape[2], value.n_inputs) == self._grids.sides:
            return self._grids.of_factors(value.left, value.given_right)
        return self._grids(rows_of(value))

    def _elements_in(self, order: tuple[int, ...]) -> Tensor:
        if order not in self._in_order:
            self._in_order[order] = self._grids.elements_in(self.block.shape, order)
        return self._in_order[order]


class KronProjected(BlockEncoding):
    """Encoding whose columns are the row projected on both sides (`hydra_pipe.maths.kron`)."""

    def __init__(self, block: Block, seed: int) -> None:
        super().__init__(block, seed)
        assert block.kron is not None
        outputs, inputs, k_out, k_in = block.kron
        self._kron = Kron(seed, block.name, block.shape, k_out, k_in, (outputs, inputs))

    def reduce(self, given: Given) -> Reduced:
        """See the base class."""
        return Reduced(
            projected(given.value, self._kron), given.first, bounds_of(given.value).sum()
        )

    def project_gradient(self, gradient: Tensor, given: Sequence[Reduced]) -> Tensor:
        """See the base class."""
        return self._kron(gradient.reshape(1, -1))[0]


class Factored(BlockEncoding):
    """Encoding whose columns are the two factors of an outer product.

    The check does not multiply the factors out: the row of a weight is multiplied by a probe. A
    bias shares the columns of its weight.
    """

    is_factored = True

    def __init__(self, block: Block, seed: int) -> None:
        super().__init__(block, seed)
        self._probe: Tensor | None = None
        if block.inputs is not None:
            self._inputs = slice(*block.inputs)
            self._probe = _probe(seed, self._inputs.stop - self._inputs.start)

    def reduce(self, given: Given) -> Reduced:
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
                'with encoding="projected" (--encoding projected)'
            )
        return factors

    def project_gradient(self, gradient: Tensor, given: Sequence[Reduced]) -> Tensor:
        """See the base class. The gradient of a bias is the sum of its columns."""
        return gradient.reshape(-1)

    def root(self, root: Tensor) -> Tensor:
        """See the base class."""
        return root.flatten()

    def write_gradient(
        self, gradient: Tensor, given: Sequence[Reduced], out: Tensor
    ) -> Tensor | None:
        """See the base class."""
        if self._probe is None:
            return self.project_gradient(gradient, given)
        matrix = gradient if gradient.dim() == 2 else gradient.reshape(out.shape[0], -1)
        torch.mv(
            matrix if matrix.dtype == out.dtype else matrix.to(out.dtype),
            self._probe_like(out, self._probe),
            out=out,
        )
        return None

    def sum_rows(self, rows: Tensor, out: Tensor) -> None:
        """See the base class."""
        if self._probe is None:
            super().sum_rows(rows, out)
        else:
            weights = rows[:, :, self._inputs] @ self._probe_like(rows, self._probe)
            out[:] = torch.bmm(weights[:, None], rows[:, :, self._columns])[:, 0]

    def _probe_like(self, like: Tensor, probe: Tensor) -> Tensor:
        if probe.device != like.device or probe.dtype != like.dtype:
            self._probe = probe = probe.to(like)
        return probe


#: class of each encoding
ENCODINGS: dict[Encoding, type[BlockEncoding]] = {
    "dense": Dense,
    "factored": Factored,
    "grids": GridsOfElements,
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


def joined(pieces: list[Tensor]) -> Tensor:
    """Return rows that were made a few samples at a time."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)  # a single one needs no operation


def _probe(seed: int, width: int) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))
