"""Gradients of 1e-8 and of 1e+3 in float16 without underflow.

Each row has one float32 scale for each part. A *part* is a run of columns with one scale: a dense
or sketched block, or one factor of a factored block. The stored value times its scale is the
gradient. Scales of float16 are powers of two, so they add no rounding of their own.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Dtype = Literal["float16", "int8", "float32"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)

# The largest element of a part lands in [2^14, 2^15), the top of float16's range. So the
# smallest elements keep the most bits.
_FLOAT16_EXPONENT = 15
# Least exponent of the largest element. One step beyond, the scale or its divisor leaves
# float32's normal numbers.
_SMALLEST_EXPONENT = -110


def part_scale(largest: Tensor, dtype: Dtype) -> Tensor:
    """Return the scales of parts whose largest magnitudes are `largest`: same shape, float32.

    `part / scale` fits `dtype`. Float32 needs no scale: 1.
    """
    if dtype == "float32":
        return torch.ones_like(largest, dtype=torch.float32)
    if dtype == "int8":
        return (largest.float() / 127).clamp_min(2.0 ** (_SMALLEST_EXPONENT - _FLOAT16_EXPONENT))
    _, exponent = torch.frexp(largest.float())
    exponent = exponent.clamp_min(_SMALLEST_EXPONENT) - _FLOAT16_EXPONENT
    return torch.ldexp(torch.ones_like(largest, dtype=torch.float32), exponent)


def scale_in_place(values: Tensor, scale: Tensor, dtype: Dtype) -> None:
    """Divide `values` by `scale`, and round them if `dtype` holds integers.

    A plain copy then converts them.

    Args:
        values: values of a part, shape (B, width), any float dtype.
        scale: result of `part_scale`, shape (B,), float32.
        dtype: dtype that the values are to be stored in.
    """
    values.mul_(scale.reciprocal().unsqueeze(1))
    if dtype == "int8":
        values.round_()
