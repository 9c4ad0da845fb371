"""Rules of layers that normalise: over the last dimensions, or by channel.

Symbols: B samples in the batch, P positions a sample (pixels, tokens).
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hydra_pipe.maths import row_kernels
from hydra_pipe.per_sample.factors import Contribution, Factors, Summed
from hydra_pipe.per_sample.patches import norms


def last_dims_norm_rule(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    grad_output: Tensor,
    wanted: Collection[str],
) -> dict[str, Contribution]:
    """Apply the rule of LayerNorm and RMSNorm, y = w * n(x) + b over the last dimensions.

    dw_i = sum_p g_ip n(x)_ip, db_i = sum_p g_ip.
    """
    assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
    (inputs,) = args or kwargs.values()
    shape = list(module.normalized_shape)
    if isinstance(module, nn.LayerNorm):
        normed = F.layer_norm(inputs, shape, None, None, module.eps)
    else:
        normed = F.rms_norm(inputs, shape, None, module.eps)
    size = math.prod(shape)
    lefts = grad_output.reshape(len(inputs), -1, size)
    return {
        name: _over_positions(lefts * normed.reshape(lefts.shape))
        if name == "weight"
        else Factors(lefts, None)
        for name in wanted
    }


def _over_positions(terms: Tensor) -> Contribution:
    """Sum terms of shape (B, P, n) over positions, and keep a bound of their norms.

    If a softmax over positions follows, the terms cancel. Then the sum is nothing but rounding.
    """
    if terms.shape[1] == 1:
        return terms[:, 0]
    return Summed(terms.sum(1), norms(terms).mul_(terms.shape[1] ** 0.5))


def channel_norm_rule(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    grad_output: Tensor,
    wanted: Collection[str],
) -> dict[str, Contribution]:
    """Apply the rule of GroupNorm, InstanceNorm and BatchNorm, y = w * n(x) + b by channel.

    dw_i = sum_p g_ip n(x)_ip, db_i = sum_p g_ip. In training mode, BatchNorm's n(x) and the
    gradients below it depend on the whole batch. A row is then the sample's *share* of the batch
    gradient: the part that goes through its own activations. The shares sum to the gradient. But a
    share is not the gradient of the sample alone.
    """
    (inputs,) = args or kwargs.values()
    found = _by_loops(module, inputs, grad_output)
    if found is not None:
        return {name: found[name] for name in wanted}
    rows: dict[str, Contribution] = {}
    for name in wanted:
        if name == "weight":
            # In place, because another array of this size costs more than the product.
            terms = _channel_normed(module, inputs).mul_(grad_output)
            rows[name] = _over_positions(terms.reshape(*inputs.shape[:2], -1).transpose(1, 2))
        else:
            # Factors let the books know the terms of the sum. If a mean over positions is taken
            # off, the sum is nothing but rounding.
            rows[name] = Factors(grad_output.reshape(*inputs.shape[:2], -1).transpose(1, 2), None)
    return rows


def _by_loops(
    module: nn.Module, inputs: Tensor, gradient: Tensor
) -> dict[str, Contribution] | None:
    """Return both contributions by the compiled loops.

    Returns:
        None if the loops do not take the arrays, or if other statistics than those of the batch
        are in use.
    """
    if not isinstance(module, nn.modules.batchnorm._BatchNorm) or inputs.dim() < 3:
        return None
    own = module.training or module.running_mean is None
    if not own or not row_kernels.takes(inputs, gradient) or not inputs.numel():
        return None
    memory = torch.contiguous_format
    if inputs.dim() == 4 and inputs.is_contiguous(memory_format=torch.channels_last):
        memory = torch.channels_last
    x, g = (values.contiguous(memory_format=memory).flatten(2) for values in (inputs, gradient))
    rows, bounds = row_kernels.channel_sums(x, g, module.eps)
    return {"weight": Summed(rows[0], bounds[0]), "bias": Summed(rows[1], bounds[1])}


def _channel_normed(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return n(x), in memory of its own."""
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(inputs, module.num_groups, None, None, module.eps)
    assert isinstance(module, nn.modules.batchnorm._NormBase)
    own = module.training or module.running_mean is None
    kept = (None, None) if own else (module.running_mean, module.running_var)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return F.batch_norm(inputs, *kept, training=own, eps=module.eps)
    return F.instance_norm(inputs, *kept, use_input_stats=own, eps=module.eps)
