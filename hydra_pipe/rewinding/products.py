"""Inner products of a step's rows with the step's gradient and with test gradients.

Factored rows are never multiplied out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.plan.layout import Layout
from hydra_pipe.reduction.column_groups import DenseSegment, Segment, segments_of
from hydra_pipe.reduction.norms import SquaredNorms
from hydra_pipe.reduction.row_sums import Folder, places_of
from hydra_pipe.reduction.scores import ReadWindow, Scorer, TestBlock, decode_tests, window_of
from hydra_pipe.store.data.preconditioner import Preconditioner
from hydra_pipe.store.data.rows import Rows
from hydra_pipe.types import F32, F64

# Decoded bytes of one block of rows, and most rows: two blocks meet in 16 million products.
_BLOCK_BYTES, _BLOCK_ROWS = 64 * 2**20, 4096


@dataclass(frozen=True)
class RowBlock:
    """Some rows of a step.

    Args:
        load: function that returns the rows as stored, shape (row, feature).
        weight: weight of each block in each row, with its scale in it, shape (row, block).
    """

    load: Callable[[], NDArray[Any]]
    weight: F32

    @property
    def read(self) -> ReadWindow:
        """Function that returns stored columns of the rows, which are loaded once."""
        return window_of(self.load())


def at_once(layout: Layout) -> int:
    """Return the number of rows of a block: 1 to 4,096 rows of 64 MiB when decoded."""
    return min(_BLOCK_ROWS, max(1, _BLOCK_BYTES // (4 * layout.n_features)))


class RowProducts:
    """Inner products of rows of one layout.

    Args:
        layout: layout of the rows and of the test gradients.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._segments = segments_of(layout)
        self._norms = SquaredNorms(self._segments, layout.n_features, layout.n_features)

    def squared_norms(self, blocks: Sequence[RowBlock]) -> F64:
        """Return the squared norm of each weighted row, shape (row,), float64."""
        found = [self._norms(block.read, block.weight.astype(np.float64) ** 2) for block in blocks]
        return np.concatenate(found) if found else np.zeros(0)

    def with_sum(self, blocks: Sequence[RowBlock]) -> F64:
        """Return <r_i, sum_k r_k> of each weighted row r_i, shape (row,), float64.

        Dense columns are summed first. Of factored blocks each row meets each other row, because
        a sum of outer products is no outer product.
        """
        found = [np.zeros(len(block.weight)) for block in blocks]
        dense = [segment for segment in self._segments if isinstance(segment, DenseSegment)]
        factored = [segment for segment in self._segments if not isinstance(segment, DenseSegment)]
        if dense:
            self._add(found, blocks, self._sum(blocks, dense), dense)
        for block in blocks if factored else ():
            tests = decode_tests(block.load(), block.weight, factored)
            self._add(found, blocks, tests, factored)
        return np.concatenate(found) if found else np.zeros(0)

    def _sum(self, blocks: Sequence[RowBlock], dense: list[DenseSegment]) -> TestBlock:
        """Return the sum of the rows over the dense columns, as a block of one."""
        n_features = self._layout.n_features
        folder = Folder(dense, 1, n_features, n_features)
        for block in blocks:
            folder.add(block.read, block.weight, np.zeros(len(block.weight), np.int64))
        values: F32 = np.zeros((1, n_features), np.float32)
        for segment, place in zip(dense, places_of(dense), strict=True):
            values[:, slice(*segment.columns)] = folder.sums[:, slice(*place)]
        return TestBlock(values, np.ones((1, len(self._layout.blocks)), np.float32))

    def _add(
        self,
        found: list[F64],
        blocks: Sequence[RowBlock],
        tests: TestBlock,
        segments: Sequence[Segment],
    ) -> None:
        n_features = self._layout.n_features
        scorer = Scorer(tests, segments, n_features, n_features)
        for total, block in zip(found, blocks, strict=True):
            total += scorer(block.read, block.weight).sum(axis=1, dtype=np.float64)

    def with_tests(
        self, blocks: Sequence[RowBlock], tests: Rows, preconditioner: Preconditioner | None
    ) -> tuple[F64, F64]:
        """Return the products of weighted rows with test gradients, summed both ways.

        Args:
            blocks: rows.
            tests: test gradients.
            preconditioner: D^(1/2) of the optimiser, which multiplies both sides. None: none.

        Returns:
            <r_i, sum_j h_j>, shape (row,); <sum_i r_i, h_j>, shape (test,), both float64.
        """
        n_features = self._layout.n_features
        of_rows = [np.zeros(len(block.weight)) for block in blocks]
        of_tests = np.zeros(tests.n_rows)
        height = at_once(self._layout)
        for low in range(0, tests.n_rows, height):
            own = slice(low, min(low + height, tests.n_rows))
            stored = tests.features(own, slice(0, n_features))
            held = decode_tests(stored, tests.scales(own), self._segments, preconditioner)
            scorer = Scorer(held, self._segments, n_features, n_features)
            for total, block in zip(of_rows, blocks, strict=True):
                products = scorer(block.read, block.weight)
                total += products.sum(axis=1, dtype=np.float64)
                of_tests[own] += products.sum(axis=0, dtype=np.float64)
        return np.concatenate(of_rows) if of_rows else np.zeros(0), of_tests
