"""Rules of convolutions and of transposed convolutions.

Symbols: B samples in the batch, P positions a sample (pixels, tokens), O output and I input
channels or features.
"""

from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from hydra_pipe.maths import row_kernels
from hydra_pipe.per_sample.factors import Contribution, Factors
from hydra_pipe.per_sample.patches import Conv, ConvTranspose, Patches


def conv_rule(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    grad_output: Tensor,
    wanted: Collection[str],
) -> dict[str, Contribution]:
    """Apply the rule of convolutions.

    A convolution is a Linear on patches: dW_i = sum_p g_ip patch_ip^T. Any stride, padding,
    dilation and groups are allowed.
    """
    assert isinstance(module, Conv)
    (inputs,) = args or kwargs.values()
    grads = grad_output.flatten(2)
    result: dict[str, Contribution] = {
        name: Factors(grads.transpose(1, 2), None) for name in wanted if name == "bias"
    }
    if "weight" in wanted:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        # torch keeps the widths in the order that F.pad takes, with "same" resolved.
        widths = tuple(module._reversed_padding_repeated_twice)
        patches = Patches(inputs, module, grad_output.shape[2:], widths, mode)
        result["weight"] = _grouped(grads, patches, module.groups, result.get("bias"))
    return result


def conv_transpose_rule(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    grad_output: Tensor,
    wanted: Collection[str],
) -> dict[str, Contribution]:
    """Apply the rule of transposed convolutions: dW_i = sum_p x_ip patch(g)_ip^T.

    The input and the output gradient swap their roles.
    """
    assert isinstance(module, ConvTranspose)
    inputs = args[0] if args else kwargs["input"]
    result: dict[str, Contribution] = {
        name: Factors(grad_output.flatten(2).transpose(1, 2), None)
        for name in wanted
        if name == "bias"
    }
    if "weight" in wanted:
        padding = cast("tuple[int, ...]", module.padding)
        widths = tuple(width for n in reversed(padding) for width in (n, n))
        patches = Patches(grad_output, module, inputs.shape[2:], widths)
        result["weight"] = _grouped(inputs.flatten(2), patches, module.groups)
    return result


def _grouped(
    lefts: Tensor, patches: Patches, groups: int, bias: Contribution | None = None
) -> Contribution:
    """Multiply values of shape (B, O, P) and patches, group by group.

    Args:
        lefts: values to multiply, shape (B, O, P).
        patches: patches to multiply.
        groups: number of groups of the convolution.
        bias: contribution of the bias, with the same output factor. None if the bias is not wanted.
    """
    if groups == 1:
        if isinstance(bias, Factors):
            return Factors(bias.left, patches, bias)
        return Factors(lefts.transpose(1, 2), patches)
    batch, positions = len(lefts), lefts.shape[2]
    rows = lefts.new_empty(batch * groups, lefts.shape[1] // groups, patches.n_pixels // groups)
    if row_kernels.takes(lefts, patches.pixels):
        return patches.multiply_all(lefts.transpose(1, 2), rows.view(batch, -1), groups=groups)
    for samples in patches.pieces():
        rights = (
            patches.written_out(samples)
            .transpose(1, 2)
            .reshape(-1, patches.n_pixels // groups, positions)
        )
        of_piece = lefts[samples].reshape(len(rights), -1, positions)
        torch.bmm(
            of_piece, rights.transpose(1, 2), out=rows[samples.start * groups :][: len(rights)]
        )
    return rows.reshape(batch, -1)
