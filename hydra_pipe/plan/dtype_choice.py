"""The best use of a budget of columns: float16 columns, or twice as many int8 columns."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hydra_pipe.plan.layout import EncodingChoice, Layout, Parameter, choose_layout

if TYPE_CHECKING:
    from hydra_pipe.maths.quantise import Dtype

# Bound on the variance that rounding a row x adds to <x, y>, over |x|^2 |y|^2. Errors are taken
# as uniform over one rounding step. A step is at most |x| / 127 in int8, and 2^-10 times each
# element in float16.
ROUNDING_VARIANCE: "dict[Dtype, float]" = {
    "float16": 2.0**-20 / 12,
    "int8": 1 / (12 * 127**2),
    "float32": 0.0,
}


def choose_recording(
    parameters: Sequence[Parameter],
    choice: EncodingChoice,
    dim: int,
    seed: int,
    dtype: "Dtype | None" = None,
    *,
    preconditioned: bool = False,
) -> "tuple[Layout, Dtype]":
    """Return a layout and the dtype of its rows. The dtype is chosen here if the user left it open.

    `auto` counts `dim` in float16 columns. Twice as many int8 columns take as many bytes. `auto`
    takes them where they bring the inner products of rows nearer to the true products. It
    compares bounds on the variance that projecting and rounding add, summed over the blocks.
    float16 stays where it holds every block without loss.

    Args:
        parameters, choice, dim, seed, preconditioned: the arguments of `choose_layout`.
        dtype: dtype that the user wants. None: float16, unless `auto` finds int8 better.

    Raises:
        BudgetError: there are fewer columns than parameters to hold.
    """
    layout = choose_layout(parameters, choice, dim, seed, preconditioned=preconditioned)
    if dtype is not None:
        return layout, dtype
    wider = (
        choose_layout(parameters, choice, 2 * dim, seed, preconditioned=preconditioned)
        if choice == "auto"
        else layout
    )
    return (
        (wider, "int8")
        if expected_variance(wider, "int8") < expected_variance(layout, "float16")
        else (layout, "float16")
    )


def expected_variance(layout: Layout, dtype: "Dtype") -> float:
    """Return a bound on the variance that projecting and rounding add to <x, y>.

    The bound is relative to |x|^2 |y|^2 and summed over the blocks.
    """
    return sum(block.variance + ROUNDING_VARIANCE[dtype] for block in layout.blocks)
