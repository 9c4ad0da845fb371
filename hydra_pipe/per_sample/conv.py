"""Rules of convolutions and of transposed convolutions.

Symbols: B samples in the batch, P positions a sample (pixels, tokens), O output and I input channels or features.
"""

from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from hydra_pipe.per_sample.factors import Contribution, Factors
from hydra_pipe.per_sample.patches import Conv, ConvTranspose, Patches


def conv_rule(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], grad_output: Tensor, wanted: Collection[str]
) -> dict[str, Contribution]:
    """Convolution as a Linear on patches: dW_i = sum_p g_ip patch_ip^T, any stride, padding, dilation and groups."""
    assert isinstance(module, Conv)
    (inputs,) = args or kwargs.values()
    grads = grad_output.flatten(2)
    result: dict[str, Contribution] = {name: Factors(grads.transpose(1, 2), None) for name in wanted if name == "bias"}
    if "weight" in wanted:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        # torch keeps the widths, "same" resolved, in the order that F.pad takes
        widths = tuple(module._reversed_padding_repeated_twice)
        patches = Patches(inputs, module, grad_output.shape[2:], widths, mode)
        result["weight"] = _grouped(grads, patches, module.groups, result.get("bias"))
    return result


def conv_transpose_rule(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], grad_output: Tensor, wanted: Collection[str]
) -> dict[str, Contribution]:
    """Transposed convolution: the roles of input and output gradient are changed, dW_i = sum_p x_ip patch(g)_ip^T."""
    assert isinstance(module, ConvTranspose)
    inputs = args[0] if args else kwargs["input"]
    result: dict[str, Contribution] = {
        name: Factors(grad_output.flatten(2).transpose(1, 2), None) for name in wanted if name == "bias"
    }
    if "weight" in wanted:
        padding = cast("tuple[int, ...]", module.padding)
        widths = tuple(width for n in reversed(padding) for width in (n, n))
        patches = Patches(grad_output, module, inputs.shape[2:], widths)
        result["weight"] = _grouped(inputs.flatten(2), patches, module.groups)
    return result


def _grouped(lefts: Tensor, patches: Patches, groups: int, bias: Contribution | None = None) -> Contribution:
    """Products of (B, O, P) and patches, group by group; `bias` has the same output factor, if it is given."""
    if groups == 1:
        left = bias.left if isinstance(bias, Factors) else lefts.transpose(1, 2)
        return Factors(left, patches)
    batch, positions = len(lefts), lefts.shape[2]
    rows = lefts.new_empty(batch * groups, lefts.shape[1] // groups, patches.n_pixels // groups)
    for samples in patches.pieces():
        rights = patches.written_out(samples).transpose(1, 2).reshape(-1, patches.n_pixels // groups, positions)
        of_piece = lefts[samples].reshape(len(rights), -1, positions)
        torch.bmm(of_piece, rights.transpose(1, 2), out=rows[samples.start * groups :][: len(rights)])
    return rows.reshape(batch, -1)
