"""From the contributions of one step to stored columns and scales."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydra_pipe.errors import LayerError
from hydra_pipe.maths.kron import Kron
from hydra_pipe.maths.sketch import Sketch, SketchedLines
from hydra_pipe.per_sample.factors import Contribution, Factors, Summed, TokenRows, bounds_of, projected
from hydra_pipe.plan.layout import Block, Layout, Parameter


@dataclass(slots=True)  # not frozen: there are several a step, and frozen ones are slow to make
class Given:
    """A contribution and where it belongs.

    Args:
        value: of some samples of the batch.
        first: place of the first of them in the batch.
    """

    value: Contribution
    first: int


# positions of a contribution that may be put beside others
_FEW_POSITIONS = 4
_NOTHING: tuple[Sequence[Tensor], Sequence[Given]] = ((), ())


def describe(contributions: Mapping[int, Sequence[Given]], parameters: Sequence[Parameter]) -> list[Parameter]:
    """`parameters` with what the contributions of a first step show of their gradients' structure."""
    weights: dict[tuple[int, ...], str] = {}  # output factors -> name of the weight that has them
    described = []
    for index, parameter in enumerate(parameters):
        factors = _outer_products(contributions.get(index, ()))
        if factors and factors[0].right is not None:
            weights[tuple(id(f.left) for f in factors)] = parameter.name
            shape = (factors[0].left.shape[-1], factors[0].right.shape[-1])
            parameter = replace(parameter, factors=shape)
        sides = {_sides(g.value) for g in contributions.get(index, ())}
        if len(sides) == 1:
            parameter = replace(parameter, sides=sides.pop())
        described.append(parameter)
    for index, parameter in enumerate(described):
        factors = _outer_products(contributions.get(index, ()))
        weight = weights.get(tuple(id(f.left) for f in factors)) if factors and factors[0].right is None else None
        if weight is not None:
            described[index] = replace(parameter, bias_of=weight)
    return described


def _sides(value: Contribution) -> tuple[int, int] | None:
    """Outputs and inputs of a sum of outer products; None: it is something else."""
    if not isinstance(value, Factors) or value.given_right is None:
        return None
    return value.left.shape[-1], value.n_inputs


def key_of_side_by_side(index: int, given: Given) -> tuple[int, ...] | None:
    """Tell with which contributions of block `index` one may stand side by side: they have one key. None: with none.

    Only a few positions are put beside others, so that little is copied: a recurrent module's time steps.
    """
    value, right = given.value, given.value.given_right if isinstance(given.value, Factors) else None
    if not isinstance(value, Factors) or value.n_positions > _FEW_POSITIONS or not (right is None or isinstance(right, Tensor)):
        return None
    return index, given.first, len(value.left), value.left.shape[2], 0 if right is None else right.shape[2]


def side_by_side(given: Sequence[Given]) -> Given:
    """Contributions with one key (`key_of_side_by_side`) as one that has the positions of all."""
    if len(given) == 1:
        return given[0]
    factors = [g.value for g in given if isinstance(g.value, Factors)]
    rights = [f.given_right for f in factors if isinstance(f.given_right, Tensor)]
    left = torch.cat([f.left for f in factors], 1)
    return Given(Factors(left, torch.cat(rights, 1) if rights else None), given[0].first)


def _outer_products(given: Sequence[Given]) -> list[Factors]:
    """The factors where each sample's gradient is one outer product, else nothing."""
    factors = [g.value for g in given if isinstance(g.value, Factors) and g.value.n_positions == 1]
    alone = len({g.first for g in given}) == len(given)
    return factors if alone and len(factors) == len(given) else []


@dataclass(slots=True)
class Reduced(Given):
    """A contribution in the least memory that its block needs: rows in the block's own columns, or the factors of a factored one.

    Args:
        norm: upper bound of the summed norms of its rows and of what they are sums of, a scalar; None: take it from the rows.
        expected: of rows that are preconditioned, what they summed to before, in the form of `RowEncoder.put_in_books`.
        lines: of rows of a table, the lines that are not zero; None: any may be.
    """

    norm: Tensor | None = None
    expected: Tensor | None = None
    lines: Tensor | None = None


class RowEncoder:
    """Turns contributions into the columns that `layout` gives them.

    Args:
        layout: the block directory.
        preconditioned: whether `reduce` gets the root of a preconditioner.
    """

    def __init__(self, layout: Layout, *, preconditioned: bool = False) -> None:
        self.layout = layout
        self.preconditioned = preconditioned
        self._sketches = {
            i: Sketch(layout.seed, b.name, b.shape, b.columns[1] - b.columns[0])
            for i, b in enumerate(layout.blocks)
            if b.encoding == "sketch"
        }
        self._krons = {
            i: Kron(layout.seed, b.name, b.shape, b.kron[2], b.kron[3], b.kron[:2]) for i, b in enumerate(layout.blocks) if b.kron
        }
        # of each table, the lines that were met last: what the books compare next is of the same lines
        self._last_lines: dict[int, SketchedLines] = {}
        self.part_columns, self.parts_of_block = _parts(layout)
        self._is_factored = [block.encoding == "factored" for block in layout.blocks]
        factored = {part for parts, is_so in zip(self.parts_of_block, self._is_factored, strict=True) if is_so for part in parts}
        self._of_factors = [part in factored for part in range(len(self.part_columns))]
        # the books compare whole gradients with what rows sum to; large ones times a random vector
        probed = [len(b.shape) > 1 if preconditioned else b.inputs is not None for b in layout.blocks]
        self._probes = {i: _probe(layout.seed, block) for i, block in enumerate(layout.blocks) if probed[i]}
        widths = [
            (b.shape[0] if probe else b.numel) if preconditioned else b.columns[1] - b.columns[0]
            for b, probe in zip(layout.blocks, probed, strict=True)
        ]
        ends = np.cumsum(widths).tolist()
        self.book_columns = [slice(last - width, last) for last, width in zip(ends, widths, strict=True)]

    @property
    def linear_columns(self) -> list[slice]:
        """Columns that a number multiplies where it multiplies the rows: all but the input factors of factored blocks."""
        inputs = {parts[1] for parts in self.parts_of_block if len(parts) > 1}
        return [columns for part, columns in enumerate(self.part_columns) if part not in inputs]

    def is_factored(self, index: int) -> bool:
        """Tell whether the columns of block `index` are factors of the rows."""
        return self._is_factored[index]

    def takes_lines(self, index: int, given: Sequence[Given]) -> bool:
        """Tell whether block `index` is projected from the lines of a table that its contributions use."""
        return index in self._sketches and all(isinstance(g.value, TokenRows) for g in given)

    def reduce(self, index: int, given: Given, root: Tensor | None = None, lines: Tensor | None = None) -> Reduced:
        """The contribution in the columns of block `index`, times the `root` of a preconditioner where there is one.

        Args:
            index: of the block.
            given: the contribution.
            root: of the block's shape, or of its `lines` only.
            lines: sorted numbers of the lines that `root` is of; None: all.
        """
        value = given.value
        if isinstance(value, TokenRows) and index in self._sketches:
            return self._reduce_lines(index, value, given.first, root, lines)
        if self._is_factored[index]:
            return Reduced(value, given.first)
        if index in self._krons:
            return Reduced(projected(_plain(value), self._krons[index]), given.first, bounds_of(value).sum())
        # terms of a sum over positions may cancel (a bias before a normalisation): what is left is their rounding
        sums_up = isinstance(value, Summed) or (isinstance(value, Factors) and value.n_positions > 1)
        norm = bounds_of(value).sum() if sums_up else None
        plain = _plain(value)
        columns, norms, sums = [], [], []
        signs = self._sketches[index].signs(root) if root is not None and index in self._sketches else None
        pieces, order = self._pieces(index, plain)
        for rows in pieces:
            columns.append(self._in_columns(index, rows, root, signs, order))
            if root is not None and norm is None:
                norms.append(torch.linalg.vector_norm(rows, dim=1).sum())
            if root is not None and not self._sums_without_rows(index, plain):
                sums.append(self._sum_in_books(index, rows))
        in_columns = columns[0] if len(columns) == 1 else torch.cat(columns)
        if root is None:
            return Reduced(in_columns, given.first, norm)
        expected = _sum(sums) if sums else self._sum_of_factors(index, plain)
        return Reduced(in_columns, given.first, _sum(norms) if norms else norm, expected)

    def _reduce_lines(self, index: int, value: TokenRows, first: int, root: Tensor | None, lines: Tensor | None) -> Reduced:
        values, width = value.values, value.values.shape[2]
        numbers, at = torch.unique(value.tokens, return_inverse=True)
        if root is not None:
            of_lines = numbers if lines is None else torch.searchsorted(lines, numbers)
            values = values * root.reshape(-1, width)[of_lines][at]
        sketched = self._sketches[index].lines(numbers)
        if not self.preconditioned:
            self._last_lines[index] = sketched
        expected = value.sum_times(self._like(index, value.values)) if root is not None else None
        return Reduced(sketched.project(values, at), first, value.bounds().sum(), expected, numbers)

    def _pieces(self, index: int, value: Factors | Tensor) -> tuple[Iterable[Tensor], tuple[int, ...] | None]:
        """Rows of a few samples after the other, and the order of the block's dimensions in them; None: their own."""
        if not isinstance(value, Factors):
            return (value,), None
        if index in self._sketches and value.given_right is not None:
            return value.pieces(), value.order
        return (value.rows(),), None

    def _in_columns(
        self, index: int, rows: Tensor, root: Tensor | None, signs: Tensor | None, order: tuple[int, ...] | None
    ) -> Tensor:
        if index in self._sketches:
            return self._sketches[index](rows, signs, order)
        return rows if root is None else rows * root.flatten()

    def _sums_without_rows(self, index: int, value: Contribution) -> bool:
        return (
            index in self._probes
            and isinstance(value, Factors)
            and value.given_right is not None
            and value.left.shape[-1] == self.layout.blocks[index].shape[0]
        )

    def _sum_of_factors(self, index: int, value: Contribution) -> Tensor:
        """sum_bp l_bp (r_bp . u), the sum of the rows times the probe u: no row is needed."""
        assert isinstance(value, Factors)
        return value.left.flatten(0, 1).T @ value.right_times(self._like(index, value.left)[None]).flatten()

    def _sum_in_books(self, index: int, rows: Tensor) -> Tensor:
        if index not in self._probes:
            return rows.sum(0)
        return rows.sum(0).reshape(self.layout.blocks[index].shape[0], -1) @ self._like(index, rows)

    def put_in_books(
        self, gradients: Sequence[Tensor | None], outs: Sequence[Tensor], contributions: Mapping[int, Sequence[Reduced]]
    ) -> None:
        """Put the whole gradient of each block into its `out`, in the form in which the books compare it, one dimension.

        Args:
            gradients: of the blocks; None: there is none.
            outs: one for each.
            contributions: that the gradients are to be the sums of.
        """
        copied: list[Tensor] = []
        copies: list[Tensor] = []
        for index, (gradient, out) in enumerate(zip(gradients, outs, strict=True)):
            if gradient is None:
                out.zero_()
            elif index in self._probes:
                matrix = gradient if gradient.dim() == 2 else gradient.reshape(out.shape[0], -1)
                same = matrix if matrix.dtype == out.dtype else matrix.to(out.dtype)
                torch.mv(same, self._like(index, out), out=out)
            else:
                kron = self._krons.get(index)
                sketch = self._sketches.get(index) if not self.preconditioned else None
                lines = self._sketched_lines(index, contributions.get(index, ())) if sketch is not None else None
                if lines is not None and (of_lines := _project_lines(lines, gradient)) is not None:
                    gradient = of_lines
                elif kron is not None or sketch is not None:
                    gradient = (kron or sketch)(gradient.reshape(1, -1))  # type: ignore[misc] # one of the two is there
                copied.append(out)
                copies.append(gradient if gradient.dim() == 1 else gradient.reshape(-1))
        if copied:
            torch._foreach_copy_(copied, copies)

    def place(self, contributions: Mapping[int, Sequence[Reduced]], parts: Sequence[Tensor]) -> None:
        """Write the columns of one batch.

        Args:
            contributions: reduced, of each block that got a gradient.
            parts: where each part goes, see `views`; zeroed where nothing came.

        Raises:
            LayerError: a factored block no longer has one position a sample.
        """
        # what goes into each part, of whole batches or of some samples each
        pieces: dict[int, tuple[Sequence[Tensor], Sequence[Given]]] = {}
        for index, given in contributions.items():
            part, *input_part = self.parts_of_block[index]
            if not self._is_factored[index]:
                pieces[part] = [r.value for r in given], given  # type: ignore[misc] # only factored blocks have factors left
                continue
            factors = self._factors_of(index, given)
            own = [f.left for f in factors]
            if part not in pieces:
                pieces[part] = own, given
            # a factored bias shares its weight's output factors
            elif len(own) != len(pieces[part][0]) or any(a is not b for a, b in zip(pieces[part][0], own, strict=True)):
                raise LayerError(
                    f"{self.layout.blocks[index].name} no longer has the output gradient of the weight whose columns it shares: "
                    f"record with --encoding projected"
                )
            if input_part:
                pieces[input_part[0]] = [f.right for f in factors if f.right is not None], given
        outs, wholes = [], []
        for part, out in enumerate(parts):
            values, of_samples = pieces.get(part, _NOTHING)
            if len(values) == 1 and len(values[0]) == len(out):
                outs.append(out)
                wholes.append(values[0])
            else:
                _add_up(values, of_samples, out)
        if outs:
            torch._foreach_copy_(outs, wholes)

    def views(self, rows: Tensor) -> list[Tensor]:
        """Where the parts of `rows` are, shape (batch, feature): each (batch, width), of factors (batch, 1, width) as they come."""
        return [
            rows[:, None, columns] if of_factors else rows[:, columns]
            for columns, of_factors in zip(self.part_columns, self._of_factors, strict=True)
        ]

    def products(self, of_parts: NDArray[Any]) -> NDArray[Any]:
        """From a number for each part, shape (row, part), to their product for each block, shape (row, block)."""
        of_blocks: NDArray[Any] = of_parts[:, [parts[0] for parts in self.parts_of_block]]
        factored = [index for index, parts in enumerate(self.parts_of_block) if len(parts) > 1]
        of_blocks[:, factored] *= of_parts[:, [self.parts_of_block[index][1] for index in factored]]
        return of_blocks

    def _factors_of(self, index: int, given: Sequence[Given]) -> list[Factors]:
        """Of a factored block. Raises: LayerError: a sample's gradient is not one outer product any more."""
        value = given[0].value
        if len(given) == 1 and isinstance(value, Factors) and value.n_positions == 1:
            return [value]
        factors = _outer_products(given)
        if not factors:
            raise LayerError(
                f"{self.layout.blocks[index].name} was recorded as factored because a sample met it once in the first step; now it "
                f"is used {len(given)} times or at several positions: record with --encoding projected"
            )
        return factors

    def sums(self, features: Tensor, sizes: Sequence[int]) -> Tensor:
        """What the rows of each step sum to, in the form of `put_in_books`, for blocks that are not preconditioned.

        Args:
            features: rows in their columns, shape (row, feature).
            sizes: rows of each step, one step after the other.
        """
        sums = features.new_empty(len(sizes), self.book_columns[-1].stop)
        step = row = 0
        for size, of_size in groupby(sizes):  # steps of one size are summed together
            n_steps = len(list(of_size))
            rows = features[row : row + n_steps * size].view(n_steps, size, -1)
            out = sums[step : step + n_steps]
            for index, block in enumerate(self.layout.blocks):
                own, where = rows[:, :, slice(*block.columns)], self.book_columns[index]
                if block.inputs is None:
                    torch.sum(own, 1, out=out[:, where])
                else:
                    weights = rows[:, :, slice(*block.inputs)] @ self._like(index, features)
                    out[:, where] = torch.bmm(weights[:, None], own)[:, 0]
            step, row = step + n_steps, row + n_steps * size
        return sums

    def _sketched_lines(self, index: int, given: Sequence[Reduced]) -> SketchedLines | None:
        """The lines of a table that all of the contributions to block `index` are of; None: there are others."""
        lines = [r.lines for r in given if r.lines is not None]
        if not lines or len(lines) < len(given):
            return None
        last = self._last_lines.get(index)
        if last is not None and len(lines) == 1 and last.numbers is lines[0]:
            return last
        return self._sketches[index].lines(torch.unique(torch.cat(lines)))

    def _like(self, index: int, like: Tensor) -> Tensor:
        probe = self._probes[index]
        if probe.device != like.device or probe.dtype != like.dtype:
            probe = self._probes[index] = probe.to(like)
        return probe


def _plain(value: Contribution) -> Factors | Tensor:
    if isinstance(value, TokenRows):
        return value.rows()
    return value.rows if isinstance(value, Summed) else value


def _project_lines(lines: SketchedLines, gradient: Tensor) -> Tensor | None:
    """The sketch of a table's gradient of which only these lines are not zero; None: others are not, or looking costs more."""
    if gradient.device.type != "cpu":  # the look at the others would make the device wait
        return None
    own = gradient.reshape(len(gradient), -1).index_select(0, lines.numbers)
    whole, part = torch.linalg.vector_norm(gradient).double(), torch.linalg.vector_norm(own).double()
    if not bool((whole - part).abs() <= 1e-5 * whole):
        return None
    return lines.project_all(own)


def _sum(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).sum(0)  # of one it would be two operations for nothing


def _parts(layout: Layout) -> tuple[list[slice], list[list[int]]]:
    """Columns of every part, and the parts of every block; a factored bias has its weight's output part."""
    columns: list[tuple[int, int]] = []
    of_block = []
    for block in layout.blocks:
        wanted = [block.columns] if block.inputs is None else [block.columns, block.inputs]
        columns += [c for c in wanted if c not in columns]
        of_block.append([columns.index(c) for c in wanted])
    return [slice(*c) for c in columns], of_block


def _probe(seed: int, block: Block) -> Tensor:
    width = block.inputs[1] - block.inputs[0] if block.inputs is not None else block.numel // block.shape[0]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(width, generator=generator)


def _add_up(pieces: Sequence[Tensor], given: Sequence[Given], out: Tensor) -> None:
    """Rows of the whole batch into `out` from rows of some samples each, which add up where they meet."""
    out.zero_()
    for rows, of_samples in zip(pieces, given, strict=True):
        out[of_samples.first : of_samples.first + len(rows)] += rows
