"""What a budget is best spent on: float16 columns, or twice as many in int8."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hydra_pipe.plan.layout import EncodingChoice, Layout, Parameter, choose_layout

if TYPE_CHECKING:
    from hydra_pipe.maths.quantise import Dtype

# Bound on the variance that rounding a row x adds to <x, y>, over |x|^2 |y|^2, with errors spread evenly over a step: that of int8
# is at most |x| / 127, that of float16 2^-10 of each element.
ROUNDING_VARIANCE: "dict[Dtype, float]" = {"float16": 2.0**-20 / 12, "int8": 1 / (12 * 127**2), "float32": 0.0}


def choose_recording(
    parameters: Sequence[Parameter], choice: EncodingChoice, dim: int, seed: int, dtype: "Dtype | None" = None
) -> "tuple[Layout, Dtype]":
    """A layout, and the dtype of its rows where that is left open.

    `auto` then counts `dim` in float16 columns and takes twice as many int8 ones, which are as many bytes, where the inner
    products of rows are expected to be nearer to the true ones: the summed bounds on the variance that projecting and rounding
    add to each block's decide. Where float16 holds every block without loss, it stays.

    Args:
        parameters, choice, dim, seed: see `choose_layout`.
        dtype: as the user wants it; None: chosen here, float16 unless `auto` finds int8 better.

    Raises:
        BudgetError: fewer columns than parameters to hold.
    """
    layout = choose_layout(parameters, choice, dim, seed)
    if dtype is not None:
        return layout, dtype
    wider = choose_layout(parameters, choice, 2 * dim, seed) if choice == "auto" else layout
    return (wider, "int8") if expected_variance(wider, "int8") < expected_variance(layout, "float16") else (layout, "float16")


def expected_variance(layout: Layout, dtype: "Dtype") -> float:
    """Bound on what projecting and rounding add to the variance of <x, y>, over |x|^2 |y|^2, summed over the blocks."""
    return sum(block.variance + ROUNDING_VARIANCE[dtype] for block in layout.blocks)
