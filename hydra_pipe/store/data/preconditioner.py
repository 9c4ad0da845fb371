"""The root of the optimiser's preconditioner D, beside the test gradients of one checkpoint.

Rows and test gradients are stored without D. A reduction multiplies both sides by D^(1/2).
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hydra_pipe.errors import StoreError
from hydra_pipe.plan.layout import Layout
from hydra_pipe.store import names
from hydra_pipe.store.data.rows import ROWS_UNREADABLE, check_kind, read_array
from hydra_pipe.store.zarr.arrays import Array, Group
from hydra_pipe.types import F32

# The most values in a file.
_IN_FILE = 2**24


@dataclass(frozen=True)
class Preconditioner:
    """D^(1/2), elementwise, and in the columns of the rows.

    The gradient of a factored weight is an outer product, and stays one only under a D^(1/2) of the
    form a b'. So the columns have a and b of the nearest such D^(1/2). The elements are exact.

    Args:
        columns: factor of each column, shape (feature,), float32.
        biases: factor of each factored bias, beside that of the columns which it shares; 1 for
            other blocks; shape (block,), float32.
        elements: D^(1/2) of the features, shape (whole_width,), float32: blocks in the order of the
            layout, factored weights multiplied out, outputs first.
    """

    columns: F32
    biases: F32
    elements: F32

    def of_blocks(self, layout: Layout) -> list[F32]:
        """Return `elements` of each block."""
        ends = np.cumsum([0, *layout.widths])
        return [self.elements[first:last] for first, last in pairwise(ends)]

    def rank_one(self, layout: Layout) -> "Preconditioner":
        """Return the same with the elements that the columns make."""
        found = []
        for block, bias in zip(layout.blocks, self.biases, strict=True):
            outputs = self.columns[slice(*block.columns)]
            if block.inputs is None:
                found.append(outputs * bias)
            else:
                found.append(np.outer(outputs, self.columns[slice(*block.inputs)]).ravel())
        return Preconditioner(self.columns, self.biases, np.concatenate(found))


def write_preconditioner(group: Group, value: Preconditioner) -> None:
    """Write a preconditioner into the group of a checkpoint's test gradients."""
    for name, dimension, values in (
        (names.ROOT_OF_COLUMNS, names.FEATURE_DIM, value.columns),
        (names.ROOT_OF_BIASES, names.BLOCK_DIM, value.biases),
        (names.ROOT_OF_ELEMENTS, names.ELEMENT_DIM, value.elements),
    ):
        in_file = min(len(values), _IN_FILE)
        array = Array.create(group.path / name, values.shape, "float32", (dimension,), (in_file,))
        for number in range(-(-len(values) // in_file)):
            array.write_file((number,), values[number * in_file : (number + 1) * in_file])


def read_preconditioner(group: Group, layout: Layout) -> Preconditioner:
    """Return the preconditioner in the group of a checkpoint's test gradients.

    Raises:
        StoreError: it is missing or damaged.
    """

    def read(name: str, n: int) -> F32:
        array = group.array(name)
        check_kind(array, ("float32",), None)
        if array.shape != (n,):
            raise StoreError(
                f"{array.path} has {array.shape[0]} values, the block directory {n}: "
                f"{ROWS_UNREADABLE}"
            )
        values: F32 = read_array(array)
        if not (np.isfinite(values) & (values >= 0)).all():
            raise StoreError(f"{array.path} has values that no root has: {ROWS_UNREADABLE}")
        return values

    return Preconditioner(
        read(names.ROOT_OF_COLUMNS, layout.n_features),
        read(names.ROOT_OF_BIASES, len(layout.blocks)),
        read(names.ROOT_OF_ELEMENTS, layout.whole_width),
    )
