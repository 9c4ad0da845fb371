"""From the contributions of one step to stored columns and scales."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydra_pipe.errors import LayerError
from hydra_pipe.maths.layers import Contribution, Factors
from hydra_pipe.maths.quantise import Dtype, part_scale, quantise
from hydra_pipe.maths.sketch import Sketch
from hydra_pipe.plan.layout import Block, Layout, Parameter
from hydra_pipe.store import names
from hydra_pipe.store.table import TableWriter


@dataclass(frozen=True)
class EncodedRows:
    """Rows of one batch, before quantisation.

    Args:
        parts: columns of each part and its values, shape (B, width); None: all zero.
        largest: largest magnitude in each row of each part, shape (B, part), float32.
        expected: what the rows sum to before any preconditioning, in the form of `RowEncoder.features_of`, a vector a block.
        magnitude: upper bound of the summed norms of each block's rows, shape (block,).
        present: whether the block got a gradient, shape (block,).
    """

    parts: list[tuple[slice, Tensor | None]]
    largest: Tensor
    expected: list[Tensor]
    magnitude: NDArray[np.float64]
    present: NDArray[np.bool_]


@dataclass(frozen=True)
class Given:
    """A contribution and where it belongs.

    Args:
        value: of some samples of the batch.
        first: place of the first of them in the batch.
    """

    value: Contribution
    first: int


def describe(contributions: Mapping[int, Sequence[Given]], parameters: Sequence[Parameter]) -> list[Parameter]:
    """`parameters` with what the contributions of a first step show of their gradients' structure."""
    weights: dict[tuple[int, ...], str] = {}  # output factors -> name of the weight that has them
    described = []
    for index, parameter in enumerate(parameters):
        factors = _outer_products(contributions.get(index, ()))
        if factors and factors[0].right is not None:
            weights[tuple(id(f.left) for f in factors)] = parameter.name
            shape = (factors[0].left.shape[-1], factors[0].right.shape[-1])
            parameter = Parameter(parameter.name, parameter.shape, parameter.group, factors=shape)
        described.append(parameter)
    for index, parameter in enumerate(described):
        factors = _outer_products(contributions.get(index, ()))
        weight = weights.get(tuple(id(f.left) for f in factors)) if factors and factors[0].right is None else None
        if weight is not None:
            described[index] = Parameter(parameter.name, parameter.shape, parameter.group, bias_of=weight)
    return described


def _outer_products(given: Sequence[Given]) -> list[Factors]:
    """The factors where each sample's gradient is one outer product, else nothing."""
    factors = [g.value for g in given if isinstance(g.value, Factors) and g.value.n_positions == 1]
    alone = len({g.first for g in given}) == len(given)
    return factors if alone and len(factors) == len(given) else []


@dataclass(frozen=True)
class Reduced(Given):
    """A contribution in the least memory that its block needs: rows in the block's own columns, or the factors of a factored one.

    Args:
        norms: upper bound of the norm of each row and of what it is a sum of, shape (B,); None: take it from the rows.
        raw_sum: of rows that were preconditioned, what they summed to before, shape (numel,).
    """

    norms: Tensor | None = None
    raw_sum: Tensor | None = None


class RowEncoder:
    """Turns contributions into the columns that `layout` gives them.

    Args:
        layout: the block directory.
        dtype: of the stored columns.
        preconditioned: whether `reduce` gets the root of a preconditioner.
    """

    def __init__(self, layout: Layout, dtype: Dtype, *, preconditioned: bool = False) -> None:
        self.layout = layout
        self._preconditioned = preconditioned
        self._dtype = dtype
        self._sketches = {
            i: Sketch(layout.seed, b.name, b.shape, b.columns[1] - b.columns[0])
            for i, b in enumerate(layout.blocks)
            if b.encoding == "sketch"
        }
        self._probes = {i: _probe(layout.seed, block) for i, block in enumerate(layout.blocks) if block.encoding == "factored"}
        self._part_columns, self._parts_of_block = _parts(layout)

    def reduce(self, index: int, given: Given, root: Tensor | None = None) -> Reduced:
        """The contribution in the columns of block `index`, times the `root` of a preconditioner where there is one."""
        value = given.value
        if self.layout.blocks[index].encoding == "factored":
            return Reduced(value, given.first)
        rows = value.rows() if isinstance(value, Factors) else value
        # terms of a sum over positions may cancel (a bias before a normalisation): what is left is their rounding
        norms = value.norms() if isinstance(value, Factors) and value.n_positions > 1 else None
        if root is None:
            return Reduced(self._in_columns(index, rows), given.first, norms)
        norms = torch.linalg.vector_norm(rows, dim=1) if norms is None else norms
        return Reduced(self._in_columns(index, rows * root.flatten()), given.first, norms, rows.sum(0))

    def _in_columns(self, index: int, rows: Tensor) -> Tensor:
        sketch = self._sketches.get(index)
        return rows if sketch is None else sketch(rows)

    def encode(self, contributions: Mapping[int, Sequence[Reduced]], batch: int, like: Tensor) -> EncodedRows:
        """Assemble the parts of one batch.

        Args:
            contributions: reduced, of each block that got a gradient.
            batch: number of samples.
            like: a tensor of the model's device and dtype, for what got no gradient.

        Raises:
            LayerError: a factored block no longer has one position a sample.
        """
        values: list[Tensor | None] = [None] * len(self._part_columns)
        lefts: dict[int, list[Tensor]] = {}
        expected = []
        for index, block in enumerate(self.layout.blocks):
            given = contributions.get(index, ())
            if not given:
                expected.append(self.features_of(index, like.new_zeros(block.shape)))
            elif block.encoding == "factored":
                expected.append(self._place_factors(index, block, given, values, lefts, batch))
            else:
                rows = _assembled([(r.first, r.value) for r in given if isinstance(r.value, Tensor)], batch)
                values[self._parts_of_block[index][0]] = rows
                raw = [r.raw_sum for r in given if r.raw_sum is not None]
                expected.append(torch.stack(raw).sum(0) if raw else rows.sum(0))
        largest = torch.stack([v.abs().amax(1).float() if v is not None else like.new_zeros(batch).float() for v in values], dim=1)
        present = np.array([index in contributions for index in range(len(self.layout.blocks))])
        parts = list(zip(self._part_columns, values, strict=True))
        return EncodedRows(parts, largest, expected, self._magnitude(largest, contributions) * present, present)

    def _place_factors(
        self,
        index: int,
        block: Block,
        given: Sequence[Given],
        values: list[Tensor | None],
        lefts: dict[int, list[Tensor]],
        batch: int,
    ) -> Tensor:
        factors = _outer_products(given)
        if not factors:
            raise LayerError(
                f"{block.name} was recorded as factored because a sample met it once in the first step; now it is used "
                f"{len(given)} times or at several positions: record with --encoding projected"
            )
        part, *input_part = self._parts_of_block[index]
        own = [f.left for f in factors]
        shared = lefts.setdefault(part, own)
        if len(shared) != len(own) or any(a is not b for a, b in zip(shared, own, strict=True)):
            raise LayerError(
                f"{block.name} no longer has the output gradient of the weight whose columns it shares: record with "
                f"--encoding projected"
            )
        left = values[part]
        if left is None:
            left = values[part] = _assembled([(g.first, f.left[:, 0]) for g, f in zip(given, factors, strict=True)], batch)
        if not input_part:
            return left.sum(0)
        rights = [(g.first, f.right[:, 0]) for g, f in zip(given, factors, strict=True) if f.right is not None]
        right = values[input_part[0]] = _assembled(rights, batch)
        return left.T @ (right @ self._probe(index, right))

    def features_of(self, index: int, gradient: Tensor) -> Tensor:
        """A whole gradient of block `index` in the form of `EncodedRows.expected`."""
        block = self.layout.blocks[index]
        if block.encoding == "sketch" and not self._preconditioned:
            return self._sketches[index](gradient.reshape(1, -1))[0]
        if block.encoding == "factored" and block.inputs is not None:
            outputs = block.columns[1] - block.columns[0]
            return gradient.reshape(outputs, -1) @ self._probe(index, gradient)
        return gradient.reshape(-1)

    def write(self, encoded: EncodedRows, table: TableWriter, extra: Mapping[str, NDArray[np.generic]]) -> None:
        """Quantise and append the rows to `table`, with further columns `extra`, each of shape (B,)."""
        dtype = self._dtype
        if table.dtype_of(names.GRADIENT) != dtype:  # test gradients of an int8 run are kept in float16
            dtype = "float16"
        part_scales = part_scale(encoded.largest, dtype)
        scales = torch.stack([part_scales[:, parts].prod(1) for parts in self._parts_of_block], dim=1).cpu().numpy()
        # a factored bias without a gradient still has its weight's columns: 0 times them
        scales *= encoded.present
        for rows, views in table.reserve(len(scales)):
            stored = torch.from_numpy(views[names.GRADIENT])
            for part, (columns, values) in enumerate(encoded.parts):
                if values is None:
                    stored[:, columns] = 0
                else:
                    quantise(values[rows], part_scales[rows, part], stored[:, columns])
            views[names.SCALE][:] = scales[rows]
            for name, column in extra.items():
                views[name][:] = column[rows]

    def _magnitude(self, largest: Tensor, contributions: Mapping[int, Sequence[Reduced]]) -> NDArray[np.float64]:
        per_part = largest.double().cpu().numpy()
        magnitude = np.array([per_part[:, parts].prod(axis=1).sum() for parts in self._parts_of_block])
        magnitude *= np.sqrt([block.numel for block in self.layout.blocks])
        for index, given in contributions.items():
            norms = [r.norms.sum() for r in given if r.norms is not None]
            if len(norms) == len(given):
                magnitude[index] = float(torch.stack(norms).sum())
        return magnitude

    def _probe(self, index: int, like: Tensor) -> Tensor:
        probe = self._probes[index]
        if probe.device != like.device or probe.dtype != like.dtype:
            probe = self._probes[index] = probe.to(like)
        return probe


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
    width = block.inputs[1] - block.inputs[0] if block.inputs is not None else 1
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(width, generator=generator)


def _assembled(pieces: Sequence[tuple[int, Tensor]], batch: int) -> Tensor:
    """Rows of the whole batch, shape (batch, width), from rows of some samples each, which add up where they meet."""
    _, total = pieces[0]
    if all(len(rows) == batch for _, rows in pieces):
        for _, rows in pieces[1:]:
            total = total + rows
        return total
    total = total.new_zeros(batch, total.shape[1])
    for first, rows in pieces:
        total[first : first + len(rows)] += rows
    return total
