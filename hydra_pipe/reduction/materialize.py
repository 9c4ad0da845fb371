"""Features of a sweep from stored columns: dense ones are decoded, factored ones multiplied out."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.plan.layout import ColumnRange, Layout
from hydra_pipe.reduction.column_groups import DenseSegment, FactoredSegment, segments_of
from hydra_pipe.reduction.kernels import Weighted, decode
from hydra_pipe.store.data.preconditioner import Preconditioner
from hydra_pipe.types import F32


@dataclass(frozen=True)
class _Product:
    """A factored block, or the bias that shares its output factors.

    Args:
        outputs: stored columns of the output factor.
        inputs: stored columns of the input factor. None for a bias.
        block: index of the block that has the scale.
        to: features of the product, as many as outputs times inputs.
    """

    outputs: ColumnRange
    inputs: ColumnRange | None
    block: int
    to: ColumnRange


class Expansion:
    """Features of one layout, multiplied out.

    In each row, the gradient of a factored block is the outer product of its factors,
    out(i) in(i).T. After the curvature has acted on it, it is no outer product any more. So the
    sweep carries the whole product.

    Args:
        layout: layout of the stored columns.
        preconditioner: factors D^(1/2) of the features. None: none.
    """

    def __init__(self, layout: Layout, preconditioner: Preconditioner | None = None) -> None:
        self._dense: list[tuple[ColumnRange, int, int]] = []  # stored columns, block, first feature
        self._products: list[_Product] = []
        # first feature, one past the last, and the block's index, in order
        self.spans: list[tuple[int, int, int]] = []
        self.width = 0
        for segment in segments_of(layout):
            if isinstance(segment, DenseSegment):
                for block, columns in segment.blocks:
                    self._dense.append(
                        (columns, block, self._take(columns[1] - columns[0], block)[0])
                    )
            else:
                self._add_factored(segment)
        self._root: F32 | None = None
        if preconditioner is not None:
            of_blocks = preconditioner.of_blocks(layout)
            self._root = np.concatenate([of_blocks[block] for *_, block in self.spans])

    def _add_factored(self, segment: FactoredSegment) -> None:
        n_out, n_in = (last - first for first, last in (segment.outputs, segment.inputs))
        self._products.append(
            _Product(
                segment.outputs,
                segment.inputs,
                segment.weight,
                self._take(n_out * n_in, segment.weight),
            )
        )
        if segment.bias is not None:
            self._products.append(
                _Product(segment.outputs, None, segment.bias, self._take(n_out, segment.bias))
            )

    def _take(self, n: int, block: int) -> ColumnRange:
        first, self.width = self.width, self.width + n
        self.spans.append((first, self.width, block))
        return first, self.width

    def expand(self, stored: NDArray[Any], weight: F32, out: F32) -> None:
        """Fill `out` with the features of rows, times a weight for each block.

        Args:
            stored: rows as stored, shape (row, column), each row contiguous.
            weight: weight of each block in each row, shape (row, block), float32.
            out: array to fill, shape (row, feature), float32.
        """
        for (first, last), block, to in self._dense:
            whole: list[Weighted] = [(0, last - first, weight[:, block])]
            decode(stored[:, first:last], whole, out[:, to : to + last - first])
        for product in self._products:
            outputs = (
                stored[:, slice(*product.outputs)].astype(np.float32)
                * weight[:, product.block, None]
            )
            target = out[:, slice(*product.to)]
            if product.inputs is None:
                target[:] = outputs
            else:
                inputs = stored[:, slice(*product.inputs)].astype(np.float32)
                # written in place: a separate product would take as much memory again
                there = target.reshape((len(stored), outputs.shape[1], inputs.shape[1]), copy=False)
                np.multiply(outputs[:, :, None], inputs[:, None, :], out=there)
        if self._root is not None:
            out *= self._root


def feature_spans(layout: Layout) -> list[list[object]]:
    """Return the name of each block, its first feature and one past its last, in order.

    A stored matrix of hypergradients has its columns in this order.
    """
    return [
        [layout.blocks[block].name, first, last] for first, last, block in Expansion(layout).spans
    ]
