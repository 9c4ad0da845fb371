"""Encoder of the contributions of one step as columns of rows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydra_pipe.errors import LayerError
from hydra_pipe.maths.adam import rank_one
from hydra_pipe.per_sample.factors import Contribution, Factors, TokenRows
from hydra_pipe.plan.layout import Layout, Parameter
from hydra_pipe.recording.encodings import ENCODINGS, Factored, Given, Reduced, outer_products
from hydra_pipe.store.data.preconditioner import Preconditioner

# largest number of positions of a contribution that may be put side by side with others
_FEW_POSITIONS = 4
_NOTHING: tuple[Sequence[Tensor], Sequence[Given]] = ((), ())


def describe(
    contributions: Mapping[int, Sequence[Given]], parameters: Sequence[Parameter]
) -> list[Parameter]:
    """Return `parameters` with the structure of their gradients.

    Args:
        contributions: contributions of the first step, by block.
        parameters: parameters of the blocks, without structure.

    Returns:
        The parameters. `factors`, `sides`, `is_table` and `bias_of` are set if the contributions
        show them.
    """
    weights: dict[tuple[int, ...], str] = {}  # output factors -> name of the weight that has them
    described = []
    for index, parameter in enumerate(parameters):
        factors = outer_products(contributions.get(index, ()))
        if factors and factors[0].right is not None:
            weights[tuple(id(f.left) for f in factors)] = parameter.name
            shape = (factors[0].left.shape[-1], factors[0].right.shape[-1])
            parameter = replace(parameter, factors=shape)
        sides = {_sides(g.value) for g in contributions.get(index, ())}
        if len(sides) == 1:
            parameter = replace(parameter, sides=sides.pop())
        if any(isinstance(g.value, TokenRows) for g in contributions.get(index, ())):
            parameter = replace(parameter, is_table=True)
        described.append(parameter)
    for index, parameter in enumerate(described):
        factors = outer_products(contributions.get(index, ()))
        weight = (
            weights.get(tuple(id(f.left) for f in factors))
            if factors and factors[0].right is None
            else None
        )
        if weight is not None:
            described[index] = replace(parameter, bias_of=weight)
    return described


def _sides(value: Contribution) -> tuple[int, int] | None:
    """Return the outputs and inputs of a sum of outer products; None for another contribution."""
    if not isinstance(value, Factors) or value.given_right is None:
        return None
    return value.left.shape[-1], value.n_inputs


def key_of_side_by_side(index: int, given: Given) -> tuple[int, ...] | None:
    """Return a key. Contributions of block `index` with the same key may be put side by side.

    Only contributions of few positions have a key, so that little is copied. The time steps of a
    recurrent module are an example.

    Returns:
        None if the contribution cannot be put beside others.
    """
    value, right = (
        given.value,
        given.value.given_right if isinstance(given.value, Factors) else None,
    )
    if (
        not isinstance(value, Factors)
        or value.n_positions > _FEW_POSITIONS
        or not (right is None or isinstance(right, Tensor))
    ):
        return None
    return (
        index,
        given.first,
        len(value.left),
        value.left.shape[2],
        0 if right is None else right.shape[2],
    )


def side_by_side(given: Sequence[Given]) -> Given:
    """Join contributions with one key (`key_of_side_by_side`) into one with all positions."""
    if len(given) == 1:
        return given[0]
    factors = [g.value for g in given if isinstance(g.value, Factors)]
    rights = [f.given_right for f in factors if isinstance(f.given_right, Tensor)]
    left = torch.cat([f.left for f in factors], 1)
    return Given(Factors(left, torch.cat(rights, 1) if rights else None), given[0].first)


class RowEncoder:
    """Encoder of contributions as the columns of `layout`.

    Args:
        layout: the block directory.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        #: encoding of each block
        self.encodings = [ENCODINGS[b.encoding](b, layout.seed) for b in layout.blocks]
        self.part_columns, self.parts_of_block = _parts(layout)
        of_factors = {
            part
            for parts, own in zip(self.parts_of_block, self.encodings, strict=True)
            if own.is_factored
            for part in parts
        }
        self._of_factors = [part in of_factors for part in range(len(self.part_columns))]
        ends = np.cumsum([encoding.check_width for encoding in self.encodings]).tolist()
        self.check_columns = [
            slice(end - e.check_width, end) for e, end in zip(self.encodings, ends, strict=True)
        ]

    @property
    def linear_columns(self) -> list[slice]:
        """Columns to multiply by a number in order to multiply the rows by it.

        These are all columns except the input factors of factored blocks.
        """
        inputs = {parts[1] for parts in self.parts_of_block if len(parts) > 1}
        return [columns for part, columns in enumerate(self.part_columns) if part not in inputs]

    def project_for_check(
        self,
        gradients: Sequence[Tensor | None],
        outs: Sequence[Tensor],
        contributions: Mapping[int, Sequence[Reduced]],
    ) -> None:
        """Write the whole gradient of each block in the form that the books compare.

        Args:
            gradients: whole gradient of each block; None for a block without a gradient.
            outs: output of each block, one dimension. Blocks without a gradient get zeros.
            contributions: contributions, by block, whose sums should be the gradients.
        """
        copied: list[Tensor] = []
        copies: list[Tensor] = []
        for index, (gradient, out) in enumerate(zip(gradients, outs, strict=True)):
            if gradient is None:
                out.zero_()
                continue
            returned = self.encodings[index].write_gradient(
                gradient, contributions.get(index, ()), out
            )
            if returned is not None:
                copied.append(out)
                copies.append(returned)
        if copied:
            torch._foreach_copy_(copied, copies)

    def place(
        self, contributions: Mapping[int, Sequence[Reduced]], parts: Sequence[Tensor]
    ) -> None:
        """Write the columns of one batch.

        Args:
            contributions: reduced contributions of each block that got a gradient.
            parts: output of each part, see `views`. Parts without a contribution get zeros.

        Raises:
            LayerError: a factored block no longer has one position a sample.
        """
        # values of each part, each of a whole batch or of some samples
        pieces: dict[int, tuple[Sequence[Tensor], Sequence[Given]]] = {}
        for index, given in contributions.items():
            part, *input_part = self.parts_of_block[index]
            encoding = self.encodings[index]
            if not isinstance(encoding, Factored):
                pieces[part] = [r.value for r in given], given  # type: ignore[misc] # only factored blocks have factors left
                continue
            factors = encoding.factors(given)
            own = [f.left for f in factors]
            if part not in pieces:
                pieces[part] = own, given
            # a factored bias shares its weight's output factors
            elif len(own) != len(pieces[part][0]) or any(
                a is not b for a, b in zip(pieces[part][0], own, strict=True)
            ):
                raise LayerError(
                    f"{encoding.block.name} no longer has the output gradient of the weight "
                    "whose columns it shares: "
                    f'record with encoding="projected" (--encoding projected)'
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
        """Return a view of each part of `rows`.

        Args:
            rows: rows of one batch, shape (batch, feature).

        Returns:
            Views of shape (batch, width). Parts of factors have shape (batch, 1, width), the shape
            of their values.
        """
        return [
            rows[:, None, columns] if of_factors else rows[:, columns]
            for columns, of_factors in zip(self.part_columns, self._of_factors, strict=True)
        ]

    def preconditioner(self, roots: Sequence[Tensor]) -> Preconditioner:
        """Return D^(1/2) in the columns of the rows.

        Args:
            roots: D^(1/2) of each block, of the block's shape.
        """
        columns = np.ones(self.layout.n_features, np.float32)
        biases = np.ones(len(roots), np.float32)
        elements: list[NDArray[np.float32]] = []
        shared = {
            block.columns: index
            for index, block in enumerate(self.layout.blocks)
            if block.encoding == "factored" and block.inputs is None
        }
        for block, encoding, root in zip(self.layout.blocks, self.encodings, roots, strict=True):
            in_columns = encoding.root(root)
            elements.append(_floats(in_columns))
            if block.inputs is None:
                if not encoding.is_factored:
                    columns[slice(*block.columns)] = elements[-1]
                continue
            matrix = root.reshape(block.columns[1] - block.columns[0], -1)
            bias = shared.get(block.columns)
            if bias is not None:
                matrix = torch.cat([matrix, roots[bias].reshape(-1, 1)], 1)
            outputs, inputs = map(_floats, rank_one(matrix))
            n_inputs = block.inputs[1] - block.inputs[0]
            columns[slice(*block.columns)] = outputs
            columns[slice(*block.inputs)] = inputs[:n_inputs]
            if bias is not None:
                biases[bias] = inputs[n_inputs]
        return Preconditioner(columns, biases, np.concatenate(elements))

    def products(self, of_parts: NDArray[Any]) -> NDArray[Any]:
        """Return the product over the parts of each block.

        Args:
            of_parts: one number for each part, shape (row, part).

        Returns:
            The products, shape (row, block).
        """
        of_blocks: NDArray[Any] = of_parts[:, [parts[0] for parts in self.parts_of_block]]
        factored = [index for index, parts in enumerate(self.parts_of_block) if len(parts) > 1]
        of_blocks[:, factored] *= of_parts[:, [self.parts_of_block[index][1] for index in factored]]
        return of_blocks

    def sums(self, features: Tensor, sizes: Sequence[int]) -> Tensor:
        """Sum the rows of each step.

        Args:
            features: rows in their columns, shape (row, feature). The steps follow each other.
            sizes: number of rows of each step.

        Returns:
            The sums in the form of `project_for_check`, shape (step, column).
        """
        sums = features.new_empty(len(sizes), self.check_columns[-1].stop)
        step = row = 0
        for size, of_size in groupby(sizes):  # steps of one size are summed together
            n_steps = len(list(of_size))
            rows = features[row : row + n_steps * size].view(n_steps, size, -1)
            out = sums[step : step + n_steps]
            for encoding, where in zip(self.encodings, self.check_columns, strict=True):
                encoding.sum_rows(rows, out[:, where])
            step, row = step + n_steps, row + n_steps * size
        return sums


def _floats(values: Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = values.detach().flatten().float().cpu().numpy()
    return found


def _parts(layout: Layout) -> tuple[list[slice], list[list[int]]]:
    """Return the columns of each part, and the parts of each block.

    A factored bias shares the output part of its weight.
    """
    columns: list[tuple[int, int]] = []
    of_block = []
    for block in layout.blocks:
        wanted = [block.columns] if block.inputs is None else [block.columns, block.inputs]
        columns += [c for c in wanted if c not in columns]
        of_block.append([columns.index(c) for c in wanted])
    return [slice(*c) for c in columns], of_block


def _add_up(pieces: Sequence[Tensor], given: Sequence[Given], out: Tensor) -> None:
    """Add rows of some samples each into `out`, the rows of the whole batch.

    Rows of the same sample add up.
    """
    out.zero_()
    for rows, of_samples in zip(pieces, given, strict=True):
        out[of_samples.first : of_samples.first + len(rows)] += rows
