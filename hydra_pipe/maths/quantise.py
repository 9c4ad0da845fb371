"""Gradients of 1e-8 and of 1e+3 in float16 without underflow: one float32 scale beside each row of each part.

A *part* is a run of columns with one scale: a dense or sketched block, or one factor of a factored block. What is stored
times its scale is the gradient. Float16 scales are powers of two, so that they cost no rounding of their own.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Dtype = Literal["float16", "int8", "float32"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)

# The largest element of a part lands in [2^14, 2^15): the top of float16's range, so that the smallest keep the most.
_FLOAT16_EXPONENT = 15
# Of the largest element: one more and the scale, or what it is divided by, leaves float32's normal numbers.
_SMALLEST_EXPONENT = -110


def part_scale(largest: Tensor, dtype: Dtype) -> Tensor:
    """Scale of parts whose largest magnitudes are `largest`, same shape, float32.

    `part / scale` fits `dtype`. Float32 needs none: 1.
    """
    if dtype == "float32":
        return torch.ones_like(largest, dtype=torch.float32)
    if dtype == "int8":
        return (largest.float() / 127).clamp_min(2.0 ** (_SMALLEST_EXPONENT - _FLOAT16_EXPONENT))
    _, exponent = torch.frexp(largest.float())
    exponent = exponent.clamp_min(_SMALLEST_EXPONENT) - _FLOAT16_EXPONENT
    return torch.ldexp(torch.ones_like(largest, dtype=torch.float32), exponent)


def scale_in_place(values: Tensor, scale: Tensor, dtype: Dtype) -> None:
    """Divide `values` by `scale`, and round them where `dtype` holds integers: what is left is converted by a plain copy.

    Args:
        values: shape (B, width), any float dtype.
        scale: shape (B,), float32, from `part_scale`.
        dtype: that they are to be stored in.
    """
    values.mul_(scale.reciprocal().unsqueeze(1))
    if dtype == "int8":
        values.round_()
