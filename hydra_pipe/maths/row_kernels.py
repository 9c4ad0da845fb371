"""Compiled loops for rows: sums over positions of outer products, straight into their columns.

The loops (`_rows.c`) take float32 on a processor. They write out neither patches nor, before a
projection, whole rows. torch does the same for other dtypes and devices, and where the loops
cannot be compiled.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

compiled: ModuleType | None
try:
    from hydra_pipe.maths import _rows

    compiled = _rows
except ImportError:
    compiled = None

Numbers = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Pixels that each position of a convolution sees, one number for each dimension.

    Args:
        kernel, stride, dilation: settings of the convolution.
        before: width of the zeros before the pixels.
        positions: number of positions.
        groups: number of groups of the convolution.
    """

    kernel: Numbers
    stride: Numbers
    dilation: Numbers
    before: Numbers
    positions: Numbers
    groups: int = 1


@dataclass(frozen=True, slots=True)
class SketchColumns:
    """Signs and columns of a count sketch (`hydra_pipe.maths.sketch`).

    Args:
        columns: column of the first element of each run, shape (n / run,), int32.
        signs: sign of each element, shape (n,), int8.
        run: number of neighbours in a run.
        n_columns: number of columns of the result.
    """

    columns: Tensor
    signs: Tensor
    run: int
    n_columns: int


@dataclass(frozen=True, slots=True)
class GridElements:
    """Elements of grids (`hydra_pipe.maths.grids`).

    Args:
        outputs, inputs: numbers of the outputs and inputs of each grid, one grid after the other,
            int64.
        grid: number of outputs and of inputs of a grid.
        scale: number that the elements are multiplied by.
    """

    outputs: Tensor
    inputs: Tensor
    grid: tuple[int, int]
    scale: float

    @property
    def n_columns(self) -> int:
        """Number of columns of the result."""
        return len(self.outputs) * self.grid[1]

    @property
    def arrays(self) -> tuple[NDArray[Any], NDArray[Any], int, int, float]:
        """The fields, as the loops take them."""
        return self.outputs.numpy(), self.inputs.numpy(), *self.grid, self.scale


Projection = SketchColumns | GridElements


def takes(*tensors: Tensor) -> bool:
    """Tell whether the compiled loops are there, and take these tensors."""
    return compiled is not None and all(
        x.dtype == torch.float32 and x.device.type == "cpu" and x.layout == torch.strided
        for x in tensors
    )


def convolved(
    left: Tensor,
    pixels: Tensor,
    geometry: Geometry,
    out: Tensor,
    into: Projection | None = None,
) -> Tensor:
    """Write sum_p outer(left[i, p], patch[i, p]) of each sample, with the patches of a convolution.

    Args:
        left: left factors, shape (B, P, O).
        pixels: pixels, shape (B, channels, ...).
        geometry: settings of the convolution.
        out: memory of the result, shape (B, O * channels / groups * kernel pixels), or (B, k) with
            a projection. Each row is contiguous.
        into: projection of the rows; None: the rows themselves. Grids need a single group.

    Returns:
        `out`.
    """
    assert compiled is not None
    sketch = grids = None
    if isinstance(into, SketchColumns):
        sketch = (into.columns.numpy(), into.signs.numpy(), into.run)
    elif into is not None:
        grids = into.arrays
    compiled.products(
        _array(left),
        _array(pixels),
        geometry.kernel,
        geometry.stride,
        geometry.dilation,
        geometry.before,
        geometry.positions,
        geometry.groups,
        _array(out),
        sketch,
        grids,
        torch.get_num_threads(),
    )
    return out


def elements(left: Tensor, right: Tensor, grids: GridElements) -> Tensor:
    """Return elements of sum_p outer(left[i, p], right[i, p]), times the scale of the grids.

    Args:
        left: left factors, shape (B, P, O).
        right: right factors, shape (B, P, I).
        grids: the elements.

    Returns:
        Shape (B, k).
    """
    assert compiled is not None
    out = left.new_empty(len(left), grids.n_columns)
    compiled.elements(
        _array(left), _array(right), grids.arrays, _array(out), torch.get_num_threads()
    )
    return out


def channel_sums(inputs: Tensor, gradient: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return sum_p g_ip n(x)_ip and sum_p g_ip by channel, with bounds of the norms of their terms.

    n(x) has mean 0 and variance 1 in each channel, over all samples and positions.

    Args:
        inputs, gradient: x and g, shape (B, C, P). In both the positions of a channel are
            neighbours in memory, or in both the channels of a position.
        eps: number that is added to the variance.

    Returns:
        The two sums, shape (2, B, C), and sqrt(P) |terms| of each sample, shape (2, B).
    """
    assert compiled is not None
    batch, channels = inputs.shape[:2]
    rows, bounds = inputs.new_empty(2, batch, channels), inputs.new_empty(2, batch)
    compiled.channel_sums(
        _array(inputs),
        _array(gradient),
        eps,
        _array(rows),
        _array(bounds),
        torch.get_num_threads(),
    )
    return rows, bounds


def sketched(rows: Tensor, sketch: SketchColumns) -> Tensor:
    """Project rows of shape (B, n), each contiguous, to shape (B, k)."""
    assert compiled is not None
    out = rows.new_empty(len(rows), sketch.n_columns)
    compiled.sketch(
        _array(rows),
        sketch.columns.numpy(),
        sketch.signs.numpy(),
        sketch.run,
        _array(out),
        torch.get_num_threads(),
    )
    return out


def sketched_lines(tokens: Tensor, values: Tensor, sketch: SketchColumns) -> Tensor:
    """Project rows that are zero outside of some lines of a table to shape (B, k).

    Args:
        tokens: number of the line that each entry of `values` is added to, shape (B, P), int64.
        values: values to add up in the lines, shape (B, P, elements of a line).
        sketch: columns and signs of the whole table.

    Raises:
        IndexError: a token is beyond the table.
    """
    assert compiled is not None
    out = values.new_empty(len(values), sketch.n_columns)
    compiled.lines(
        tokens.numpy(),
        _array(values if values.stride(-1) == 1 else values.contiguous()),
        sketch.columns.numpy(),
        sketch.signs.numpy(),
        sketch.run,
        _array(out),
        torch.get_num_threads(),
    )
    return out


def _array(values: Tensor) -> NDArray[Any]:
    found: NDArray[Any] = values.detach().numpy()
    return found
