"""Rules of layers that multiply by a matrix: Linear, and the Conv1D of transformers.

Symbols: B samples in the batch, P positions a sample (pixels, tokens), O output and I input
channels or features.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from hydra_pipe.per_sample.factors import Contribution, Factors


def linear_rule(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    grad_output: Tensor,
    wanted: Collection[str],
) -> dict[str, Contribution]:
    """Apply the rule of Linear, y = W x + b: dW_i = sum_p g_ip x_ip^T, db_i = sum_p g_ip.

    Inputs have shape (B, ..., I).
    """
    (inputs,) = args or kwargs.values()
    left = _by_position(grad_output)
    if "weight" not in wanted:
        return {name: Factors(left, None) for name in wanted}
    weight = Factors(left, _by_position(inputs))
    return {name: weight if name == "weight" else Factors(left, None, weight) for name in wanted}


def _by_position(values: Tensor) -> Tensor:
    """Reshape (B, ..., n) to (B, P, n)."""
    return (
        values.unsqueeze(1)
        if values.dim() == 2
        else values.reshape(len(values), -1, values.shape[-1])
    )


def conv1d_of_transformers_rule(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    grad_output: Tensor,
    wanted: Collection[str],
) -> dict[str, Contribution]:
    """Apply the rule of a Linear whose weight has the shape (I, O), y = x W + b.

    dW_i = sum_p x_ip g_ip^T. GPT-2 in transformers is made of such layers.
    """
    (inputs,) = args or kwargs.values()
    batch = grad_output.shape[0]
    grads = grad_output.reshape(batch, -1, grad_output.shape[-1])
    inputs = inputs.reshape(batch, -1, inputs.shape[-1])
    return {
        name: Factors(inputs, grads) if name == "weight" else Factors(grads, None)
        for name in wanted
    }
